"""The schedulers of the literature: the engine's invariants, and what makes each of them what it is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from checked_scheduler import CheckedScheduler
from engine_cases import Case, cases, run_case
from engine_log import check_log, rows_of
from hypothesis import assume, given, settings

from servesim.engine.events import Log
from servesim.engine.orca import OrcaScheduler
from servesim.engine.prefill_first import PrefillFirstScheduler
from servesim.engine.state import Plan, RequestState, Status
from servesim.engine.static_batching import StaticScheduler
from servesim.engine.versions import RULES


class CheckedOrca(CheckedScheduler, OrcaScheduler):
    """Whole prompts join as soon as they fit."""

    def plan(self) -> Plan | None:
        plan = super().plan()
        for state, tokens, before in plan.scheduled if plan else ():
            if state in plan.admitted:
                assert before + tokens == state.num_tokens, "a prompt in pieces"
        return plan


class CheckedPrefillFirst(CheckedScheduler, PrefillFirstScheduler):
    """A step admits or decodes, and admits whenever it can."""

    def plan(self) -> Plan | None:
        plan = super().plan()
        if plan is not None and plan.admitted:
            assert [state for state, _, _ in plan.scheduled] == plan.admitted, (
                "somebody decodes beside prompts"
            )
            assert not plan.group_size
        return plan


class CheckedStatic(CheckedScheduler, StaticScheduler):
    """Nobody joins a batch, and nobody leaves it before its end."""

    def plan(self) -> Plan | None:
        before = list(self.running)
        plan = super().plan()
        if plan is not None:
            assert not (before and plan.admitted), "somebody joined a batch"
            assert not plan.preempted
            assert plan.finishing in ([], list(self.running)), "somebody left before the batch ended"
        return plan

    def _check_pool(self, computed: dict[RequestState, int]) -> None:
        usage, kv = self.usage(), self.kv
        assert min(usage) >= 0, "2: a class is negative"
        assert sum(usage) - usage.logical == kv.num_slots, "2: the classes add up"
        done = [state for state in computed if self._has_ended(state)]
        assert usage.tokens == sum(c for s, c in computed.items() if s not in done), "3: KV tokens"
        waste = sum(state.sequence.wanted - state.final_slots for state in computed)
        assert usage.internal == waste + sum(state.final_slots for state in done), "3: waste"

    def _check_head_is_blocked(self, plan: Plan) -> None:
        if plan.admitted:
            super()._check_head_is_blocked(plan)


WHOLE_PROMPTS = {"enable_chunked_prefill": False, "long_prefill_token_threshold": 0, "pipeline_depth": 1}


def serve(case: Case, kind: Any, **options: Any) -> tuple[Log, Any]:
    scheduler = kind(case.limits, RULES[case.version], case.kv(), case.law.windows, **options)
    return run_case(case, scheduler), scheduler


def served_of(log: Log) -> list[dict[str, Any]]:
    return [row for row in rows_of(log.requests) if row["status"] != Status.REFUSED]


def table_of(log: Log) -> list[dict[str, Any]]:
    """The requests' rows without times that were not reached."""
    return [{name: value for name, value in row.items() if value == value} for row in rows_of(log.requests)]


@pytest.mark.parametrize("one_by_one", [False, True])
@pytest.mark.parametrize("kind", [CheckedOrca, CheckedPrefillFirst])
@settings(max_examples=120, deadline=None, report_multiple_bugs=False)
@given(case=cases(**WHOLE_PROMPTS))
def test_the_invariants_hold_step_by_step(kind: Any, one_by_one: bool, case: Case) -> None:
    log, scheduler = serve(case, kind, one_by_one=one_by_one)
    check_log(case, log)
    assert not scheduler.running
    assert not scheduler.waiting
    assert scheduler.usage()[:4] == (0, 0, 0, 0), "2: memory is given back"


@pytest.mark.parametrize("kind", [CheckedOrca, CheckedPrefillFirst])
@settings(max_examples=120, deadline=None, report_multiple_bugs=False)
@given(case=cases(**WHOLE_PROMPTS))
def test_advancing_together_changes_nothing(kind: Any, case: Case) -> None:
    fast, slow = (serve(case, kind, one_by_one=one_by_one)[0] for one_by_one in (False, True))
    times = [
        [{k: v for k, v in row.items() if v == v} for row in rows_of(log.requests)] for log in (fast, slow)
    ]
    assert times[0] == times[1]
    assert fast.counters == slow.counters
    assert sorted(fast.itl_gaps_s) == sorted(slow.itl_gaps_s)


@settings(max_examples=200, deadline=None, report_multiple_bugs=False)
@given(case=cases(paged=False, **WHOLE_PROMPTS))
def test_a_static_batch_begins_and_ends_as_one(case: Case) -> None:
    log, scheduler = serve(case, CheckedStatic)
    assert not scheduler.running
    assert not scheduler.waiting
    assert scheduler.usage()[:4] == (0, 0, 0, 0), "2: memory is given back"
    batches: dict[float, list[dict[str, Any]]] = {}
    for row in served_of(log):
        assert row["generated_tokens"] == min(
            row["output_tokens"], case.limits.max_model_len - row["prompt_tokens"]
        )
        batches.setdefault(row["scheduled_s"], []).append(row)
    for batch in batches.values():
        assert len({row["finish_s"] for row in batch}) == 1
        assert len({row["first_token_s"] for row in batch}) == 1
    longest = [max(row["generated_tokens"] for row in batch) for batch in batches.values()]
    assert log.counters["steps"] == sum(longest)
    rows = rows_of(log.steps)
    seats = sum(len(batch) * steps for batch, steps in zip(batches.values(), longest, strict=True))
    assert sum(row["decodes"] + row["prefills"] for row in rows) == seats, "an ended request stays a row"
    assert sum(row["outputs"] for row in rows) == sum(row["generated_tokens"] for row in served_of(log))


@settings(max_examples=60, deadline=None, report_multiple_bugs=False)
@given(case=cases(paged=False, **WHOLE_PROMPTS))
def test_with_equal_requests_static_and_orca_batches_are_the_same(case: Case) -> None:
    """All there from the begin: what makes continuous batching better is that lengths differ."""
    prompt, output = case.starts[0].prompt_tokens, case.starts[0].output_tokens
    assume(prompt + output <= case.limits.max_model_len)
    equal = tuple(
        request._replace(arrival_s=0.0, prompt_tokens=prompt, output_tokens=output, prompt=(), priority=0)
        for request in case.starts
    )
    alike = replace(case, starts=equal, chains=())
    static, orca = (serve(alike, kind)[0] for kind in (CheckedStatic, CheckedOrca))
    assert static.counters["steps"] == orca.counters["steps"]
    assert static.end_s == orca.end_s
