"""The scheduler makes the very steps that the real vLLM made, on recorded workloads and three versions."""

from __future__ import annotations

from typing import Any

import pytest
from vllm_driver import TRACES, Driver, load_case, recorded_steps

VERSIONS = {"0.22.1": "0.22", "0.26.0": "0.26", "0.33.0": "0.33"}
CASES = sorted(folder.name for folder in TRACES.iterdir() if folder.is_dir())
KEYS = (
    "sched", "total_tokens", "new", "resumed", "preempted", "running", "waiting", "used_blocks", "evicted",
    "draft", "accepted", "emitted", "finished", "free_after",
)  # fmt: skip
BLOCK_KEYS = ("tables", "evicted_ids")  # recorded for all cases but the long ones


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("case", CASES)
def test_every_step_is_vllms(case: str, version: str) -> None:
    settings, requests = load_case(case)
    expected = recorded_steps(case, version)
    actual = list(Driver(settings, requests, VERSIONS[version]).steps())
    assert_same_steps(actual, expected)
    assert len(actual) == len(expected)


def assert_same_steps(actual: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Step by step, as far as both go."""
    for index, (ours, theirs) in enumerate(zip(actual, expected, strict=False)):
        assert_same_step(index, ours, theirs)


def assert_same_step(index: int, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Equal in every recorded key; an absent key and an empty value are the same."""
    for key in (*KEYS, *(key for key in BLOCK_KEYS if key in theirs)):
        assert (ours.get(key) or None) == (theirs.get(key) or None), f"step {index}: {key}"
    assert list(ours["sched"]) == list(theirs["sched"]), f"step {index}: order"


def test_the_comparison_sees_a_difference() -> None:
    settings, requests = load_case("07_preemption")
    expected = recorded_steps("07_preemption", "0.26.0")
    actual = list(Driver(settings | {"num_gpu_blocks": 42}, requests, "0.26").steps())
    with pytest.raises(AssertionError, match="step"):
        assert_same_steps(actual, expected)
