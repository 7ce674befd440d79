"""Whatever a file says, loading it gives a scenario or a message, and a scenario survives being written."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from config_example import SCENARIO
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from servesim.config.load import load_scenario, parse, read_yaml
from servesim.config.scenario import Scenario
from servesim.errors import Problem, ServesimError

FEW = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(min_value=10**300, max_value=10**400),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["poisson", "fixed", "azure", "lengths", "linear", "on", "0.26", "paged", "a: b", "{"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.integers(), inner),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "scenario.yaml"


def loads_or_says_why(path: Path, overrides: tuple[str, ...] = ()) -> None:
    problems: Sequence[Problem] = ()
    try:
        load_scenario(path, overrides)
    except ServesimError as error:
        problems = error.problems or [Problem("an error without a problem\n")]
    for problem in problems:
        assert problem.problem
        assert "\n" not in str(problem)
        for foreign in ("pydantic", "Input should", "tag:yaml", "union", "Error"):
            assert foreign not in problem.problem


@FEW
@given(data=st.binary(max_size=200))
def test_any_bytes(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    loads_or_says_why(path)


@FEW
@given(text=st.text(alphabet=" \n\t:-{}[]&*!|>'\"#%@,?ab1.~<=", max_size=80))
def test_any_text_made_of_yaml_signs(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    loads_or_says_why(path)


def spots(tree: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every path of a tree of dicts."""
    if not isinstance(tree, dict):
        return [at]
    return [at, *(path for key in tree for path in spots(tree[key], (*at, key)))]


TREE = yaml.safe_load(SCENARIO)
SPOTS = [spot for spot in spots(TREE) if spot]


@FEW
@given(changes=st.lists(st.tuples(st.sampled_from(SPOTS), VALUES, st.booleans()), min_size=1, max_size=4))
def test_any_change_of_a_scenario(path: Path, changes: list[tuple[tuple[Any, ...], Any, bool]]) -> None:
    tree = copy.deepcopy(TREE)
    for (*sections, last), value, add in changes:
        section = tree
        for key in sections:
            section = section.get(key) if isinstance(section, dict) else None
        if isinstance(section, dict):
            section[str(value)[:20] if add else last] = value
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    loads_or_says_why(path)


@FEW
@given(
    start=st.integers(0, len(SCENARIO)),
    cut=st.integers(0, 12),
    text=st.text(alphabet=" \n:{}[]ab1'", max_size=4),
)
def test_any_slip_of_the_keyboard(path: Path, start: int, cut: int, text: str) -> None:
    path.write_text(SCENARIO[:start] + text + SCENARIO[start + cut :], encoding="utf-8")
    loads_or_says_why(path)


@FEW
@given(spot=st.sampled_from(SPOTS), text=st.text(max_size=12) | SCALARS.map(str))
def test_any_override(path: Path, spot: tuple[Any, ...], text: str) -> None:
    path.write_text(SCENARIO, encoding="utf-8")
    loads_or_says_why(path, (".".join(spot) + "=" + text,))
    loads_or_says_why(path, (text,))


RATES = st.floats(min_value=1e-3, max_value=1e6)
COUNTS = st.integers(min_value=1, max_value=10**9)
VALID = st.fixed_dictionaries(
    {
        "name": st.text(min_size=1, max_size=10, alphabet="abc 0123456789.:#'\"-_éon"),
        "model": st.just("llama-3.1-8b"),
        "hardware": st.just({"gpu": "h100-sxm"}),
        "engine": st.fixed_dictionaries(
            {},
            optional={
                "version": st.sampled_from(["0.6", "0.11", "0.19", "0.22", "0.26", "0.33"]),
                "block_size": COUNTS,
                "gpu_memory_utilization": st.floats(min_value=0.01, max_value=1),
                "max_num_seqs": st.none() | COUNTS,
                "async_scheduling": st.booleans(),
                "step_time": st.fixed_dictionaries({"law": st.just("linear"), "base_s": st.floats(0, 1)})
                | st.just({"law": "operators", "host": "none"}),
            },
        ),
        "workload": st.fixed_dictionaries(
            {
                "arrivals": st.one_of(
                    st.fixed_dictionaries({"process": st.just("poisson"), "rate_per_s": RATES}),
                    st.fixed_dictionaries({"process": st.just("closed_loop"), "concurrency": COUNTS}),
                    st.just({"process": "burst"}),
                ),
                "prompt_tokens": st.fixed_dictionaries({"law": st.just("fixed"), "tokens": COUNTS}),
                "output_tokens": st.fixed_dictionaries(
                    {"law": st.just("geometric"), "mean_tokens": st.floats(1, 1e6)}
                ),
                "num_requests": COUNTS,
            }
        ),
    },
    optional={"seed": st.integers(0, 2**63), "slo": st.fixed_dictionaries({"ttft_p99_s": RATES})},
)


@FEW
@given(tree=VALID)
def test_a_scenario_survives_being_written_and_read(path: Path, tree: dict[str, Any]) -> None:
    scenario = Scenario.model_validate(tree)
    for dumped in (scenario.model_dump(mode="json"), scenario.model_dump(mode="json", exclude_unset=True)):
        path.write_text(yaml.safe_dump(dumped, allow_unicode=True), encoding="utf-8")
        assert parse(Scenario, read_yaml(path), path) == scenario
