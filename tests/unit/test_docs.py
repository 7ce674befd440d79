"""The documentation is true: commands and examples work, settings exist, links and figures are right."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer
from typer.main import get_command

from handmade import handmade_log
from servesim import api, studies
from servesim.analysis.tables import requests_frame, steps_frame
from servesim.cli import app
from servesim.config.load import list_data, scenario_schema
from servesim.config.profiles import load_gpu
from servesim.report.catalog import list_text, show_text

REPO = Path(__file__).parents[2]
PAGES = [
    REPO / "README.md",
    *sorted((REPO / "docs").glob("*.md")),
    REPO / "hardware/README.md",
    REPO / "scenarios/README.md",
    REPO / "scenarios/traces/README.md",
    REPO / "tests/golden/vllm_traces/README.md",
]
README = (REPO / "README.md").read_text(encoding="utf-8")
PROGRAM = ".venv/bin/servesim"
EXAMPLES = REPO / "README.md"

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))


class Block(NamedTuple):
    """A fenced block; ``file`` is the name in backticks and colon that ends the paragraph before it."""

    language: str
    text: str
    file: str | None


def blocks(page: Path) -> list[Block]:
    pattern = re.compile(
        r"(?:`(?P<file>[\w./-]+)`:\n\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S
    )
    found = pattern.finditer(page.read_text(encoding="utf-8"))
    return [Block(match["language"], match["text"], match["file"]) for match in found]


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def inline_code(page: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(page))


def shell_lines() -> list[list[str]]:
    """The words of every line of the README's shell blocks."""
    lines = [line for block in blocks(EXAMPLES) if block.language == "sh" for line in block.text.splitlines()]
    return [shlex.split(line) for line in lines if line]


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like the repository's top, in which a reader has followed the README so far as files go."""
    for name in ("hardware", "scenarios"):
        (tmp_path / name).symlink_to(REPO / name)
    monkeypatch.chdir(tmp_path)
    for words in shell_lines():
        if words[0] == "mkdir":
            Path(words[-1]).mkdir(parents=True, exist_ok=True)
        elif words[0] == "cp":
            shutil.copy(words[1], words[2])
    for block in blocks(EXAMPLES):
        if block.file is not None:
            Path(block.file).write_text(block.text, encoding="utf-8")
    return tmp_path


# ---- commands --------------------------------------------------------------------------------------


def parsed(words: list[str]) -> tuple[str, dict[str, Any]]:
    """The command and its parameters, as the program itself reads them."""
    group: Any = get_command(app)
    with group.make_context("servesim", list(words)) as context:
        name, command, rest = group.resolve_command(context, list(words))
        with command.make_context(name, rest, parent=context) as inner:
            return name, inner.params


def tried(words: list[str]) -> str:
    """Everything that the command does, but for simulating; returns its name."""
    name, given = parsed(words)
    overrides = list(given.get("set_") or [])
    for scenario in [given[key] for key in ("scenario", "a", "b") if given.get(key)]:
        if api.is_finished(scenario):
            continue
        _, memory, requests = api.check(scenario, overrides=overrides)
        assert memory.num_gpu_blocks > 1
        assert requests > 0
    if name == "list":
        assert list_text(given["kind"])
    if name == "show":
        assert show_text(given["name"])
    return name


def test_every_command_of_the_readme_can_be_given(desk: Path) -> None:
    ours = [words for words in shell_lines() if words[0] == PROGRAM]
    names = {tried(words[1 : words.index(">") if ">" in words else None]) for words in ours}
    commands = {
        "run",
        "compare",
        "sweep",
        "sensitivity",
        "explain",
        "plan",
        "capacity",
        "check",
        "schema",
        "fragmentation",
        "prefix-cache",
    }
    assert names == commands


def test_other_shell_lines_are_make_targets_and_copies() -> None:
    targets = re.findall(r"^(\w+):", (REPO / "Makefile").read_text(encoding="utf-8"), re.M)
    for words in shell_lines():
        if words[0] == "make":
            assert words[1] in targets
        else:
            assert words[0] in {PROGRAM, "mkdir", "cp"}


@each_page
def test_commands_in_the_text_can_be_given(page: Path, desk: Path) -> None:
    for code in inline_code(page):
        words = code.split()
        if words[0] == "servesim" and not any(re.search(r"[A-Z]{4}", word) for word in words):
            assert tried(words[1:] if len(words) > 1 else ["schema"])


def test_the_table_of_commands_is_complete() -> None:
    group: Any = get_command(app)
    section = README.split("## Commands, files, exit codes")[1].split("\n## ")[0]
    told = {
        code.split()[0]
        for code in re.findall(r"^\| (.+?) \|", section, re.M)
        for code in re.findall(r"`(.+?)`", code)
    }
    assert told == set(group.list_commands(typer.Context(group)))


# ---- settings --------------------------------------------------------------------------------------


def has_key(schema: dict[str, Any], node: dict[str, Any], path: list[str]) -> bool:
    """Whether some branch of a JSON schema allows the keys one below the other."""
    if "$ref" in node:
        return has_key(schema, schema["$defs"][node["$ref"].rsplit("/", 1)[1]], path)
    if not path:
        return True
    branches = [*node.get("anyOf", []), *node.get("oneOf", []), *node.get("allOf", [])]
    if path[0] in node.get("properties", {}) and has_key(schema, node["properties"][path[0]], path[1:]):
        return True
    return any(has_key(schema, branch, path) for branch in branches)


@each_page
def test_settings_exist(page: Path) -> None:
    schema = scenario_schema()
    for code in inline_code(page):
        match = re.match(r"(?:--set )?((?:engine|workload|hardware|slo)(?:\.[a-z]\w*)+)(?=$|[:= ])", code)
        if match:
            assert has_key(schema, schema, match[1].split(".")), code


def test_the_check_of_settings_sees_a_wrong_one() -> None:
    schema = scenario_schema()
    assert has_key(schema, schema, ["workload", "trace", "rate_scale"])
    assert not has_key(schema, schema, ["workload", "trace", "rate_scales"])
    assert not has_key(schema, schema, ["engine", "block_size", "tokens"])


# ---- examples and excerpts -------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(sum(block.language == "python" for block in blocks(EXAMPLES))))
def test_python_examples_run(number: int, desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = [block.text for block in blocks(EXAMPLES) if block.language == "python"][number]
    small = code.replace("max_requests=2000", "max_requests=300")
    assert small != code
    exec(compile(small, f"README example {number}", "exec"), {"__name__": "example"})
    assert capsys.readouterr().out


def assert_shortened(excerpt: str, output: str) -> None:
    """Every line of the excerpt is in the output, in its order; "..." stands for lines left out."""
    rest = output.splitlines()
    for line in excerpt.splitlines():
        if line == "...":
            continue
        assert line in rest, f"README.md is out of date: no line {line!r}, in this order, in\n{output}"
        rest = rest[rest.index(line) + 1 :]


def excerpt(words: str) -> str:
    [block] = [block.text for block in blocks(EXAMPLES) if words in block.text and block.language == "text"]
    return block


def test_the_demos_result_is_current() -> None:
    assert "servesim run scenarios/azure-conv-h100.yaml" in (REPO / "Makefile").read_text(encoding="utf-8")
    assert_shortened(excerpt("Serving Benchmark Result"), str(api.simulate("azure-conv-h100")))


def test_the_comparison_is_current(desk: Path) -> None:
    [words] = [line for line in shell_lines() if line[1] == "compare" and "--replications" not in line]
    _, given = parsed(words[1:])
    comparison = api.compare(given["a"], given["b"], overrides=given["set_"])
    assert_shortened(excerpt("B to A"), str(comparison))


def test_the_explanation_is_current(desk: Path) -> None:
    [words] = [line for line in shell_lines() if line[1] == "explain"]
    _, given = parsed(words[1:])
    result = api.explain(given["scenario"], overrides=given["set_"], jobs=1)
    assert_shortened(excerpt("Why P99 TTFT"), str(result))


def test_the_table_of_the_fragmentation_lab_is_current(desk: Path) -> None:
    [words] = [words for words in shell_lines() if words[1] == "fragmentation"]
    _, given = parsed(words[1:])
    report = api.fragmentation(given["scenario"], overrides=given["set_"] or (), block_sizes=(), maps=False)
    assert_shortened(excerpt("Batch that fits, by closed form"), str(report))


def test_the_plan_is_current() -> None:
    [words] = [line for line in shell_lines() if line[1] == "plan"]
    _, given = parsed(words[1:])
    axes = [f"hardware.gpu={given['gpus']}", f"engine.tensor_parallel_size={given['tensor_parallel']}"]
    limits = [f"slo.{text}" for text in given["slo"]]
    found = api.plan(given["scenario"], given["rate"], axes, overrides=limits, jobs=2)
    assert_shortened(excerpt("$/M tokens"), str(found))


def test_the_capacity_is_current() -> None:
    [words] = [line for line in shell_lines() if line[1] == "capacity"]
    _, given = parsed(words[1:])
    found = studies.capacity(given["scenario"], overrides=given["set_"] or (), jobs=2)
    assert_shortened(excerpt("It takes"), str(found))


def test_the_check_of_excerpts_sees_an_old_figure() -> None:
    assert_shortened("a 1\n...\nc 3\n", "a 1\nb 2\nc 3\n")
    for wrong in ("a 2\n", "c 3\na 1\n"):
        with pytest.raises(AssertionError, match="out of date"):
            assert_shortened(wrong, "a 1\nb 2\nc 3\n")


# ---- figures ---------------------------------------------------------------------------------------


def recorded_workloads() -> int:
    """How many recorded workloads tests/golden compares: all that are there."""
    return len(list(REPO.glob("tests/golden/vllm_traces/*/settings.json")))


def test_the_readme_counts_what_is_there() -> None:
    versions = {path.name for path in REPO.glob("tests/golden/vllm_traces/*/trace-*.jsonl.gz")}
    assert versions == {f"trace-{version}.jsonl.gz" for version in ("0.22.1", "0.26.0", "0.33.0")}
    compared = recorded_workloads()
    text = " ".join(README.split())
    assert f"{compared} recorded workloads on each of vLLM 0.22.1, 0.26.0 and 0.33.0" in text
    assert f"It ships {len(list_data('gpus'))} GPUs, {len(list_data('models'))} models" in text


def test_the_other_pages_count_what_is_there() -> None:
    compared = recorded_workloads()
    assert f"compares {compared} recorded workloads" in (REPO / "docs/model.md").read_text(encoding="utf-8")
    text = (REPO / "docs/limits.md").read_text(encoding="utf-8")
    assert f"all {compared} recorded workloads" in text
    gpus = [load_gpu(name) for name in list_data("gpus")]
    derived = [gpu for gpu in gpus if gpu.efficiency.provenance.startswith("derived")]
    assert f"{len(derived)} of {len(gpus)} GPUs have no measured kernels" in text


def test_the_columns_of_the_tables_are_explained() -> None:
    section = (REPO / "docs/model.md").read_text(encoding="utf-8").split("## Tables")[1].split("\n## ")[0]
    for frame in (requests_frame(handmade_log()), steps_frame(handmade_log())):
        for column in frame.columns:
            assert f"`{column}`" in section, column


def test_every_scenario_is_in_its_table() -> None:
    text = (REPO / "scenarios/README.md").read_text(encoding="utf-8")
    for path in (REPO / "scenarios").glob("*.yaml"):
        assert f"[{path.stem}]({path.name})" in text


# ---- links -----------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@each_page
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("https://", "http://")):
            continue
        file, _, anchor = target.partition("#")
        linked = page.parent / file if file else page
        assert linked.exists(), target
        if anchor:
            assert anchor in anchors(linked), target


@each_page
def test_paths_in_the_text_exist(page: Path) -> None:
    rooms = "sim|tests|docs|hardware|scenarios|reports|config|workload|kv|cost|engine|analysis|report"
    for code in inline_code(page):
        if re.fullmatch(rf"(?:{rooms})/[\w./*-]+", code):
            assert list(REPO.glob(code)) or list((REPO / "sim/servesim").glob(code)), code


def test_pictures_are_small() -> None:
    pictures = list((REPO / "docs/images").iterdir())
    assert pictures
    for picture in pictures:
        assert picture.stat().st_size < 250_000
        assert f"docs/images/{picture.name}" in README
