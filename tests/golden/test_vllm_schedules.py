"""The scheduler makes the very steps that the real vLLM made, on recorded workloads and three versions."""

from __future__ import annotations

from typing import Any

import pytest
from recordings import CASES, TRACES, recorded_steps, settings_of

from servesim import api
from step_compare import first_difference

VERSIONS = {"0.22.1": "0.22", "0.26.0": "0.26", "0.33.0": "0.33"}


def traced(case: str, version: str, **changes: Any) -> list[dict[str, Any]]:
    """The steps that servesim makes of a recorded workload."""
    lines = api.trace(
        settings_of(case) | changes, TRACES / case / "requests.jsonl", version=version, blocks=True
    )
    return [line for line in lines if "sched" in line]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("case", CASES)
def test_every_step_is_vllms(case: str, version: str) -> None:
    steps, recorded = traced(case, VERSIONS[version]), recorded_steps(case, version)
    assert first_difference(steps, recorded) is None
    assert [step["start"] for step in steps] == [step.get("start", step["t"]) for step in recorded]


def test_the_comparison_sees_a_difference() -> None:
    changed = traced("07_preemption", "0.26", num_gpu_blocks=42)
    difference = first_difference(changed, recorded_steps("07_preemption", "0.26.0"))
    assert difference is not None
    assert "blocks" in difference
