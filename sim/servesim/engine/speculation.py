"""Speculative decoding in the scheduler: drafts that are scheduled, verified, and taken back when rejected.

A request that decodes computes its newest token and its drafts in one step, and yields one token more than
it has drafts accepted.  Which drafts are accepted is asked for when the output is processed.  Since the
requests of a step advance by different numbers of tokens, each is looked at on its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

from servesim.cost.step_time import StepShape
from servesim.engine.scheduler import Scheduler, SchedulerLimits
from servesim.engine.state import Plan, RequestState, Status
from servesim.engine.versions import Rules
from servesim.kv.base import KVCacheManager

__all__ = ["Accept", "Propose", "Speculation", "SpeculativeScheduler"]

Accept: TypeAlias = Callable[[RequestState, int, bool], int]
"""How many of a request's drafts are accepted: (request, drafts, whether they are placeholders)."""

Propose: TypeAlias = Callable[[RequestState], int]
"""How many drafts a request gets for its next step."""


class Speculation(NamedTuple):
    """What the scheduler must know of a drafting method."""

    num_tokens: int
    """Drafts proposed per request and step."""
    keeps_kv: bool
    """The drafter has a KV cache of its own in the same blocks, so that drafting takes slots ahead."""
    reads_hidden_states: bool
    """EAGLE and MTP: the drafter's KV of a token depends on the token behind it."""
    draft_rows: int = 0
    """Rows beyond its scheduled tokens that drafting computes for every request of a step."""


class SpeculativeScheduler(Scheduler):
    """The scheduler with drafts.

    ``asynchronous``: a step is scheduled before the output of the last one is known; otherwise ``propose``
    says how many drafts come, where it is not always as many as may.

    Source: vllm/v1/core/sched/scheduler.py and async_scheduler.py.
    """

    _pads = True

    def __init__(
        self,
        limits: SchedulerLimits,
        rules: Rules,
        kv: KVCacheManager[Any],
        windows: tuple[int | None, ...] = (None,),
        *,
        speculation: Speculation,
        accept: Accept,
        asynchronous: bool,
        propose: Propose | None = None,
    ) -> None:
        super().__init__(limits, rules, kv, windows, one_by_one=True)
        self.speculation = speculation
        self.num_drafts = 0  # requests times steps that had drafts to verify
        self.num_draft_tokens = 0
        self.num_accepted_tokens_per_pos = [0] * speculation.num_tokens
        self.accept = accept
        self._propose = propose or (lambda request: speculation.num_tokens)
        self._asynchronous = asynchronous
        self._lookahead_slots = speculation.num_tokens if speculation.keeps_kv else 0
        self._admission_slots = self._lookahead_slots if rules.lookahead_at_admission else 0
        self._draft_rows = speculation.draft_rows if rules.charges_draft_rows else 0
        self._hash_lookahead_tokens = int(speculation.reads_hidden_states and rules.hashes_lookahead)

    def counters(self) -> dict[str, int]:
        """vLLM's counters of speculative decoding."""
        per_position = self.num_accepted_tokens_per_pos
        return {
            **super().counters(),
            "spec_decode_num_drafts": self.num_drafts,
            "spec_decode_num_draft_tokens": self.num_draft_tokens,
            "spec_decode_num_accepted_tokens": sum(per_position),
            **{f"spec_decode_num_accepted_tokens_pos_{i}": n for i, n in enumerate(per_position)},
        }

    # ---- a step's tokens -------------------------------------------------------------------------

    def _want(self, request: RequestState) -> int:
        """Tokens and drafts that the request lacks; none once steps in flight surely reach its last token."""
        computed, pending = request.num_computed_tokens, request.num_placeholders
        sure_tokens = computed + 2 - pending  # were every draft in flight rejected
        if pending and sure_tokens >= request.num_prompt_tokens + request.request.output_tokens:
            return 0
        want = request.num_tokens + request.num_draft_tokens + pending - computed
        if 0 < self._threshold < want:
            want = self._threshold
        return min(want, self.limits.max_model_len - 1 - computed)

    def _schedule_running(self, plan: Plan) -> int:
        plan.drafts, plan.padded = {}, []
        return super()._schedule_running(plan)

    def _schedule(self, plan: Plan, request: RequestState, tokens: int) -> None:
        super()._schedule(plan, request, tokens)
        slots = self._slots(request.num_computed_tokens + tokens)
        request.num_slots = max(request.num_slots, slots)  # what a rejection leaves unused is kept
        if request.num_draft_tokens:
            drafts = tokens + request.num_computed_tokens - request.num_tokens - request.num_placeholders
            if drafts > 0:
                plan.drafts[request] = min(drafts, request.num_draft_tokens)
            request.num_draft_tokens = 0

    def _unschedule(self, plan: Plan, victim: RequestState) -> int:
        plan.drafts.pop(victim, None)
        tokens = super()._unschedule(plan, victim)
        return tokens + self._draft_rows if tokens else 0

    def _preempt(self, plan: Plan, victim: RequestState) -> None:
        super()._preempt(plan, victim)
        victim.num_draft_tokens = 0

    def _padding(self, plan: Plan, want: int, cached: int) -> int:
        """Placeholders that bring a new decode to the size of the others, which one CUDA graph needs."""
        num_drafts, rules, most = self.speculation.num_tokens, self.rules, self.limits.max_model_len
        if want != 1 or not rules.pads_new_decodes:
            return 0
        running = plan.scheduled[: len(plan.scheduled) - len(plan.admitted)]
        if any(request.is_prefill_chunk for request, _, _ in running):
            return 0
        if rules.pads_without_decodes:
            if rules.threshold_stops_padding and 0 < self.limits.long_prefill_token_threshold <= num_drafts:
                return 0  # where vLLM fails an assertion of its own
            fits = cached + 1 + num_drafts + 1 <= most
            return num_drafts if fits and (running or cached) else 0
        if not running:
            return 0
        # Where the padding does not fit into max_model_len, vLLM admits nobody in this step.
        return num_drafts if cached + 1 + num_drafts <= most else self.limits.max_num_batched_tokens

    def _advance(self, plan: Plan) -> None:
        decodes, drafts_verified, num_sampled = 0, 0, 0
        contexts, chunks = [0] * len(self._windows), []
        for request, tokens, before in plan.scheduled:
            drafts = plan.drafts.get(request, 0)
            computed = request.num_computed_tokens = before + tokens
            request.num_in_flight_tokens += tokens
            request.is_prefill_chunk = computed < request.num_tokens + request.num_placeholders
            if request.is_prefill_chunk or tokens > 1 + drafts or not before:
                chunks.append((tokens, before))
            else:
                decodes += 1
                drafts_verified += tokens - 1
                for i, window in enumerate(self._windows):
                    contexts[i] += computed if window is None else min(computed, window)
            if not request.is_prefill_chunk:
                request.num_placeholders += 1 + drafts
                request.planned_step = plan.step
                num_sampled += 1 + drafts
                plan.yielding.append(request)
                if self._asynchronous:
                    request.num_draft_tokens = self.speculation.num_tokens
        for request in plan.admitted:
            request.num_slots = min(
                request.num_computed_tokens + self._admission_slots, self.limits.max_model_len
            )
        plan.shape = StepShape(decodes, tuple(contexts), tuple(chunks), num_sampled, drafts_verified)

    # ---- the output of a step --------------------------------------------------------------------

    def commit(self, plan: Plan, now_s: float, steps: int = 1) -> tuple[int, list[float]]:
        """Process a step's output: verified tokens come out, rejected drafts are taken back."""
        self._in_flight.popleft()
        self._committed_step += steps
        self._committed_s = now_s
        contiguous, gaps, emitted_tokens = 0, list[float](), 0
        yielding = set(plan.yielding)
        for request, tokens, _ in plan.scheduled:
            request.num_in_flight_tokens -= tokens
            if request not in yielding or request.num_output_tokens >= request.output_limit:
                continue  # a part of a prompt, or a step too much for a request that has ended
            emitted_tokens += self._emit(plan, request)
            contiguous += self._stamp(request, now_s, gaps)
        plan.num_discarded = plan.shape.num_sampled - emitted_tokens
        if plan.finishing:
            self._retire(plan.finishing)
        return contiguous, gaps

    def _emit(self, plan: Plan, request: RequestState) -> int:
        """Let a request's tokens come out; returns how many."""
        drafts = plan.drafts.get(request, 0)
        accepted = 0
        if drafts:
            accepted = self.accept(request, drafts, request in plan.padded)
            self._count(drafts, accepted)
            if request.num_computed_tokens:  # else preempted since
                request.num_computed_tokens -= drafts - accepted
        request.num_placeholders -= 1 + drafts
        emitted = min(1 + accepted, request.output_limit - request.num_output_tokens)
        request.num_output_tokens += emitted
        if request.status is Status.RUNNING and (self._asynchronous or self.rules.caches_verified_at_commit):
            verified = request.num_tokens - 1  # the newest token has no KV yet
            self.kv.cache(request.sequence, verified)
        if request.num_output_tokens >= request.output_limit:
            plan.finishing.append(request)
        elif not self._asynchronous:
            request.num_draft_tokens = self._propose(request)
        return emitted

    def _count(self, drafts: int, accepted: int) -> None:
        self.num_drafts += 1
        self.num_draft_tokens += drafts
        for position in range(accepted):
            self.num_accepted_tokens_per_pos[position] += 1

    def _cache_at_end(self, request: RequestState) -> None:
        """What is verified has been cached with the step's output, or stays out of the cache."""

    def _held(self) -> tuple[int, int]:
        """As every scheduler's; drafts count as written until they are rejected, and never beyond the end."""
        size, computed, waste = self.kv.growth_block_size, 0, 0
        for request in self._loose:
            final = request.final_slots
            computed += min(request.num_computed_tokens, final)
            if request.num_slots >= request.waste_from_slot:
                waste += request.final_waste
            if size is not None:
                waste += max(-(-request.num_slots // size) * size - final - request.final_waste, 0)
        return computed, waste
