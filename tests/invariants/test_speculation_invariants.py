"""Speculative decoding on the drawn engines: its invariants after every step, and the two bounds.

15  Drafts: no more than were proposed are scheduled, none for a part of a prompt; those accepted come out.
16  Verification: what is computed and not in flight is every token but the newest, whose KV comes later.
17  Slots: a request that runs holds slots for what it computes, and no KV class is ever negative.
"""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any

import pytest
from engine_cases import Case, WindowLaw, cases, run_case
from engine_log import KV, rows_of
from hypothesis import given, settings
from hypothesis import strategies as st

from servesim.engine.events import Log
from servesim.engine.scheduler import SchedulerLimits
from servesim.engine.speculation import Speculation, SpeculativeScheduler
from servesim.engine.state import Plan, RequestState
from servesim.engine.versions import RULES
from servesim.kv.paged import PagedKVCache
from servesim.workload.request import Request

speculations = st.builds(
    lambda num_tokens, method: Speculation(
        num_tokens, method != "ngram", method == "eagle", int(method == "draft")
    ),
    st.integers(1, 5),
    st.sampled_from(["ngram", "draft", "eagle"]),
)


class CheckedSpeculation(SpeculativeScheduler):
    """Fails as soon as 15, 16 or 17 does."""

    def plan(self) -> Plan | None:
        plan = super().plan()
        if plan is not None:
            assert plan.shape.num_tokens + len(plan.scheduled) * self._draft_rows <= (
                self.limits.max_num_batched_tokens
            ), "15: the step's budget"
            for request, drafts in plan.drafts.items():
                assert 0 < drafts <= self.speculation.num_tokens, "15: drafts"
                assert request in plan.yielding, "15: drafts of a part of a prompt"
        self.check()
        return plan

    def commit(self, plan: Plan, now_s: float, steps: int = 1) -> tuple[int, list[float]]:
        result = super().commit(plan, now_s, steps)
        for request in self.running:
            if not request.is_prefill_chunk and request.num_output_tokens:
                computed = request.num_computed_tokens - request.num_placeholders
                assert computed == request.num_tokens - 1, "16: verified tokens"
        self.check()
        return result

    def check(self) -> None:
        assert isinstance(self.kv, PagedKVCache)
        size, usage = self.kv.block_size, self.usage()
        assert min(usage) >= 0, "17: a class is negative"
        assert sum(usage) - usage.logical == (self.kv.pool.num_blocks - 1) * size, "17: the classes add up"
        for request in self.running:
            assert request.num_computed_tokens <= request.sequence.num_blocks * size, "17: slots"
            assert request.num_computed_tokens < self.limits.max_model_len, "17: max_model_len"


def serve(case: Case, speculation: Speculation, accept: Any) -> tuple[CheckedSpeculation, Log]:
    rules = RULES[case.version]
    ahead = speculation.reads_hidden_states
    kv = PagedKVCache(
        case.num_blocks,
        case.block_size,
        enable_prefix_caching=case.caching,
        blank_blocks_first=rules.blank_blocks_first,
        hash_lookahead_tokens=int(ahead and rules.hashes_lookahead),
        drop_last_hit=ahead and not rules.hashes_lookahead,
    )
    scheduler = CheckedSpeculation(
        case.limits,
        rules,
        kv,
        case.law.windows,
        speculation=speculation,
        accept=accept,
        asynchronous=case.pipeline_depth == 2,
    )
    return scheduler, run_case(case, scheduler)


def roomy(case: Case) -> Case:
    """A pool for one longest request with its lookahead, and limits that leave a decode its drafts.

    A threshold that cuts the padding of a new decode makes vLLM take back drafts that it never computed.
    """
    threshold = case.limits.long_prefill_token_threshold
    limits = case.limits._replace(
        max_num_batched_tokens=case.limits.max_num_batched_tokens + 8,
        long_prefill_token_threshold=threshold and threshold + 5,
    )
    return replace(case, num_blocks=case.num_blocks + -(-12 // case.block_size), limits=limits)


@settings(max_examples=300, deadline=None, report_multiple_bugs=False)
@given(cases(paged=True), speculations, st.integers(0, 1 << 30), st.sampled_from([0.0, 0.3, 0.7, 0.9, 1.0]))
def test_the_invariants_hold_after_every_step(
    case: Case, speculation: Speculation, seed: int, rate: float
) -> None:
    random = Random(seed)

    def accept(request: RequestState, num_drafts: int, padded: bool) -> int:
        accepted = 0
        while not padded and accepted < num_drafts and random.random() < rate:
            accepted += 1
        return accepted

    case = roomy(case)
    scheduler, log = serve(case, speculation, accept)
    assert not scheduler.running
    assert not scheduler.waiting
    assert scheduler.usage()[:4] == (0, 0, 0, 0), "memory is given back"
    requests, rows = rows_of(log.requests), rows_of(log.steps)
    served = [r for r in requests if Log.STATUSES[r["status"]] != "refused"]
    for row in served:
        most = case.limits.max_model_len
        assert row["arrival_s"] <= row["scheduled_s"] < row["first_token_s"] <= row["finish_s"]
        assert row["generated_tokens"] == min(row["output_tokens"], most - row["prompt_tokens"])
    generated = sum(r["generated_tokens"] for r in served)
    assert sum(row["outputs"] for row in rows) == generated
    gaps = sum(row["itl_samples"] for row in rows) + len(log.itl_gaps_s)
    counters = log.counters
    accepted = counters["spec_decode_num_accepted_tokens"]
    assert generated - len(served) - accepted <= gaps <= generated - len(served), "one gap per output"
    assert counters["spec_decode_num_draft_tokens"] >= counters["spec_decode_num_drafts"]
    for row in rows:
        assert sum(row[name] for name in KV) == (case.num_blocks - 1) * case.block_size


@settings(max_examples=60, deadline=None, report_multiple_bugs=False)
@given(cases(paged=True, pipeline_depth=1), st.integers(1, 5), st.booleans())
def test_all_or_no_drafts_accepted(case: Case, num_tokens: int, accepted: bool) -> None:
    case = roomy(case)
    _, log = serve(
        case, Speculation(num_tokens, False, False), lambda request, drafts, padded: drafts if accepted else 0
    )
    counters = log.counters
    expected = counters["spec_decode_num_draft_tokens"] if accepted else 0
    assert counters["spec_decode_num_accepted_tokens"] == expected
    outputs = sum(row["outputs"] for row in rows_of(log.steps))
    served = [r for r in rows_of(log.requests) if Log.STATUSES[r["status"]] != "refused"]
    gaps = sum(row["itl_samples"] for row in rows_of(log.steps)) + len(log.itl_gaps_s)
    if not accepted:
        assert gaps == outputs - len(served), "every step yields one token"


class Forgetful(CheckedSpeculation):
    """Counts rejected drafts as computed."""

    def _emit(self, plan: Plan, request: RequestState) -> int:
        computed = request.num_computed_tokens
        emitted = super()._emit(plan, request)
        request.num_computed_tokens = computed
        return emitted


def test_the_checks_see_rejected_drafts_that_stay() -> None:
    requests = (Request(0, "r", 0.0, 8, 20),)
    case = Case(SchedulerLimits(4, 64, 64), "0.26", False, 40, 4, True, 1, WindowLaw(), requests)
    scheduler = Forgetful(
        case.limits,
        RULES["0.26"],
        PagedKVCache(40, 4, enable_prefix_caching=True),
        speculation=Speculation(3, True, False),
        accept=lambda request, drafts, padded: 0,
        asynchronous=False,
    )
    with pytest.raises(AssertionError, match="16: verified"):
        run_case(case, scheduler)
