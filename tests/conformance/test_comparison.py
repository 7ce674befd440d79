"""The conformance suite itself, without vLLM: its comparison sees differences, its workloads are sound."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from conformance.campaign import difference, features, our_steps, run
from conformance.vllm_process import rules_for
from conformance.workloads import Workload
from servesim import api
from step_compare import KEYS, first_difference

WORKLOAD: Workload = (
    {
        "num_gpu_blocks": 9, "block_size": 4, "max_model_len": 32, "max_num_batched_tokens": 16,
        "max_num_seqs": 4, "enable_chunked_prefill": True, "enable_prefix_caching": True, "watermark": 0.0,
        "long_prefill_token_threshold": 0, "policy": "fcfs", "scheduler_reserve_full_isl": True,
        "async_scheduling": False,
    },
    [
        {"id": f"r{i}", "segments": [["a", 8], [f"u{i}", 3]], "output_len": 12, "arrival_step": 2 * i}
        for i in range(4)
    ],
)  # fmt: skip


def steps(workload: Workload = WORKLOAD, version: str = "0.26") -> list[dict[str, Any]]:
    return list(our_steps(workload, version))


def test_equal_traces_have_no_difference() -> None:
    made = steps()
    assert first_difference(made, steps()) is None
    assert difference(WORKLOAD, "0.26", made) is None
    seen = features(WORKLOAD, made)
    assert seen["with preemption"]
    assert seen["with eviction"]
    assert seen["with prefix hits"]


@pytest.mark.parametrize("key", KEYS)
def test_every_key_is_compared(key: str) -> None:
    theirs = steps()
    index = len(theirs) // 2
    theirs[index] = {**theirs[index], key: "something else"}
    found = difference(WORKLOAD, "0.26", theirs)
    assert found is not None
    assert found.startswith(f"step {index}: {key}: ")


def test_order_and_length_are_compared() -> None:
    theirs = steps()
    index, step = next((i, s) for i, s in enumerate(theirs) if len(s["sched"]) > 1)
    reordered = {**step, "sched": dict(reversed(step["sched"].items()))}
    assert "order" in str(difference(WORKLOAD, "0.26", [*theirs[:index], reordered, *theirs[index + 1 :]]))
    assert "only servesim goes on" in str(difference(WORKLOAD, "0.26", theirs[:-1]))
    assert "only vLLM goes on" in str(difference(WORKLOAD, "0.26", [*theirs, theirs[-1]]))


def test_a_request_that_never_fits_is_told_as_such() -> None:
    settings, requests = WORKLOAD
    stuck = ({**settings, "num_gpu_blocks": 2}, requests)
    assert steps(stuck)[-1] == {"stuck": True}
    assert difference(stuck, "0.26", steps(stuck)) is None


def test_a_campaign_against_itself_finds_nothing() -> None:
    counts, mismatches = run(steps, "0.26", seed=1, num_workloads=70)
    assert not mismatches
    assert counts["workloads"] == 70
    assert counts["steps"] > 700
    assert min(counts["with preemption"], counts["with eviction"], counts["with prefix hits"]) > 3
    again, _ = run(steps, "0.26", seed=1, num_workloads=70)
    assert counts == again


def test_a_campaign_finds_a_changed_rule_and_shrinks_it(tmp_path: Path) -> None:
    counts, mismatches = run(lambda workload: steps(workload, "0.22"), "0.26", seed=3, num_workloads=50)
    assert counts["mismatches"] == len(mismatches) > 0
    found = min(mismatches, key=lambda mismatch: len(mismatch.workload[1]))
    assert "evicted" in found.difference or "hit" in found.difference or "sched" in found.difference
    assert len(found.workload[1]) <= 4
    files = found.save(tmp_path)
    with files[0].open() as settings:
        assert json.load(settings) == found.workload[0]
    ours, theirs = (list(api.trace(*files, version=version)) for version in ("0.26", "0.22"))
    assert first_difference(ours[1:-1], theirs[1:-1]) == found.difference


def test_releases_of_vllm_have_rules() -> None:
    releases = ("0.20.2", "0.22.1", "0.24.0", "0.26.0", "0.32.0", "0.33.0")
    assert Counter(map(rules_for, releases)) == {"0.22": 2, "0.26": 2, "0.32": 1, "0.33": 1}
