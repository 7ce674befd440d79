"""The decode group and repeated plans change how a schedule is found, never the schedule.

Every case is served twice: looking at each request in each step, and advancing together what can be.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from engine_cases import TICK_S, Case, WindowLaw, cases, run_case
from hypothesis import example, given, settings

from servesim.api import simulate
from servesim.engine.events import Log
from servesim.engine.scheduler import Scheduler, SchedulerLimits
from servesim.engine.state import AdmissionFailure, Plan, RequestState
from servesim.engine.versions import RULES
from servesim.workload.request import Request, Segment


class _Recorder(Scheduler):
    """Writes down who is admitted, preempted and finished in which step."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.decisions: list[tuple[int, str, tuple[int, ...]]] = []

    def plan(self) -> Plan | None:
        return self._note(super().plan())

    def plan_beside_group(self, draining: int, pending: bool) -> Plan | None:
        return self._note(super().plan_beside_group(draining, pending))

    def _note(self, plan: Plan | None) -> Plan | None:
        if plan is not None:
            for what, who in (("admitted", plan.admitted), ("preempted", plan.preempted)):
                if who:
                    self.decisions.append((plan.step, what, tuple(r.request.index for r in who)))
        return plan

    def let_in(self, request: RequestState) -> Any:
        self.decisions.append((self.step, "admitted", (request.request.index,)))
        return super().let_in(request)

    def commit(self, plan: Plan, now_s: float, steps: int = 1) -> Any:
        result = super().commit(plan, now_s, steps)
        if plan.finishing:
            ended = tuple(r.request.index for r in plan.finishing)
            self.decisions.append((plan.last_step, "finished", ended))
        return result

    def commit_group(self, ended: list[RequestState], steps: int, now_s: float) -> None:
        super().commit_group(ended, steps, now_s)
        if ended:
            self.decisions.append((self._committed_step, "finished", tuple(r.request.index for r in ended)))


def serve(case: Case, *, one_by_one: bool) -> tuple[Log, list[tuple[int, str, tuple[int, ...]]]]:
    scheduler = _Recorder(
        case.limits, RULES[case.version], case.kv(), case.law.windows, one_by_one=one_by_one
    )
    log = run_case(case, scheduler)
    return log, scheduler.decisions


def requests_of(log: Log) -> list[tuple[float | None, ...]]:
    """Request rows in the order of their ends, NaN as None."""
    rows = zip(*log.requests.columns.values(), strict=True)
    return [tuple(None if value != value else value for value in row) for row in rows]


STEP = ("steps", "decodes", "prefills", "prefill_tokens", "outputs", "itl_samples", "running", "waiting")
KV = tuple(
    f"kv_{name}"
    for name in ("tokens", "reserved", "internal", "round_up", "holes", "cached", "free", "logical")
)

# Free blocks sink below the watermark and on while the group coasts.
FAILURE = {AdmissionFailure.WATERMARK: AdmissionFailure.MEMORY}


def steps_of(log: Log) -> list[dict[str, float]]:
    """One record per step; of the KV classes, those that the row gives: at its first and its last step."""
    columns = log.steps.columns
    records = []
    for row in zip(*columns.values(), strict=True):
        values = dict(zip(columns, row, strict=True))
        start_s, count = values["start_s"], int(values["steps"])
        for j in range(count):
            duration_s = values["first_s"] + j * values["growth_s"]
            record = {"start_s": start_s, "duration_s": duration_s}
            record |= {name: values[name] for name in STEP[1:]}
            record["preemptions"] = values["preemptions"] if j == 0 else 0
            if j == 0:
                failure = values["admission_failure"]
                record["admission_failure"] = FAILURE.get(failure, failure)
                record |= {name: values[name] for name in (*KV, "context_tokens")}
            elif j == count - 1:
                record |= {name: values[f"end_{name}"] for name in KV}
            records.append(record)
            start_s += duration_s
    return records


def gaps_of(log: Log) -> Counter[float]:
    """All inter-token latencies."""
    gaps = Counter(log.itl_gaps_s.tolist())
    for step in steps_of(log):
        gaps[step["duration_s"]] += int(step["itl_samples"])
    return +gaps


LAST_TOKEN_ON_ITS_WAY = Case(
    # 3 joins the group when it has one token to go, and is preempted while that one is in flight.
    SchedulerLimits(4, 17, 17, enable_chunked_prefill=False, scheduler_reserve_full_isl=False),
    version="0.22", allocator=None, num_blocks=33, block_size=1, caching=True, pipeline_depth=2,
    law=WindowLaw(base=1, per_token=0, per_context=(0,)),
    starts=(
        Request(0, "r0", 0.0, 1, 5, (Segment("a", 1),)),
        Request(1, "r1", 0.0, 8, 6, (Segment("a", 8),)),
        Request(2, "r2", TICK_S, 1, 1, (Segment("a", 1),)),
        Request(3, "r3", TICK_S, 15, 2, (Segment("b", 1), Segment("a", 14))),
    ),
)  # fmt: skip
REFUSED_WHILE_COASTING = Case(
    # 1 is refused in the middle of a run of steps; its user's next request follows it at once.
    SchedulerLimits(1, 17, 17),
    version="0.26", allocator=None, num_blocks=33, block_size=1, caching=False, pipeline_depth=1,
    law=WindowLaw(base=1, per_token=0),
    starts=(Request(0, "r0", 0.0, 1, 3), Request(1, "r1", 5 * TICK_S, 17, 1)),
    chains=((1, Request(2, "r2", 0.0, 1, 1)),),
)  # fmt: skip


@settings(max_examples=400, deadline=None, report_multiple_bugs=False)
@given(cases())
@example(LAST_TOKEN_ON_ITS_WAY)
@example(REFUSED_WHILE_COASTING)
def test_the_schedule_does_not_depend_on_how_it_is_found(case: Case) -> None:
    compare(case)


@settings(max_examples=200, deadline=None, report_multiple_bugs=False)
@given(cases(calm=True))
def test_nor_when_newcomers_find_room(case: Case) -> None:
    compare(case)


def compare(case: Case) -> None:
    fast, fast_decisions = serve(case, one_by_one=False)
    slow, slow_decisions = serve(case, one_by_one=True)
    assert fast_decisions == slow_decisions
    assert requests_of(fast) == requests_of(slow)
    fast_steps, slow_steps = steps_of(fast), steps_of(slow)
    assert len(fast_steps) == len(slow_steps)
    for number, (quick, exact) in enumerate(zip(fast_steps, slow_steps, strict=True)):
        assert (number, quick) == (number, {name: exact[name] for name in quick})
    assert gaps_of(fast) == gaps_of(slow)
    assert fast.counters == slow.counters
    assert fast.end_s == slow.end_s


def _one_by_one(*args: Any, **options: Any) -> Scheduler:
    return Scheduler(*args, **options | {"one_by_one": True})


SHIPPED = {
    "azure-conv-h100": (2.5e9, "workload.trace.max_requests=250", "workload.trace.rate_scale=5"),
    "azure-conv-h100-contiguous": (2.5e9, "workload.trace.max_requests=80", "workload.trace.rate_scale=5"),
    "mooncake-conv-h100": (18e9, "workload.trace.max_requests=40", "workload.trace.rate_scale=3"),
    "poisson-chat": (4.5e9, "workload.num_requests=300"),
    "closed-loop-sharegpt": (1e9, "workload.trace.max_requests=300", "engine.max_model_len=2048"),
}


@pytest.mark.parametrize("scenario", SHIPPED)
def test_the_shipped_scenarios_run_alike_either_way(scenario: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With real step times, so equal but for rounding, and with too little memory."""
    kv_bytes, *overrides = SHIPPED[scenario]
    overrides.append(f"engine.kv_cache_memory_bytes={kv_bytes:.0f}")
    fast = simulate(scenario, overrides=overrides).run.log
    monkeypatch.setattr("servesim.engine.build.Scheduler", _one_by_one)
    slow = simulate(scenario, overrides=overrides).run.log
    assert len(fast.steps) < len(slow.steps) == slow.counters["steps"]
    assert fast.counters == slow.counters
    for name, column in fast.requests.columns.items():
        exact = slow.requests.columns[name].tolist()
        assert column.tolist() == pytest.approx(exact, rel=1e-9, nan_ok=True), name
    for name in ("duration_s", "running", "waiting", "outputs", "itl_samples"):
        quick = [step[name] for step in steps_of(fast)]
        assert quick == pytest.approx([step[name] for step in steps_of(slow)], rel=1e-9), name
