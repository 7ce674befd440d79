"""vLLM's V1 scheduler, looking at every request in every step: state in, plan out, no clock.

Order within a step as in vllm/v1/core/sched/scheduler.py: the running requests first, in order of
admission, each given the tokens it lacks; when blocks run short the least important one is preempted and
will recompute; then, if nobody was preempted, waiting requests are admitted while tokens, seats and blocks
last.
"""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

from servesim.cost.step_time import StepShape
from servesim.engine.queues import FcfsQueue, PriorityQueue, WaitingQueue
from servesim.engine.state import (
    FINISHED_LENGTH,
    FINISHED_STOP,
    REFUSED,
    RUNNING,
    WAITING,
    AdmissionFailure,
    Plan,
    RequestState,
)
from servesim.engine.versions import Rules
from servesim.kv.base import KVCacheManager, PrefixHit, Usage
from servesim.workload.request import Request

__all__ = ["OneByOneScheduler", "SchedulerLimits", "by_admission"]


class SchedulerLimits(NamedTuple):
    """The settings a schedule depends on, in vLLM's names."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    enable_chunked_prefill: bool = True
    long_prefill_token_threshold: int = 0
    priority_policy: bool = False
    watermark_blocks: int = 0
    scheduler_reserve_full_isl: bool = True


class OneByOneScheduler:
    """Decides, step by step, which tokens are computed.

    ``windows`` are the attention windows for which context sums are kept.
    """

    # Only speculative decoding (engine/speculation.py) has other values.
    _lookahead_slots = 0  # allocated beyond the scheduled tokens of a running request
    _admission_slots = 0  # the same at admission
    _draft_rows = 0  # tokens of the step's budget that drafting takes per scheduled request
    _hash_lookahead_tokens = 0  # tokens behind a block that its hash covers
    _pads = False  # gives requests placeholder drafts when they are admitted

    def __init__(
        self,
        limits: SchedulerLimits,
        rules: Rules,
        kv: KVCacheManager[Any],
        windows: tuple[int | None, ...] = (None,),
    ) -> None:
        self.limits = limits
        self.rules = rules
        self.kv = kv
        self.running: dict[RequestState, None] = {}  # in order of admission
        self.waiting: WaitingQueue = PriorityQueue() if limits.priority_policy else FcfsQueue()
        self.news = False  # something happened that the last plan could not know
        self.step = 0
        self.prefix_cache_queries = 0
        self.prefix_cache_hits = 0
        self.num_preemptions = 0
        self.admission_failures = [0] * len(AdmissionFailure)
        self._windows = windows
        self._loose: dict[RequestState, None] = {}  # running, each with numbers of its own
        self._in_flight: deque[Plan] = deque()
        self._committed_step = -1
        self._committed_s = 0.0
        self._num_admissions = 0
        self._outputs_are_shared = False
        self._threshold = limits.long_prefill_token_threshold

    def add(self, request: Request) -> RequestState:
        """Take a request in; refused when its prompt leaves no room for an output token, as vLLM does."""
        sequence = self.kv.new_sequence(
            request.prompt, request.prompt_tokens, request.output_name, request.output_tokens
        )
        state = RequestState(request, sequence, self.limits.max_model_len)
        if request.prompt_tokens >= self.limits.max_model_len:
            state.status = REFUSED
            return state
        state.final_waste, state.waste_from_slot = self.kv.final_waste(sequence, state.final_slots)
        self._outputs_are_shared |= request.output_name is not None
        self.news = True  # also behind a blocked head: the log counts who waits, step by step
        self.waiting.append(state)
        return state

    def plan(self) -> Plan | None:
        """Schedule the next step; None when there is nothing to do."""
        plan = self._open(0)
        plan.together = plan.coasts = False
        budget = self._schedule_running(plan)
        if not plan.preempted:
            self._admit(plan, budget)
        if not (plan.scheduled or plan.preempted):
            return None
        self._close(plan)
        return plan

    def commit(self, plan: Plan, now_s: float, steps: int = 1) -> tuple[int, list[float]]:
        """Process the output of the plan's last ``steps`` steps, which ended at ``now_s``.

        Returns how many tokens of each follow a token of the step before, and the longer gaps in seconds.
        The requests in ``plan.finishing``, in order of admission, have ended and hold no KV any more.
        """
        self._in_flight.popleft()
        self._committed_step += steps
        self._committed_s = now_s
        contiguous: int = plan.group_size
        gaps: list[float] = []
        for request, tokens, _ in plan.scheduled:
            request.num_in_flight_tokens -= tokens
        for request in plan.yielding:
            request.num_output_tokens += 1
            request.num_placeholders -= 1
            contiguous += self._stamp(request, now_s, gaps)
            if request.status is RUNNING and not request.grouped:
                self.kv.cache(request.sequence, request.num_computed_tokens - request.num_placeholders)
        if plan.finishing:
            self._retire(plan.finishing)
        return contiguous, gaps

    def counters(self) -> dict[str, int]:
        """Further totals: requests that waited at the head of the queue, by reason."""
        return {
            f"admission_failures_{why.name.lower()}": self.admission_failures[why]
            for why in AdmissionFailure
            if why
        }

    def levels(self) -> tuple[int, ...]:
        """What the KV pool's classes are made of, as scheduled so far: see kv.base.Account."""
        computed, waste = self._held()
        return (computed, waste, *self.kv.levels())

    def keeps_kv(self) -> bool:
        """Whether requests that do not run hold KV."""
        return False

    def usage(self) -> Usage:
        """The KV pool by class, as scheduled so far."""
        return self.kv.account.usage(*self.levels())

    @property
    def num_unfinished(self) -> int:
        """Requests that are running or waiting."""
        return len(self.running) + len(self.waiting)

    def unfinished(self) -> list[RequestState]:
        """The requests that are running or waiting, for a simulation that is cut off."""
        return [*self.running, *self.waiting.unordered()]

    # ---- the running requests ------------------------------------------------------------------

    def _open(self, group_size: int) -> Plan:
        """An empty plan of the next step, beside a group that decodes together."""
        self.news = False
        if self.rules.threshold_spares_lone_request:
            alone = len(self.running) + len(self.waiting) < 2
            self._threshold = 0 if alone else self.limits.long_prefill_token_threshold
        plan = Plan(self.step, group_size)
        plan.scheduled, plan.yielding, plan.admitted, plan.preempted = [], [], [], []
        return plan

    def _want(self, request: RequestState) -> int:
        """Tokens the request lacks, before the step's budget; none when its last token is on its way."""
        if request.num_computed_tokens >= request.final_slots:
            return 0
        want = request.num_tokens + request.num_placeholders - request.num_computed_tokens
        return self._threshold if 0 < self._threshold < want else want

    def _schedule_running(self, plan: Plan) -> int:
        """vLLM's first loop: every running request in turn; returns the tokens left."""
        budget = self.limits.max_num_batched_tokens - self._draft_rows
        queue, index = list(self.running), 0
        while index < len(queue) and budget > 0:
            request = queue[index]
            want = min(self._want(request), budget)
            if want <= 0:
                index += 1
                continue
            slots, alive = self._slots(request.num_computed_tokens + want), True
            in_flight = request.num_in_flight_tokens if self.rules.windows_wait_for_output else 0
            self.kv.release(request.sequence, request.num_computed_tokens - in_flight)
            while alive and (
                self.kv.num_blocks_needed(request.sequence, slots, None) > self.kv.num_free_blocks
            ):
                victim = self._victim(queue)
                place = queue.index(victim)
                del queue[place]
                returned = self._unschedule(plan, victim)
                budget += returned
                if returned or (place < index and self.rules.victim_never_hides_next):
                    index -= 1
                self._preempt(plan, victim)
                alive = victim is not request
            if alive:
                self._schedule(plan, request, want)
                budget -= want + self._draft_rows
                index += 1
            elif not self.rules.self_preemption_continues:
                break
        return budget

    def _slots(self, tokens: int) -> int:
        """KV slots that a running request must have to compute up to ``tokens`` tokens."""
        return min(tokens + self._lookahead_slots, self.limits.max_model_len)

    def _victim(self, queue: list[RequestState]) -> RequestState:
        if not self.limits.priority_policy:
            return queue[-1]
        return max(queue, key=lambda r: (r.request.priority, r.request.arrival_s))

    def _unschedule(self, plan: Plan, victim: RequestState) -> int:
        """Take a victim out of the step; returns its tokens."""
        for index, (request, tokens, _) in enumerate(plan.scheduled):
            if request is victim:
                del plan.scheduled[index]
                return tokens
        return 0

    def _preempt(self, plan: Plan, victim: RequestState) -> None:
        """Free a running request's blocks; it will compute all its tokens anew."""
        self.kv.free(victim.sequence)
        del self.running[victim], self._loose[victim]
        victim.status = WAITING
        victim.num_computed_tokens = 0
        victim.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.prepend(victim)
        plan.preempted.append(victim)

    def _schedule(self, plan: Plan, request: RequestState, tokens: int) -> None:
        before = request.num_computed_tokens
        self.kv.allocate(request.sequence, self._slots(before + tokens), None)
        hashed = request.num_tokens - self._hash_lookahead_tokens
        self.kv.cache(request.sequence, min(before + tokens, hashed))
        plan.scheduled.append((request, tokens, before))

    # ---- admission -----------------------------------------------------------------------------

    def _admit(self, plan: Plan, budget: int) -> bool:
        """vLLM's second loop: the waiting requests; returns whether what stopped it lasts until news come."""
        limits, kv, waiting = self.limits, self.kv, self.waiting
        while waiting and budget > 0:
            request = waiting.head
            if len(self.running) >= limits.max_num_seqs:
                self._deny(plan, request, AdmissionFailure.SEATS)
                break
            sequence, total = request.sequence, request.num_tokens
            hit = kv.find_hit(sequence, total - 1)
            cached = hit.num_tokens if hit else 0
            if hit and not request.num_preemptions:
                self.prefix_cache_queries += total
                self.prefix_cache_hits += cached
            want = total - cached
            padding = self._padding(plan, want, cached) if self._pads else 0
            want += padding
            if padding and want > budget:
                return self._wait(plan, request, hit)
            if 0 < self._threshold < want:
                want = self._threshold
            if want > budget:
                if not limits.enable_chunked_prefill:
                    return self._wait(plan, request, hit)
                want = budget
            slots = min(cached + want + self._admission_slots, limits.max_model_len)
            needed = kv.num_blocks_needed(sequence, slots, hit)
            if limits.scheduler_reserve_full_isl:
                needed = max(needed, kv.num_blocks_to_admit(sequence, total, hit))
            if needed > kv.num_free_blocks:
                fits = kv.deny(needed)
                self._deny(plan, request, AdmissionFailure.FIT if fits else AdmissionFailure.MEMORY)
                return self._wait(plan, request, hit)
            if self.running and needed > kv.num_free_blocks - limits.watermark_blocks:
                self._deny(plan, request, AdmissionFailure.WATERMARK)
                return self._wait(plan, request, hit)
            waiting.popleft()
            kv.allocate(sequence, slots, hit)
            kv.cache(sequence, min(cached + want, total - self._hash_lookahead_tokens))
            self._start(plan, request, cached)
            plan.scheduled.append((request, want, cached))
            if padding:
                plan.drafts[request] = padding
                plan.padded.append(request)
            budget -= want + self._draft_rows
        return True

    def _padding(self, plan: Plan, want: int, cached: int) -> int:
        """Placeholder drafts with which a request is admitted."""
        return 0

    def _wait(self, plan: Plan, request: RequestState, hit: PrefixHit | None) -> bool:
        """The head of the queue stays there; returns whether its next look-ups will find the same."""
        if hit and not request.num_preemptions:
            plan.lookup = (request.num_tokens, hit.num_tokens)
        return not self._outputs_are_shared and not (hit and hit.num_evictable)

    def _deny(self, plan: Plan, request: RequestState, why: AdmissionFailure) -> None:
        """Note why the head of the queue is not admitted; a request counts once for each reason.

        Watermark and lack of memory are one reason, named as it was first: free blocks run out by themselves.
        """
        plan.failure = why
        reason = 1 << (AdmissionFailure.MEMORY if why is AdmissionFailure.WATERMARK else why)
        if not request.failures & reason:
            request.failures |= reason
            self.admission_failures[why] += 1

    def _start(self, plan: Plan, request: RequestState, cached: int) -> None:
        self.running[request] = self._loose[request] = None
        self._seat(request, cached)
        plan.admitted.append(request)

    def _seat(self, request: RequestState, cached: int) -> None:
        request.status = RUNNING
        request.failures = 0
        request.num_computed_tokens = cached
        request.admission = self._num_admissions
        self._num_admissions += 1
        if request.cached_tokens < 0:
            request.cached_tokens = cached

    # ---- closing a step, and its output ----------------------------------------------------------

    def _close(self, plan: Plan) -> None:
        """Advance what was scheduled, and write down the step's shape."""
        self.step += 1
        plan.running, plan.waiting = len(self.running), len(self.waiting)
        for flying in self._in_flight:
            for request in flying.finishing:
                plan.num_draining += request.status is RUNNING
        self._in_flight.append(plan)
        self._advance(plan)

    def _advance(self, plan: Plan) -> None:
        decodes, chunks = plan.group_size, []
        contexts = list(plan.group_contexts) if plan.group_size else [0] * len(self._windows)
        for request, tokens, before in plan.scheduled:
            if tokens == 1 and before:
                decodes += 1
                for i, window in enumerate(self._windows):
                    contexts[i] += before + 1 if window is None else min(before + 1, window)
            else:
                chunks.append((tokens, before))
            computed = request.num_computed_tokens = before + tokens
            request.num_in_flight_tokens += tokens
            if computed >= request.num_tokens + request.num_placeholders:
                self._expect_token(plan, request)
        plan.shape = StepShape(decodes, tuple(contexts), tuple(chunks), plan.group_size + len(plan.yielding))

    def _expect_token(self, plan: Plan, request: RequestState) -> None:
        request.num_placeholders += 1
        request.planned_step = plan.step
        plan.yielding.append(request)
        if request.num_computed_tokens >= request.final_slots:
            plan.finishing.append(request)

    def _stamp(self, request: RequestState, now_s: float, gaps: list[float]) -> bool:
        """Note that a request's token came out; returns whether it follows one of the step before.

        A longer gap between two tokens is added to ``gaps``.
        """
        follows = request.emitted_step == self._committed_step - 1
        if request.first_token_s != request.first_token_s:  # NaN: not reached yet
            request.first_token_s, follows = now_s, False
        elif not follows:
            gaps.append(now_s - request.emitted_s)
        request.emitted_step, request.emitted_s = self._committed_step, now_s
        return follows

    def _retire(self, ended: list[RequestState]) -> None:
        """End requests, and bring them into the order in which vLLM ends them."""
        if len(ended) > 1:
            ended.sort(key=by_admission)
        for request in ended:
            self._finish(request)
        self.news |= bool(self.waiting)

    def _finish(self, request: RequestState) -> None:
        if request.status is WAITING:  # preempted while its last token was on its way
            self.waiting.remove(request)
        else:
            del self.running[request], self._loose[request]
            self._cache_at_end(request)
            self.kv.free(request.sequence)
        self._mark_finished(request)

    def _mark_finished(self, request: RequestState) -> None:
        request.num_output_tokens = request.output_limit
        complete = request.output_limit == request.request.output_tokens
        request.status = FINISHED_STOP if complete else FINISHED_LENGTH

    def _cache_at_end(self, request: RequestState) -> None:
        """Make the last full blocks of a request that has ended hit-able."""
        self.kv.cache(request.sequence, request.num_computed_tokens)

    def _held(self) -> tuple[int, int]:
        """Tokens computed for the running requests, and slots that they hold and will never fill."""
        computed = waste = 0
        for request in self._loose:
            computed += request.num_computed_tokens
            if request.num_computed_tokens >= request.waste_from_slot:
                waste += request.final_waste
        return computed, waste


def by_admission(request: RequestState) -> int:
    """Sort key: the order of admission, in which vLLM ends requests of one step."""
    return request.admission
