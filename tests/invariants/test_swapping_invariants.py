"""Swapping and requests of several sequences, in engines drawn to be difficult.

After every step: whoever is swapped out lies in the swap space with all its blocks, the blocks of GPU and
host add up, nobody new is admitted while somebody is out, and the classes of the pool add up. At the end
every request has all its tokens, and nothing is left anywhere.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from engine_cases import Case, cases, run_case
from engine_log import check_log, rows_of
from hypothesis import given, settings
from hypothesis import strategies as st

from servesim.engine.beams import BeamSearch
from servesim.engine.branching import BranchingScheduler
from servesim.engine.router import outstanding
from servesim.engine.scheduler import Scheduler
from servesim.engine.state import Plan, RequestState, Status
from servesim.engine.swapping import SwappingScheduler
from servesim.engine.versions import RULES
from servesim.kv.forked import ForkedKVCache
from servesim.kv.host import SwappableKVCache, SwapSpace
from servesim.workload.request import Request

swapping_cases = cases(paged=True, caching=False, pipeline_depth=1, priority_policy=False)
spaces = st.builds(SwapSpace, st.integers(0, 60), st.integers(0, 20))
seen: Counter[str] = Counter()  # that the cases drawn do what they are for


class _Checked(SwappingScheduler):
    """Checks the swap space around every plan."""

    pool_slots = num_here = 0

    def add(self, request: Request) -> RequestState:
        state = super().add(request)
        self.num_here += state.status is Status.WAITING
        return state

    def _mark_finished(self, request: RequestState) -> None:
        super()._mark_finished(request)
        self.num_here -= 1

    def plan(self) -> Plan | None:
        out = list(self._swapped)
        plan = super().plan()
        if plan is not None:
            still_out = [request for request in out if request in self._swapped]
            assert out[len(out) - len(still_out) :] == still_out, "who came back was out the longest"
            if still_out:
                assert {r.admission for r in plan.admitted} <= {r.admission for r in out}, (
                    "admitted past them"
                )
            seen["swapped out"] += len(self._swapped) > len(still_out)
            seen["swapped in"] += len(still_out) < len(out)
        self._check()
        return plan

    def commit(self, plan: Plan, now_s: float, steps: int = 1) -> tuple[int, list[float]]:
        result = super().commit(plan, now_s, steps)
        usage = self.usage()
        assert sum(usage) - usage.logical == self.pool_slots
        return result

    def _check(self) -> None:
        assert outstanding(self) == self.num_here, "who is swapped out has not ended"
        usage = self.usage()
        assert min(usage) >= 0
        assert sum(usage) - usage.logical == self.pool_slots
        assert set(self.space._held) == set(self._swapped)
        assert sum(self.space.used) == sum(map(sum, self.space._held.values()))
        assert self.num_swapped_out - self.num_swapped_in == sum(self.space.used), "blocks on the host"
        assert not set(self._swapped) & (self.running.keys() | set(self.waiting.unordered()))
        for request in self._swapped:
            blocks = -(-request.num_computed_tokens // self.kv.block_size)
            if isinstance(self.kv, ForkedKVCache):
                assert sum(self.space._held[request]) == request.sequence.num_blocks
            else:
                assert sum(self.space._held[request]) >= blocks, "all its blocks are there"


class _CheckedBranches(BranchingScheduler, _Checked):
    """The same for requests of several sequences."""


def serve(case: Case, space: SwapSpace, *, one_by_one: bool) -> Any:
    kv = SwappableKVCache(
        case.num_blocks,
        case.block_size,
        enable_prefix_caching=False,
        blank_blocks_first=RULES[case.version].blank_blocks_first,
    )
    scheduler = _Checked(
        case.limits, RULES[case.version], kv, case.law.windows, space=space, one_by_one=one_by_one
    )
    scheduler.pool_slots = (case.num_blocks - 1) * case.block_size
    log = run_case(case, scheduler)
    assert not scheduler.unfinished()
    assert not any(space.used)
    return log


def test_what_is_swapped_out_comes_back() -> None:
    seen.clear()
    _swap_and_return()
    assert min(seen["swapped out"], seen["swapped in"]) >= 5, seen


@settings(max_examples=200, deadline=None, report_multiple_bugs=False)
@given(swapping_cases, spaces)
def _swap_and_return(case: Case, space: SwapSpace) -> None:
    log = serve(case, space, one_by_one=True)
    check_log(case, log)
    assert log.counters["swapped_in_blocks"] == log.counters["swapped_out_blocks"]
    fast = serve(case, SwapSpace(*space.size), one_by_one=False)
    assert str(rows_of(fast.requests)) == str(rows_of(log.requests))  # as text: NaN equals NaN
    assert fast.counters == log.counters


@settings(max_examples=100, deadline=None, report_multiple_bugs=False)
@given(swapping_cases)
def test_without_a_swap_space_everybody_recomputes(case: Case) -> None:
    log = serve(case, SwapSpace(0, 0), one_by_one=False)
    plain = run_case(case, Scheduler(case.limits, RULES[case.version], case.kv(), case.law.windows))
    assert rows_of(log.steps) == rows_of(plain.steps)
    assert log.counters["preemptions_recomputed"] == plain.counters["preemptions"]


def test_all_sequences_of_a_request_come_out() -> None:
    seen.clear()
    _serve_branches()
    assert min(seen["swapped out"], seen["preempted groups"]) >= 5, seen


@settings(max_examples=200, deadline=None, report_multiple_bugs=False)
@given(swapping_cases, spaces, st.integers(1, 3), st.booleans())
def _serve_branches(case: Case, space: SwapSpace, width: int, beam: bool) -> None:
    """The pool is as many times larger as there are sequences, so that every request fits."""
    num_blocks = (case.num_blocks - 1) * width + width
    limits = case.limits._replace(
        max_num_seqs=case.limits.max_num_seqs * width,
        max_num_batched_tokens=case.limits.max_num_batched_tokens + width,
    )
    kv = ForkedKVCache(num_blocks, case.block_size, width)
    beams = BeamSearch(width, 0.4, 1) if beam else None
    scheduler = _CheckedBranches(limits, RULES[case.version], kv, case.law.windows, space=space, beams=beams)
    scheduler.pool_slots = (num_blocks - 1) * case.block_size
    log = run_case(case, scheduler)
    assert not scheduler.unfinished()
    assert not any(space.used)
    assert kv.num_free_blocks == num_blocks - 1, "no leak"
    served = [row for row in rows_of(log.requests) if row["status"] in (0, 1)]
    outputs = sum(row["steps"] * row["outputs"] for row in rows_of(log.steps))
    assert outputs == width * sum(row["generated_tokens"] for row in served)
    most = case.limits.max_model_len
    assert all(
        row["generated_tokens"] == min(row["output_tokens"], most - row["prompt_tokens"]) for row in served
    )
    seen["preempted groups"] += bool(width > 1 and log.counters["swapped_out_blocks"])
