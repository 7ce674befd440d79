"""The engine's numbered invariants (checked_scheduler.py, engine_log.py), checked after every step."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
from checked_scheduler import CheckedScheduler
from engine_cases import Case, ScriptedWorkload, WindowLaw, cases, run_case
from engine_log import check_log
from hypothesis import given, settings
from hypothesis import strategies as st

from servesim.api import simulate
from servesim.engine.fleet import Replica, Site, simulate_fleet
from servesim.engine.loop import simulate as simulate_engine
from servesim.engine.router import build_route
from servesim.engine.scheduler import Scheduler, SchedulerLimits
from servesim.engine.versions import RULES
from servesim.kv.paged import PagedKVCache
from servesim.workload.request import Request


@settings(max_examples=300, deadline=None, report_multiple_bugs=False)
@given(cases() | cases(calm=True), st.booleans())
def test_the_invariants_hold_after_every_step(case: Case, one_by_one: bool) -> None:
    scheduler = CheckedScheduler(
        case.limits, RULES[case.version], case.kv(), case.law.windows, one_by_one=one_by_one
    )
    log = run_case(case, scheduler)
    check_log(case, log)
    assert scheduler.checks > scheduler.num_arrived
    assert not scheduler.running
    assert not scheduler.waiting
    assert scheduler.usage()[:4] == (0, 0, 0, 0), "2: memory is given back"


@pytest.mark.parametrize("replicas", [1, 2])
def test_any_number_of_requests_may_be_refused_in_turn(replicas: int) -> None:
    """Each is sent when the one before is turned away, at the same instant, and one in the end is served."""
    count, law = 3000, WindowLaw()
    turns = [Request(index, f"r{index}", 0.0, 20 if index < count else 5, 2) for index in range(count + 1)]
    workload = ScriptedWorkload(turns[:1], dict(enumerate(turns[1:])))

    def scheduler() -> Scheduler:
        return Scheduler(
            SchedulerLimits(2, 20, 20), RULES["0.26"], PagedKVCache(9, 4, enable_prefix_caching=False)
        )

    if replicas == 1:
        log = simulate_engine(workload, scheduler(), law)
    else:
        sites = [Site(lambda: Replica(scheduler(), law))] * replicas
        log = simulate_fleet(workload, sites, lambda members: build_route("round-robin", members, 1))
    assert log.requests.columns["status"].tolist().count(2) == count
    assert log.requests.columns["generated_tokens"].sum() == 2


TRACE = "workload.trace"
REAL = {
    "azure-conv-h100": (2.5e9, f"{TRACE}.max_requests=300", f"{TRACE}.rate_scale=5"),
    "azure-conv-h100-contiguous": (2.5e9, f"{TRACE}.max_requests=300", f"{TRACE}.rate_scale=5"),
    "mooncake-conv-h100": (18e9, f"{TRACE}.max_requests=80", f"{TRACE}.rate_scale=3"),
    "poisson-chat": (4.5e9, "workload.num_requests=400", "engine.async_scheduling=false"),
    "closed-loop-sharegpt": (2.5e9, f"{TRACE}.max_requests=300", "model=gemma-2-27b"),
}


@pytest.mark.parametrize("scenario", REAL)
def test_the_invariants_hold_in_the_shipped_scenarios(scenario: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a fraction of the memory, so that requests wait and are preempted."""
    made: list[CheckedScheduler] = []

    class Kept(CheckedScheduler):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            made.append(self)

    monkeypatch.setattr("servesim.engine.build.Scheduler", Kept)
    kv_bytes, *overrides = REAL[scenario]
    overrides.append(f"engine.kv_cache_memory_bytes={kv_bytes:.0f}")
    log = simulate(scenario, overrides=overrides).run.log
    assert made[0].checks > len(log.steps)
    assert made[0].num_ended + made[0].num_refused == len(log.requests)
    assert max(log.steps.columns["waiting"]) > 0


DIGEST = """
import hashlib
from servesim import simulate
log = simulate("{scenario}", overrides={overrides}).run.log
columns = (*log.requests.columns.values(), *log.steps.columns.values(), log.itl_gaps_s)
print(hashlib.sha256(b"".join(column.tobytes() for column in columns)).hexdigest(), log.counters)
"""
PRESSED = ["engine.num_gpu_blocks_override=600", "engine.max_model_len=8192"]


def digest(scenario: str, *overrides: str, hash_seed: str) -> str:
    """The log of a run in a process of its own, whose sets and dictionaries hash in their own way."""
    code = DIGEST.format(scenario=scenario, overrides=[*PRESSED, *overrides])
    environment = os.environ | {"PYTHONHASHSEED": hash_seed}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    return result.stdout


def test_the_same_seed_gives_the_same_bytes() -> None:
    """15: one seed, one log; another seed, another log."""
    few = ("workload.num_requests=300",)
    first = digest("poisson-chat", *few, hash_seed="1")
    assert first == digest("poisson-chat", *few, hash_seed="2")
    assert first != digest("poisson-chat", *few, "seed=2", hash_seed="1")
