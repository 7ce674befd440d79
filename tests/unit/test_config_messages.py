"""What is said about each kind of mistake in a scenario: where it is, what is wrong, and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
from config_example import SCENARIO, write
from pydantic import Field

from servesim.config.load import load_scenario, parse, read_yaml
from servesim.config.record import Record, RuleError
from servesim.config.workload import PoissonArrivals
from servesim.errors import ConfigError, did_you_mean

ENGINE = "engine:\n  block_size: 16\n"  # lines 4 and 5 of the scenario


def message_of(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load_scenario(path)
    return str(caught.value).replace(str(path), "FILE")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        # unknown keys
        ("block_size", "blok_size", "FILE:5:3  engine.blok_size  unknown key  did you mean block_size?"),
        ("seed", "sed", "FILE:13:1  sed  unknown key  did you mean seed?"),
        ("seed: 1", "block_size: 1", "FILE:13:1  block_size  unknown key here  it belongs under engine"),
        (
            "  block_size: 16\n",
            "  name: x\n",
            "FILE:5:3  engine.name  unknown key here  it belongs at the top level",
        ),
        (
            "burstiness: 0.5",
            "burstiness: 0.5, cv: 2",
            "FILE:8:63  workload.arrivals.cv  unknown key  allowed: burstiness, exact_rate,"
            " process, rate_per_s",
        ),
        (
            "seed: 1",
            "12: 1",
            "FILE:13:1  [12]  unknown key  "
            "allowed: description, engine, expect, fleet, hardware, model, name",
        ),
        # wrong types
        ("16", "sixteen", 'FILE:5:15  engine.block_size  must be a whole number  got "sixteen"'),
        ("16", "16.5", "FILE:5:15  engine.block_size  must be a whole number  got 16.5"),
        ("16", "true", "FILE:5:15  engine.block_size  must be a whole number  got true"),
        ("16", "[1, 2]", "FILE:5:15  engine.block_size  must be a whole number  got a list of 2"),
        ("16", "{a: 1}", "FILE:5:15  engine.block_size  must be a whole number  got a section (a)"),
        (
            "16",
            "",
            "FILE:5:14  engine.block_size  must be a whole number  got nothing  -> give it a value, or remove"
            " the key",
        ),
        ("ttft_p99_s: 0.5", "ttft_p99_s: fast", 'FILE:12:19  slo.ttft_p99_s  must be a number  got "fast"'),
        ("ttft_p99_s: 0.5", "ttft_p99_s: false", "FILE:12:19  slo.ttft_p99_s  must be a number  got false"),
        (
            "ttft_p99_s: 0.5",
            "ttft_p99_s: .nan",
            "FILE:12:19  slo.ttft_p99_s  must be a finite number  got .nan",
        ),
        (
            ENGINE,
            "engine:\n  enforce_eager: maybe\n",
            'FILE:5:18  engine.enforce_eager  must be true or false  got "maybe"',
        ),
        ("name: example", "name: [x]", "FILE:1:7  name  must be text  got a list of 1"),
        (
            "name: example",
            'name: {"\\e[2J\\n": 1}',
            "FILE:1:7  name  must be text  got a section (\\x1b[2J\\n)",
        ),
        (
            "seed: 1",
            '"a\\nb": 1',
            "FILE:13:1  a\\nb  unknown key  "
            "allowed: description, engine, expect, fleet, hardware, model, name",
        ),
        ("name: example", "name: ''", 'FILE:1:7  name  must not be empty  got ""'),
        # sections
        (
            "{ttft_p99_s: 0.5}",
            "",
            "FILE:12:5  slo  must be a section of keys and values  got nothing  -> give it a value, or remove"
            " the key",
        ),
        (
            "{ttft_p99_s: 0.5}",
            "ttft_p99_s:0.5",
            'FILE:12:6  slo  must be a section of keys and values  got "ttft_p99_s:0.5"  -> put a space after'
            " the colon",
        ),
        (
            "{ttft_p99_s: 0.5}",
            "0.5",
            "FILE:12:6  slo  must be a section of keys and values  got 0.5  -> write its keys, such as"
            " ttft_p99_s, on lines of their own below it",
        ),
        (
            "{process: gamma, rate_per_s: 10, burstiness: 0.5}",
            "poisson",
            'FILE:8:13  workload.arrivals  must be a section of keys and values  got "poisson"  ->'
            " write process:"
            " poisson, and its other keys, on lines of their own below it",
        ),
        # ranges
        (
            "rate_per_s: 10",
            "rate_per_s: -1",
            "FILE:8:42  workload.arrivals.rate_per_s  must be greater than 0  got -1",
        ),
        ("block_size: 16", "block_size: 0", "FILE:5:15  engine.block_size  must be 1 or more  got 0"),
        (
            "num_requests: 20",
            "num_requests: 0",
            "FILE:11:17  workload.num_requests  must be 1 or more  got 0",
        ),
        (
            "block_size: 16",
            "gpu_memory_utilization: 92",
            "FILE:5:27  engine.gpu_memory_utilization  must be 1 or less  got 92  allowed: greater"
            " than 0 and at"
            " most 1",
        ),
        # one of several values
        (
            "block_size: 16",
            "allocator: pagd",
            'FILE:5:14  engine.allocator  unknown value  got "pagd"  did you mean paged?',
        ),
        (
            "block_size: 16",
            "version: 0.30",
            "FILE:5:12  engine.version  unknown value  got 0.30  "
            "allowed: 0.6, 0.11, 0.19, 0.22, 0.26, 0.32, 0.33",
        ),
        (
            "block_size: 16",
            "allocator:",
            "FILE:5:13  engine.allocator  must not be empty  allowed: paged, contiguous-max, contiguous-pow2,"
            " contiguous-oracle  ->"
            " give it a value,"
            " or remove the key",
        ),
        # one of several kinds of section
        (
            "process: gamma",
            "process: gama",
            'FILE:8:23  workload.arrivals.process  unknown process  got "gama"  did you mean gamma?',
        ),
        (
            "process: gamma, ",
            "",
            "FILE:8:3  workload.arrivals.process  is missing  allowed: poisson, gamma, constant, burst,"
            " closed_loop  -> add process: under workload.arrivals",
        ),
        (
            "block_size: 16",
            "step_time: {law: liner}",
            'FILE:5:20  engine.step_time.law  unknown law  got "liner"  did you mean linear?',
        ),
        (
            "block_size: 16",
            "step_time: {law: linear}",
            "FILE:5:3  engine.step_time.base_s  is missing  -> add base_s: under engine.step_time",
        ),
        (
            "block_size: 16",
            "step_time: {host: slow}",
            'FILE:5:21  engine.step_time.host  unknown value  got "slow"',
        ),
        # missing keys
        (
            "model: llama-3.1-8b\n",
            "",
            "FILE  model  is missing  Name of a file in hardware/models, or a path to one.  -> add"
            " model: at the"
            " top level",
        ),
        (
            "{gpu: h100-sxm}",
            "{}",
            "FILE:3:1  hardware.gpu  is missing  Name of a file in hardware/gpus, or a path to one."
            "  -> add gpu:"
            " under hardware",
        ),
        # values that do not go together
        (
            "block_size: 16",
            "allocator: contiguous-max\n  enable_prefix_caching: on",
            "FILE:6:3  engine.enable_prefix_caching  needs allocator: paged (contiguous memory has"
            " no blocks to"
            " share)  -> remove it, or set it to false",
        ),
        (
            "  num_requests: 20\n",
            "",
            "FILE:7:1  workload  a workload without trace needs num_requests",
        ),
        (
            "sigma: 1",
            "sigma: 1, min_tokens: 5, max_tokens: 4",
            "FILE:10:3  workload.output_tokens  max_tokens (4) is below min_tokens (5)",
        ),
        # names of files
        (
            "llama-3.1-8b",
            "llama-3.1-8",
            'FILE:2:8  model  no such model  got "llama-3.1-8"  did you mean llama-3.1-8b?  -> see'
            " `servesim list"
            " models`, or give the path of a file",
        ),
        (
            "h100-sxm",
            "h100-smx",
            'FILE:3:17  hardware.gpu  no such GPU  got "h100-smx"  did you mean h100-sxm?  -> see'
            " `servesim list"
            " gpus`, or give the path of a file",
        ),
        (
            "gpu: h100-sxm",
            "gpu: ./my.yaml",
            'FILE:3:17  hardware.gpu  no such GPU file  got "./my.yaml"',
        ),
    ],
)
def test_one_mistake(tmp_path: Path, old: str, new: str, message: str) -> None:
    text = SCENARIO + "seed: 1\n"
    assert text.count(old) >= 1
    said = message_of(write(tmp_path, text.replace(old, new, 1)))
    if message.endswith(("name", '"slow"', '"./my.yaml"')):  # followed by a list that grows with the product
        said = said[: len(message)]
    assert said == message


def test_a_missing_trace(tmp_path: Path) -> None:
    head = SCENARIO.partition("workload:")[0]
    path = write(
        tmp_path, head + "workload:\n  trace: {format: azure, file: traces/azure_llm_2023_con.csv.gz}\n"
    )
    assert message_of(path) == (
        'FILE:8:32  workload.trace.file  no such trace  got "traces/azure_llm_2023_con.csv.gz"  did you mean'
        " azure_llm_2023_conv.csv.gz?  -> put it beside the scenario, or give its path"
    )


def test_all_mistakes_come_at_once_by_line(tmp_path: Path) -> None:
    text = SCENARIO.replace("h100-sxm", "h100").replace("block_size", "blok_size").replace("256", "yes")
    text = text.replace("rate_per_s: 10", "rate_per_s: -1").replace("tokens: 100", "token: 100")
    said = message_of(write(tmp_path, text)).splitlines()
    assert [line.split("  ")[:2] for line in said] == [
        ["FILE:3:17", "hardware.gpu"],
        ["FILE:5:3", "engine.blok_size"],
        ["FILE:6:17", "engine.max_num_seqs"],
        ["FILE:8:42", "workload.arrivals.rate_per_s"],
        ["FILE:9:3", "workload.prompt_tokens.tokens"],
        ["FILE:9:31", "workload.prompt_tokens.token"],
    ]


class Inner(Record):
    first: int = 0
    second: int = 0


class Other(Record):
    third: int = 0


class Outer(Record):
    """Everything that the scenario does not have (yet), and profiles do."""

    size: int | bool | None = None
    rates: dict[str, float] = Field(default_factory=dict)
    degrees: dict[int, Inner] = Field(default_factory=dict)
    pairs: tuple[int, str] = (1, "a")
    inners: tuple[Inner, ...] = Field(default=(), max_length=2)
    either: Inner | Other | int = 0
    text: str = Field(default="ab", min_length=2, pattern="^[a-z]+$")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("size: big", 'F:1:7  size  must be a whole number or true or false  got "big"'),
        ("rates: {a: x}", 'F:1:12  rates.a  must be a number  got "x"'),
        ("rates: {a: true}", "F:1:12  rates.a  must be a number  got true"),
        ("rates: [1]", "F:1:8  rates  must be a section of keys and values  got a list of 1"),
        ("degrees: {2: {frist: 1}}", "F:1:15  degrees[2].frist  unknown key  did you mean first?"),
        ("degrees: {two: {first: 1}}", 'F:1:11  degrees.two  must be a whole number  got "two"'),
        ("pairs: [1, [2]]", "F:1:12  pairs[1]  must be text  got a list of 1"),
        ("pairs: [true, a]", "F:1:9  pairs[0]  must be a whole number  got true"),
        ("inners: [{first: 1}, {first: x}]", 'F:1:30  inners[1].first  must be a whole number  got "x"'),
        ("inners: [{}, {}, {}]", "F:1:9  inners  must be a list of at most 2  got a list of 3"),
        ("inners: 5", "F:1:9  inners  must be a list  got 5"),
        ("either: {third: x}", 'F:1:17  either.third  must be a whole number  got "x"'),
        ("either: {first: 1, secnd: x}", "F:1:20  either.secnd  unknown key  did you mean second?"),
        (
            "either: x",
            'F:1:9  either  must be a section of keys and values or a whole number  got "x"  ->'
            " write its keys,"
            " such as first, on lines of their own below it",
        ),
        ("text: a", 'F:1:7  text  must have 2 characters or more  got "a"'),
        ("text: A-B", 'F:1:7  text  must be text of the form ^[a-z]+$  got "A-B"'),
    ],
)
def test_shapes_of_other_records(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        parse(Outer, read_yaml(path), path)
    assert str(caught.value).replace(str(path), "F") == message


def test_text_is_read_as_it_is_written(tmp_path: Path) -> None:
    """A text field gets 0.30 and not 0.3, true and not True."""
    path = write(
        tmp_path, SCENARIO.replace("name: example", "name: 0.30").replace("16", "16\n  version: 0.33")
    )
    scenario = load_scenario(path).scenario
    assert (scenario.name, scenario.engine.version) == ("0.30", "0.33")
    assert (
        load_scenario(write(tmp_path, SCENARIO.replace("name: example", "name: TRUE"))).scenario.name
        == "TRUE"
    )


def test_numbers_and_switches_take_every_spelling_of_yaml(tmp_path: Path) -> None:
    text = SCENARIO.replace("16", "3.2e1\n  enforce_eager: on\n  enable_prefix_caching: no")
    engine = load_scenario(write(tmp_path, text)).scenario.engine
    assert (engine.block_size, engine.enforce_eager, engine.enable_prefix_caching) == (32, True, False)


def test_a_tree_without_places_is_told_by_its_path() -> None:
    with pytest.raises(ConfigError) as caught:
        parse(PoissonArrivals, {"process": "poisson", "rate_per_s": True}, "somewhere")
    assert str(caught.value) == "somewhere  rate_per_s  must be a number  got true"


def test_a_rule_points_at_its_key() -> None:
    error = RuleError("is odd", path=("a", "b"), next_step="make it even")
    assert (str(error), error.path, error.next_step) == ("is odd", ("a", "b"), "make it even")


def test_a_beginning_is_completed_however_many_ends_it_has() -> None:
    ends = [f"a100-{rest}" for rest in ("40gb-pcie", "40gb-sxm", "80gb-pcie", "80gb-sxm")]
    assert did_you_mean("a100", [*ends, "a10g"]) == f"did you mean {' or '.join(ends)}?"


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("h200", "did you mean h200-sxm?"),
        ("h100", "did you mean h100-nvl or h100-sxm?"),
        ("H100-SXM", "did you mean h100-sxm?"),
        ("a1000", "did you mean a100?"),
        ("sxm", "did you mean h100-sxm or h200-sxm?"),
        ("-s", "allowed: a100, b200, h100-nvl, h100-sxm, h200-sxm"),
        ("tpu", "allowed: a100, b200, h100-nvl, h100-sxm, h200-sxm"),
        ("", "allowed: a100, b200, h100-nvl, h100-sxm, h200-sxm"),
    ],
)
def test_the_word_that_was_meant(word: str, hint: str) -> None:
    assert did_you_mean(word, ["h100-sxm", "h100-nvl", "h200-sxm", "b200", "a100"]) == hint
