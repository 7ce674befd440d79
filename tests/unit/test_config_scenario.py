"""Scenarios that extend one another, overrides, where files are looked for, and the JSON schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from config_example import SCENARIO, write

from servesim.config import files
from servesim.config.load import find_data, list_data, load_scenario, schema_text, shipped
from servesim.config.scenario import LinearStepTime, OperatorStepTime, Scenario
from servesim.config.workload import ClosedLoopArrivals, FixedTokens, PoissonArrivals
from servesim.errors import ConfigError, TraceError

SHIPPED = sorted(shipped("scenarios").glob("*.yaml"))


def load(path: Path, *overrides: str) -> Scenario:
    return load_scenario(path, overrides).scenario


def message_of(path: Path | str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_scenario(path, overrides)
    return str(caught.value)


def test_extends_merges_sections_and_replaces_the_rest(tmp_path: Path) -> None:
    write(tmp_path, SCENARIO, "base.yaml")
    child = write(
        tmp_path,
        "extends: base.yaml\nname: child\nengine: {block_size: 32}\nslo: {tpot_p99_s: 0.05}\n",
        "child.yaml",
    )
    grandchild = write(tmp_path, "extends: child\nseed: 7\nslo: {ttft_p99_s: null}\n", "grandchild.yaml")
    scenario = load(grandchild)
    assert (scenario.name, scenario.seed, scenario.model) == ("child", 7, "llama-3.1-8b")
    assert (scenario.engine.block_size, scenario.engine.max_num_seqs) == (32, 256)
    assert (scenario.slo.ttft_p99_s, scenario.slo.tpot_p99_s) == (None, 0.05)
    assert load(child).seed == 1


def test_a_problem_points_into_the_file_that_says_the_value(tmp_path: Path) -> None:
    base = write(tmp_path, SCENARIO.replace("16", "-16"), "base.yaml")
    child = write(tmp_path, "extends: base.yaml\nengine:\n  max_num_seqs: 0\n", "child.yaml")
    assert message_of(child, "seed=-1").splitlines() == [
        "--set  seed  must be 0 or more  got -1",
        f"{base}:5:15  engine.block_size  must be 1 or more  got -16",
        f"{child}:3:17  engine.max_num_seqs  must be 1 or more  got 0",
    ]


def test_extends_that_lead_nowhere(tmp_path: Path) -> None:
    write(tmp_path, "extends: b.yaml\n", "a.yaml")
    write(tmp_path, "extends: c.yaml\n", "b.yaml")
    last = write(tmp_path, "extends: a.yaml\n", "c.yaml")
    assert message_of(tmp_path / "a.yaml") == (
        f"{last}:1:10  extends  scenarios extend one another in a circle: a.yaml -> b.yaml -> c.yaml"
        " -> a.yaml  -> remove one `extends:`"
    )
    alone = write(tmp_path, "extends: alone.yaml\n", "alone.yaml")
    assert "in a circle: alone.yaml -> alone.yaml" in message_of(alone)
    lost = write(tmp_path, "name: x\nextends: d.yaml\n", "lost.yaml")
    assert message_of(lost).startswith(f'{lost}:2:10  extends  no such scenario  got "d.yaml"')
    many = write(tmp_path, "extends: [a, b]\n", "many.yaml")
    assert (
        message_of(many) == f"{many}:1:10  extends  must be the name or path of one scenario  got a list of 2"
    )


def test_a_scenario_keeps_the_folders_it_came_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trace = write(tmp_path / "base", "TIMESTAMP,ContextTokens,GeneratedTokens\n", "mine/trace.csv")
    head = SCENARIO.partition("workload:")[0]
    workload = "workload: {trace: {format: azure, file: mine/trace.csv}}\n"
    write(tmp_path / "base", head + workload, "base.yaml")
    child = write(tmp_path / "child", "extends: ../base/base.yaml\nname: child\n", "child.yaml")
    loaded = load_scenario(child)
    assert loaded.file == child
    assert loaded.folder == tmp_path / "child"
    assert loaded.find("traces", "mine/trace.csv").resolve() == trace
    assert loaded.find("gpus", "h100-sxm") == shipped("hardware/gpus") / "h100-sxm.yaml"


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("engine.block_size=32", ("engine", "block_size"), 32),
        ("engine.version=0.33", ("engine", "version"), "0.33"),
        ("engine.gpu_memory_utilization=9e-1", ("engine", "gpu_memory_utilization"), 0.9),
        ("engine.enable_prefix_caching=off", ("engine", "enable_prefix_caching"), False),
        ("engine.max_num_seqs=null", ("engine", "max_num_seqs"), None),
        ("engine.max_num_seqs=", ("engine", "max_num_seqs"), None),
        ("description=a: b # c = [d]", ("description",), "a: b # c = [d]"),
        ("description='12'", ("description",), "12"),
        ("name=2024-01-01", ("name",), "2024-01-01"),
        (" slo.ttft_p99_s = 2 ", ("slo", "ttft_p99_s"), 2.0),
        ("slo={e2e_p99_s: 3, ttft_p99_s: null}", ("slo", "e2e_p99_s"), 3.0),
    ],
)
def test_overrides(tmp_path: Path, override: str, path: tuple[str, ...], value: Any) -> None:
    read: Any = load(write(tmp_path, SCENARIO), override)
    for name in path:
        read = getattr(read, name)
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("engine.blok_size=3", "--set  engine.blok_size  unknown key  did you mean block_size?"),
        ("block_size=3", "--set  block_size  unknown key here  it belongs under engine"),
        ("engine.block_size=big", '--set  engine.block_size  must be a whole number  got "big"'),
        ("engine.block_size.x=3", "--set  engine.block_size  must be a whole number  got a section (x)"),
        (
            "engine.version=0.30",
            "--set  engine.version  unknown value  got 0.30  "
            "allowed: 0.6, 0.11, 0.19, 0.22, 0.26, 0.32, 0.33",
        ),
        (
            "engine=3",
            "--set  engine  must be a section of keys and values  got 3  -> write its keys, such as"
            " version, on"
            " lines of their own below it",
        ),
        (
            "hardware.gpu=h200",
            '--set  hardware.gpu  no such GPU  got "h200"  did you mean h200-sxm?  -> see `servesim'
            " list gpus`,"
            " or give the path of a file",
        ),
        (
            "block_size",
            '--set  an override must be path=value  got "block_size"  -> write section.key=value, such as'
            " engine.block_size=32",
        ),
        (
            "engine..block_size=1",
            '--set  an override must be path=value  got "engine..block_size=1"  -> write'
            " section.key=value, such"
            " as engine.block_size=32",
        ),
        (
            "slo=[1",
            '--set  slo  a list without its closing ]  got "[1"  -> close it',
        ),
        (
            "fleet={failurs: [{replica: 1, at_s: 3}]}",
            "--set  fleet.failurs  unknown key  did you mean failures?",
        ),
        (
            "engine={block_size: big}",
            '--set  engine.block_size  must be a whole number  got "big"',
        ),
        (
            "engine={block_size: 8, block_size: 16}",
            '--set  engine  the key "block_size" is there twice  got "{block_size: 8, block_size: 16}"'
            "  -> remove one of the two",
        ),
        ("seed=" + "9" * 5000, f'--set  seed  is not a number that can be read  got "{"9" * 57}..."'),
        (
            "workload.arrivals.process=poison",
            '--set  workload.arrivals.process  unknown process  got "poison"  did you mean poisson?',
        ),
        (
            "workload.arrivals.process=closed_loop",
            "--set  workload.arrivals.concurrency  is missing  -> add concurrency: under workload.arrivals",
        ),
    ],
)
def test_wrong_overrides(tmp_path: Path, override: str, message: str) -> None:
    assert message_of(write(tmp_path, SCENARIO), override) == message


def test_an_override_can_change_the_kind_of_a_section(tmp_path: Path) -> None:
    path = write(tmp_path, SCENARIO)
    arrivals = load(path, "workload.arrivals.process=poisson").workload.arrivals
    assert isinstance(arrivals, PoissonArrivals)
    assert arrivals.rate_per_s == 10
    for overrides in (
        ["workload.arrivals.process=closed_loop", "workload.arrivals.concurrency=8"],
        ["workload.arrivals.concurrency=8", "workload.arrivals.process=closed_loop"],
        ["workload.arrivals={process: closed_loop, concurrency: 8}"],
    ):
        arrivals = load(path, *overrides).workload.arrivals
        assert isinstance(arrivals, ClosedLoopArrivals)
        assert arrivals.concurrency == 8


def test_extends_can_change_the_kind_of_a_section(tmp_path: Path) -> None:
    write(tmp_path, SCENARIO.replace("256", "256\n  step_time: {host: none}"), "base.yaml")
    child = "extends: base\nworkload: {output_tokens: {law: fixed, tokens: 9}}\n"
    assert load(write(tmp_path, child)).workload.output_tokens == FixedTokens(law="fixed", tokens=9)
    linear = write(tmp_path, child + "engine: {step_time: {law: linear, base_s: 0.01}}\n", "linear.yaml")
    assert load(linear).engine.step_time == LinearStepTime(law="linear", base_s=0.01)


def test_a_step_time_without_law_means_operators(tmp_path: Path) -> None:
    step_time = load(write(tmp_path, SCENARIO), "engine.step_time.host=none").engine.step_time
    assert step_time == OperatorStepTime(host="none")


def test_the_later_override_wins(tmp_path: Path) -> None:
    path = write(tmp_path, SCENARIO)
    assert load(path, "seed=2", "engine.block_size=8", "seed=3").seed == 3


def test_names_are_looked_for_from_near_to_far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, away = tmp_path / "here", tmp_path / "away"
    here.mkdir()
    monkeypatch.chdir(here)
    name = "l4"
    assert find_data("gpus", name) == shipped("hardware/gpus") / "l4.yaml"
    near = write(here, "x: 1", "hardware/gpus/l4.yaml")
    assert find_data("gpus", name).resolve() == near
    beside = write(away, "x: 1", "hardware/gpus/l4.yaml")
    assert find_data("gpus", name, away) == beside
    write(away, "x: 1", "l4.yaml")  # perhaps a scenario: a bare name does not mean it
    assert find_data("gpus", name, away) == beside
    assert find_data("gpus", "l4.yaml", away) == away / "l4.yaml"
    assert find_data("gpus", "./l4.yaml", away) == away / "l4.yaml"
    own = write(away, "x: 1", "own.yaml")
    assert find_data("gpus", "own", away) == own
    assert find_data("gpus", str(own)) == own
    write(here, "x: 1", "hardware/gpus/own-gpu.yaml")
    assert {"own-gpu", "l4", "h100-sxm"} <= set(list_data("gpus"))
    assert find_data("scenarios", "own", away) == own


def test_traces_are_found_by_name_and_from_the_scenarios_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = "azure_llm_2023_conv.csv.gz"
    wanted = shipped("scenarios") / "traces" / file
    assert find_data("traces", file).resolve() == wanted.resolve()
    assert find_data("traces", f"traces/{file}").resolve() == wanted.resolve()
    near = write(tmp_path, "", f"scenarios/traces/{file}")
    assert find_data("traces", f"traces/{file}").resolve() == near
    odd = write(tmp_path, "", "requests.txt")
    assert find_data("traces", "requests.txt").resolve() == odd
    with pytest.raises(TraceError, match="no such trace"):
        find_data("traces", "nothing.csv")


def test_shipped_data_lies_in_the_wheel_or_beside_the_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    checkout = write(tmp_path, "x: 1", "hardware/gpus/l4.yaml")
    monkeypatch.setattr(files, "_PACKAGE", tmp_path / "sim" / "servesim")
    assert shipped("hardware/gpus") == checkout.parent
    assert find_data("gpus", "l4", tmp_path / "elsewhere") == checkout
    wheel = write(tmp_path / "sim" / "servesim", "x: 1", "hardware/gpus/l4.yaml")
    assert shipped("hardware/gpus") == wheel.parent


def test_what_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    assert (
        message_of("./folder")
        == 'a scenario must be a file, not a folder  got "folder"  -> give a file in it'
    )
    assert message_of(" ") == "the name of a scenario is empty  -> give a name or a path"
    for odd in ("x" * 5000, "a\0b", "./a\0b"):
        assert message_of(odd).startswith("no such scenario")


def test_the_schema_of_the_checkout_is_fresh() -> None:
    written = (shipped("scenarios") / "scenario.schema.json").read_text(encoding="utf-8")
    assert written == schema_text(), "stale: run `servesim schema > scenarios/scenario.schema.json`"


def test_the_schema_carries_the_texts_of_the_records() -> None:
    schema = json.loads(schema_text())
    engine = schema["$defs"]["EngineConfig"]
    assert set(schema["properties"]) == {"extends", *Scenario.model_fields}
    assert engine["properties"]["block_size"] == {
        "default": 16,
        "description": "Tokens in one KV block.",
        "minimum": 1,
        "type": "integer",
    }
    assert engine["additionalProperties"] is False
    assert {"required": ["extends"]} in schema["anyOf"]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_scenarios_load_and_know_their_schema(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# yaml-language-server: $schema=scenario.schema.json\n")
    assert load(path).name == path.stem
    assert yaml.safe_load(text).keys() <= json.loads(schema_text())["properties"].keys()
