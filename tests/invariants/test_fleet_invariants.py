"""What a fleet keeps whatever happens to its replicas; the engines check their own invariants meanwhile.

F1  Conservation: every request ends exactly once: finished, refused, or lost and counted.
F2  Causality: arrival <= scheduled < first token <= finish; the steps of a replica do not overlap.
F3  A replica that is down makes no step and holds no KV: it comes back with an empty cache.
F4  Tokens: the steps yield those of the finished requests and those that were thrown away.
F5  A request is lost only when it is asked for, or when no replica is left.
F6  The same scenario gives the same bytes.
"""

from __future__ import annotations

from itertools import pairwise
from math import isnan
from typing import Literal

import numpy as np
from checked_scheduler import CheckedScheduler
from engine_cases import MOST_STEPS, TICK_S, Case, WindowLaw, cases
from engine_log import rows_of
from hypothesis import given, settings
from hypothesis import strategies as st

from servesim.analysis.timeline import KV_CLASSES, timeline
from servesim.config.fleet import AutoscalerConfig, FailureConfig, FleetConfig
from servesim.config.scenario import Router
from servesim.engine.disaggregation import DecodeScheduler, PrefillScheduler
from servesim.engine.events import Log
from servesim.engine.fleet import Replica, Site, simulate_fleet
from servesim.engine.handover import KvPort
from servesim.engine.router import build_route
from servesim.engine.scheduler import Scheduler, SchedulerLimits
from servesim.engine.versions import RULES
from servesim.workload.request import Request

ROUTERS: tuple[Router, ...] = (
    "round-robin",
    "random",
    "least-outstanding",
    "least-kv",
    "prefix-affinity",
)


@st.composite
def failures(draw: st.DrawFn, replicas: int) -> tuple[FailureConfig, ...]:
    """For each replica, times up and times down in turn; the last failure may be for ever."""
    found = []
    for number in range(replicas):
        now = 0
        for _ in range(draw(st.integers(0, 3))):
            now += draw(st.integers(0, 600))
            down = draw(st.one_of(st.none(), st.integers(1, 600)))
            found.append(
                FailureConfig(
                    replica=number, at_s=now * TICK_S, down_s=None if down is None else down * TICK_S
                )
            )
            if down is None:
                break
            now += down
    return tuple(found)


class Served:
    """A case served by several equal replicas, with the schedulers that did it."""

    def __init__(
        self, case: Case, router: Router, replicas: int, fleet: FleetConfig, num_at_begin: int | None = None
    ) -> None:
        self.schedulers: list[CheckedScheduler] = []

        def make() -> Replica:
            scheduler = CheckedScheduler(case.limits, RULES[case.version], case.kv(), case.law.windows)
            self.schedulers.append(scheduler)
            return Replica(scheduler, case.law)

        def stop() -> bool:
            assert all(one.step < MOST_STEPS for one in self.schedulers), "an engine makes no progress"
            return False

        self.log = simulate_fleet(
            case.workload(),
            [Site(make, case.pipeline_depth)] * replicas,
            lambda members: build_route(router, members, 1),
            events=fleet,
            num_at_begin=num_at_begin,
            stop=stop,
        )


@settings(max_examples=300, deadline=None, report_multiple_bugs=False)
@given(st.data(), cases(), st.sampled_from(ROUTERS), st.integers(1, 3), st.sampled_from(["retry", "lose"]))
def test_replicas_fail_and_come_back(
    data: st.DataObject, case: Case, router: Router, replicas: int, in_flight: str
) -> None:
    fleet = FleetConfig(failures=data.draw(failures(replicas)), in_flight=in_flight)
    served = Served(case, router, replicas, fleet)
    log = served.log
    requests, aborted = rows_of(log.requests), rows_of(log.fleet.aborts)
    status = {row["index"]: Log.STATUSES[row["status"]] for row in requests}
    expected = {r.index for r in case.starts} | {after.index for _, after in case.chains}
    _check_conservation(case, status, len(requests), expected)
    for row in requests:
        if not isnan(row["finish_s"]):
            assert row["arrival_s"] <= row["scheduled_s"] < row["first_token_s"] <= row["finish_s"], "F2"
    _check_time(log, replicas)
    outputs = int(log.steps.columns["steps"] @ log.steps.columns["outputs"])
    finished = sum(row["generated_tokens"] for row in requests if status[row["index"]] != "lost")
    assert outputs == finished + sum(row["generated_tokens"] for row in aborted), "F4"
    lost = [index for index, what in status.items() if what == "lost"]
    if in_flight == "retry" and any(
        not any(one.replica == number and one.down_s is None for one in fleet.failures)
        for number in range(replicas)
    ):
        assert not lost, "F5"
    assert int(log.steps.columns["steps"].sum()) == log.counters["steps"], "F4: counters"
    again = Served(case, router, replicas, fleet).log
    for table in ("requests", "steps"):
        columns = getattr(log, table).columns
        for name, values in getattr(again, table).columns.items():
            assert np.array_equal(values, columns[name], equal_nan=values.dtype.kind == "f"), "F6"


def _check_conservation(case: Case, status: dict[int, str], num_rows: int, expected: set[int]) -> None:
    """What follows on a request that nobody could serve any more is never sent."""
    unsent = set[int]()
    for before, after in case.chains:
        if before in unsent or (before in status and status[before] == "lost" and after.index not in status):
            unsent.add(after.index)
    assert num_rows == len(status), "F1: no request twice"
    assert set(status) == expected - unsent, "F1: no request forgotten"
    assert set(status.values()) <= {"finished_stop", "finished_length", "refused", "lost"}, "F1"


def _check_time(log: Log, replicas: int) -> None:
    rows = rows_of(log.steps)
    ends = np.cumsum((0, *log.steps.parts))
    assert len(log.steps.parts) == replicas
    gone = rows_of(log.fleet.failures)
    for number in range(replicas):
        down = [
            (one["failed_s"], np.inf if isnan(one["back_s"]) else one["back_s"])
            for one in gone
            if one["replica"] == number
        ]
        now_s, lives = 0.0, {0}
        for row in rows[ends[number] : ends[number + 1]]:
            assert row["start_s"] >= now_s, "F2: steps overlap"
            count = row["steps"]
            now_s = row["start_s"] + count * row["first_s"] + row["growth_s"] * count * (count - 1) / 2
            begun = [one for one in down if one[0] < row["start_s"]]
            # Two steps may be scheduled when a replica fails: one that runs, and one behind it.
            late = [one for one in begun if row["start_s"] < one[1]]
            assert not late or count == 1, "F3: steps while down"
            life = sum(one[1] <= row["start_s"] for one in down)
            if life not in lives and row["first_s"]:  # a step that takes no time may be of the life before
                lives.add(life)
                assert row["kv_cached"] == 0, "F3: it comes back with an empty cache"
                assert row["kv_tokens"] <= row["prefill_tokens"] + row["decodes"], "F3"


@settings(max_examples=200, deadline=None, report_multiple_bugs=False)
@given(
    cases(),
    st.sampled_from(ROUTERS),
    st.integers(1, 3),
    st.integers(1, 6),
    st.tuples(st.integers(20, 400), st.integers(0, 400), st.integers(0, 400)),
)
def test_replicas_come_and_go(
    case: Case, router: Router, most: int, target: int, times: tuple[int, int, int]
) -> None:
    """F1 and F4, and: a replica computes only while it is paid for and up, and at least one always serves."""
    interval_s, startup_s, cooldown_s = (ticks * TICK_S for ticks in times)
    rule = AutoscalerConfig(
        max_replicas=most, target=target, interval_s=interval_s, startup_s=startup_s, cooldown_s=cooldown_s
    )
    served = Served(case, router, most, FleetConfig(autoscaler=rule), num_at_begin=1)
    log = served.log
    assert log.fleet is not None
    requests, spans = rows_of(log.requests), rows_of(log.fleet.spans)
    expected = [r.index for r in case.starts] + [after.index for _, after in case.chains]
    assert sorted(row["index"] for row in requests) == sorted(expected), "F1"
    generated = sum(row["generated_tokens"] for row in requests)
    assert int(log.steps.columns["steps"] @ log.steps.columns["outputs"]) == generated, "F4"
    ends = np.cumsum((0, *log.steps.parts))
    for number in range(most):
        mine = [one for one in spans if one["replica"] == number]
        for row in rows_of(log.steps)[ends[number] : ends[number + 1]]:
            assert any(
                one["ready_s"] <= row["start_s"] and not one["gone_s"] < row["start_s"] for one in mine
            ), "a step of a replica that is not there"
    assert any(isnan(one["gone_s"]) for one in spans), "one is there at the end"
    for one in spans:
        assert one["ready_s"] == one["ordered_s"] + (startup_s if one["ordered_s"] else 0)


def test_a_replica_that_is_wanted_again_is_not_given_back() -> None:
    """The look that would give it back, as it is without requests, finds that two are needed."""
    at_ticks = {0: 0, 1: 150, 2: 150, 3: 150, 4: 220}  # the looks are at 100, 200, ...
    starts = tuple(Request(index, f"r{index}", at * TICK_S, 1, 40) for index, at in at_ticks.items())
    case = Case(
        SchedulerLimits(8, 64, 64), version="0.26", allocator=None, num_blocks=99, block_size=4,
        caching=False, pipeline_depth=1, law=WindowLaw(), starts=starts,
    )  # fmt: skip
    rule = AutoscalerConfig(
        max_replicas=2, target=2, interval_s=100 * TICK_S, startup_s=50 * TICK_S, cooldown_s=0
    )
    log = Served(case, "least-outstanding", 2, FleetConfig(autoscaler=rule), num_at_begin=2).log
    assert log.requests.parts == (4, 1), "closed at 100, open again from 200 on"
    [second] = [one for one in rows_of(log.fleet.spans) if one["replica"] == 1 and one["ordered_s"] == 0]
    assert not second["gone_s"] <= 220 * TICK_S


# ---- prompts and outputs computed by different replicas -----------------------------------------------


def handed_over(case: Case, router: Router, sizes: tuple[int, int]) -> tuple[Log, list[Scheduler]]:
    """A case served by prefilling and decoding replicas; the link passes a token per tick and port."""
    schedulers: list[Scheduler] = []

    def make(kind: type[Scheduler]) -> Replica:
        schedulers.append(kind(case.limits, RULES[case.version], case.kv(), case.law.windows))
        return Replica(schedulers[-1], case.law)

    def site(serves: Literal["prefill", "decode"]) -> Site:
        kind = PrefillScheduler if serves == "prefill" else DecodeScheduler
        return Site(lambda: make(kind), case.pipeline_depth, serves, 1.0, KvPort(1 / TICK_S, 1.0))

    def stop() -> bool:
        assert all(one.step < MOST_STEPS for one in schedulers), "an engine makes no progress"
        return False

    log = simulate_fleet(
        case.workload(),
        [site("prefill")] * sizes[0] + [site("decode")] * sizes[1],
        lambda members: build_route(router, members, 1),
        events=FleetConfig(),
        link_latency_s=5 * TICK_S,
        stop=stop,
    )
    return log, schedulers


@settings(max_examples=300, deadline=None, report_multiple_bugs=False)
@given(
    cases(paged=True, priority_policy=False, law=WindowLaw(base=3)),
    st.sampled_from(ROUTERS),
    st.tuples(st.integers(1, 2), st.integers(1, 2)),
)
def test_prompts_are_handed_over(case: Case, router: Router, sizes: tuple[int, int]) -> None:
    """F1, F2, F4 and F6, and: a transfer follows its prompt and precedes its first token, one at a time."""
    log, schedulers = handed_over(case, router, sizes)
    assert log.fleet is not None
    requests, transfers = rows_of(log.requests), rows_of(log.fleet.transfers)
    assert sorted(row["index"] for row in requests) == sorted(
        [r.index for r in case.starts] + [after.index for _, after in case.chains]
    ), "F1"
    assert {Log.STATUSES[row["status"]] for row in requests} <= {
        "finished_stop",
        "finished_length",
        "refused",
    }, "F1"
    times = {row["index"]: row for row in transfers}
    assert len(times) == len(transfers), "F1: one transfer for a request"
    for row in requests:
        if Log.STATUSES[row["status"]] == "refused":
            assert row["index"] not in times
            continue
        most = case.limits.max_model_len - row["prompt_tokens"]
        assert row["generated_tokens"] == min(row["output_tokens"], most), "F4"
        assert row["arrival_s"] <= row["scheduled_s"] < row["first_token_s"] <= row["finish_s"], "F2"
        if (moved := times.get(row["index"])) is not None:
            assert row["scheduled_s"] < moved["prefilled_s"] <= moved["asked_s"], "F2"
            assert moved["asked_s"] <= moved["begun_s"] < moved["done_s"] < row["first_token_s"], "F2"
            assert 0 < moved["num_tokens"] <= row["prompt_tokens"]
    for side in ("source", "target"):
        for number in {row[side] for row in transfers}:
            mine = sorted((row["begun_s"], row["done_s"]) for row in transfers if row[side] == number)
            assert all(a[1] <= b[0] for a, b in pairwise(mine)), "one transfer at a time"
    _check_what_idle_replicas_hold(case, log)
    generated = sum(row["generated_tokens"] for row in requests)
    assert int(log.steps.columns["steps"] @ log.steps.columns["outputs"]) == generated, "F4"
    for edge in ("kv", "end_kv"):
        classes = [log.steps.columns[f"{edge}_{name}"] for name in KV_CLASSES]
        assert min((int(one.min()) for one in classes if len(one)), default=0) >= 0, "the classes of the pool"
        assert set(np.sum(classes, axis=0).tolist()) <= {(case.num_blocks - 1) * case.block_size}
    for scheduler in schedulers:
        assert scheduler.usage()[:4] == (0, 0, 0, 0), "memory is given back"
        assert not scheduler.running
        assert not scheduler.waiting
    again = handed_over(case, router, sizes)[0]
    for name, values in again.requests.columns.items():
        assert np.array_equal(values, log.requests.columns[name], equal_nan=values.dtype.kind == "f"), "F6"


def _check_what_idle_replicas_hold(case: Case, log: Log) -> None:
    """Prompts from when they are computed, or blocks were found for them, until they have been pulled."""
    prompts = {row["index"]: row["prompt_tokens"] for row in rows_of(log.requests)}
    line = timeline(log.steps, min(log.requests.columns["arrival_s"]))
    for number, part in enumerate(line.parts):
        stays = [
            (row["prefilled_s" if side == "source" else "asked_s"], row["done_s"], prompts[row["index"]])
            for side in ("source", "target")
            for row in rows_of(log.fleet.transfers)
            if row[side] == number
        ]
        held = sum(line.columns[f"kv_{name}"][part] for name in ("tokens", "reserved", "internal"))
        rows = (line.start_s, line.duration_s, line.columns["steps"])
        for begin_s, duration_s, steps, slots in zip(*(of[part] for of in rows), held, strict=True):
            kept = [tokens for first_s, last_s, tokens in stays if first_s <= begin_s < last_s]
            if not steps and duration_s > 0:
                most = sum(-(-tokens // case.block_size) * case.block_size for tokens in kept)
                assert max(kept, default=0) <= slots <= most
