"""Many random workloads, each run twice and compared step by step; what differs is shrunk to a small case."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import HealthCheck, Phase, given
from hypothesis import seed as with_seed
from hypothesis import settings as hypothesis_settings

from conformance.vllm_process import VllmError
from conformance.workloads import Workload, workloads
from servesim import api
from servesim.errors import ConfigError
from step_compare import first_difference

__all__ = ["BATCH", "Mismatch", "features", "our_steps", "run"]

BATCH = 50
"""Workloads that one run of hypothesis draws; each run stops at its first mismatch and shrinks it."""

Step = dict[str, Any]


class Mismatch(NamedTuple):
    """A small workload on which the two differ, and where they first do."""

    batch: int
    difference: str
    workload: Workload

    def save(self, folder: Path) -> tuple[Path, Path]:
        """Write the files that ``servesim trace`` and the recordings have."""
        folder.mkdir(parents=True, exist_ok=True)
        settings, requests = self.workload
        files = folder / "settings.json", folder / "requests.jsonl"
        files[0].write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        files[1].write_text("".join(json.dumps(r) + "\n" for r in requests), encoding="utf-8")
        return files


class _DifferenceError(AssertionError):
    """Told to hypothesis, so that it shrinks."""


def our_steps(workload: Workload, version: str) -> Iterator[Step]:
    """servesim's steps; a request that can never be admitted ends them with a record that says so."""
    lines = api.trace(*workload, version=version)
    try:
        yield from (line for line in lines if "sched" in line)
    except ConfigError:
        yield {"stuck": True}


def difference(workload: Workload, version: str, theirs: list[Step]) -> str | None:
    """Where servesim's trace leaves the other one."""
    endless = bool(theirs) and "endless" in theirs[-1]
    limit = len(theirs) - 1 if endless else len(theirs) + 1
    ours = [*islice(our_steps(workload, version), limit), *([{"endless": True}] if endless else [])]
    return first_difference(ours, theirs)


def run(
    steps_of: Callable[[Workload], list[Step]],
    version: str,
    *,
    seed: int,
    num_workloads: int,
    speculation: bool | None = False,
    on_batch: Callable[[Counter[str]], None] = lambda counts: None,
) -> tuple[Counter[str], list[Mismatch]]:
    """Compare servesim with ``steps_of``, a batch of workloads after the other.

    Returns counts by feature over all workloads drawn (shrinking not counted), and the mismatches. The same
    seed draws the same workloads as long as nothing differs.
    """
    counts: Counter[str] = Counter()
    mismatches: list[Mismatch] = []
    for batch in range(-(-num_workloads // BATCH)):
        size = min(BATCH, num_workloads - batch * BATCH)
        found = _batch(steps_of, version, seed * 1_000_003 + batch, size, speculation, counts)
        if found is not None:
            mismatches.append(Mismatch(batch, *found))
        on_batch(counts)
    counts["mismatches"] = len(mismatches)
    return counts, mismatches


def _batch(
    steps_of: Callable[[Workload], list[Step]],
    version: str,
    seed: int,
    size: int,
    speculation: bool | None,
    counts: Counter[str],
) -> tuple[str, Workload] | None:
    smallest: tuple[str, Workload] | None = None

    @with_seed(seed)
    @hypothesis_settings(
        max_examples=size,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        print_blob=False,
    )
    @given(workloads(speculation=speculation))
    def compare(workload: Workload) -> None:
        nonlocal smallest
        try:
            theirs = steps_of(workload)
        except VllmError:
            counts["failed in vLLM"] += smallest is None
            return
        if smallest is None:
            counts.update(features(workload, theirs))
        found = difference(workload, version, theirs)
        if found is not None:
            smallest = (found, workload)
            raise _DifferenceError(found)

    try:
        compare()
    except _DifferenceError:
        return smallest
    return None


def features(workload: Workload, steps: list[Step]) -> dict[str, int]:
    """What a workload exercised, each feature 1 or 0, and its number of steps."""
    settings, requests = workload
    groups = settings.get("kv_groups") or []
    drafted = sum(sum(step.get("draft", {}).values()) for step in steps)
    accepted = sum(sum(step.get("accepted", {}).values()) for step in steps)
    seen = {
        "with preemption": any(step.get("preempted") for step in steps),
        "with eviction": any(step.get("evicted") for step in steps),
        "with prefix hits": any(any(step.get("new", {}).values()) for step in steps),
        "with hits after preemption": any(any(step.get("resumed", {}).values()) for step in steps),
        "with speculation": drafted > 0,
        "with rejected drafts": accepted < drafted,
        "async": settings["async_scheduling"],
        "priority": settings["policy"] == "priority",
        "without chunked prefill": not settings["enable_chunked_prefill"],
        "long-prefill threshold": settings["long_prefill_token_threshold"] > 0,
        "watermark": settings["watermark"] > 0,
        "without admission gate": not settings["scheduler_reserve_full_isl"],
        "sliding window": bool(groups),
        "hybrid groups": len(groups) > 1,
        "parallel samples": any(request.get("n", 1) > 1 for request in requests),
        "continues an output": any(name.startswith("out:") for r in requests for name, _ in r["segments"]),
        "stopped by max_model_len": any(
            sum(n for _, n in r["segments"]) + r["output_len"] > settings["max_model_len"] for r in requests
        ),
        "arrivals by time": "arrival" in requests[0],
        "cut off while endless": bool(steps) and "endless" in steps[-1],
        "stuck": bool(steps) and "stuck" in steps[-1],
    }
    return {"workloads": 1, "steps": len(steps), **{name: int(is_so) for name, is_so in seen.items()}}
