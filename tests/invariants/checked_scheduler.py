"""The invariants of the engine, numbered, and a scheduler that checks those of its state after every step.

 1  Conservation: requests that arrived = finished + running + waiting + refused, each in one place.
 2  The pool: free + used = total; the KV classes are never negative and add up to the pool.
 3  Blocks: a running request holds the blocks of its computed tokens, no fewer and no more; the KV tokens,
    and the slots that will stay empty, are the sums over the running requests.
 4  Limits: max_num_seqs, max_num_batched_tokens and long_prefill_token_threshold are never exceeded, and
    without chunked prefill a prompt is computed in one step. Who is admitted beside others leaves the
    watermark free.
 5  Progress: a running request has computed something, and never more than it will need.
 6  Order: requests are first admitted in the order of the queue; a request that waits is not overtaken.
 7  Preemption: the victims come after everybody who goes on running, and nobody is admitted beside them.
 8  Work conservation: the head of the queue waits only for a seat, for tokens or for blocks.

What a log must show is in engine_log.py (9 to 14).
"""

from __future__ import annotations

from typing import Any

from servesim.engine.scheduler import Scheduler
from servesim.engine.state import Plan, RequestState, Status
from servesim.kv.contiguous import ContiguousKVCache
from servesim.kv.grouped import GroupedKVCache
from servesim.kv.paged import PagedKVCache
from servesim.workload.request import Request

__all__ = ["CheckedScheduler"]


class CheckedScheduler(Scheduler):
    """A scheduler that fails as soon as an invariant does; ``checks`` counts how often it looked."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.num_arrived = self.num_refused = self.num_ended = self.checks = 0

    # ---- the scheduler's acts, each followed by its checks -------------------------------------

    def add(self, request: Request) -> RequestState:
        state = super().add(request)
        self.num_arrived += 1
        self.num_refused += state.status is Status.REFUSED
        self.check()
        return state

    def plan(self) -> Plan | None:
        queue = self._in_order()
        return self._check_plan(queue, super().plan())

    def plan_beside_group(self, draining: int, pending: bool) -> Plan | None:
        queue = self._in_order()
        return self._check_plan(queue, super().plan_beside_group(draining, pending))

    def let_in(self, request: RequestState) -> tuple[int, int, list[RequestState]]:
        decodes = len(self.group.members)
        cached, context_tokens, ended = super().let_in(request)
        limits, tokens = self.limits, decodes + request.num_prompt_tokens - cached
        assert len(self.running) <= limits.max_num_seqs, "4: max_num_seqs"
        assert tokens <= limits.max_num_batched_tokens, "4: max_num_batched_tokens"
        threshold = limits.long_prefill_token_threshold
        assert not 0 < threshold < tokens - decodes, "4: long_prefill_token_threshold"
        assert self.kv.num_free_blocks >= limits.watermark_blocks, "4: watermark"
        assert not self.waiting, "6: who waits is overtaken"
        self.check()
        return cached, context_tokens, ended

    def _check_plan(self, queue: list[RequestState], plan: Plan | None) -> Plan | None:
        if plan is None:
            assert self.group.members or self.running or not self.waiting, "8: idle while somebody waits"
        else:
            self._check_limits(plan)
            self._check_order(plan, queue)
            self._check_preemption(plan)
            if not plan.preempted:
                self._check_head_is_blocked(plan)
        self.check()
        return plan

    def extend(self, plan: Plan, steps: int) -> None:
        super().extend(plan, steps)
        self._check_limits(plan)
        self._check_head_is_blocked(plan)
        self.check()

    def commit(self, plan: Plan, now_s: float, steps: int = 1) -> tuple[int, list[float]]:
        result = super().commit(plan, now_s, steps)
        self._check_ended(plan.finishing)
        return result

    def commit_group(self, ended: list[RequestState], steps: int, now_s: float) -> None:
        super().commit_group(ended, steps, now_s)
        self._check_ended(ended)

    def _check_ended(self, ended: list[RequestState]) -> None:
        self.num_ended += len(ended)
        for state in ended:
            assert state.status in (Status.FINISHED_STOP, Status.FINISHED_LENGTH), "1: ended, not finished"
            assert state not in self.running, "1: ended, but running"
        self.check()

    # ---- the invariants ------------------------------------------------------------------------

    def check(self) -> None:
        self.checks += 1
        waiting = self.waiting.unordered()
        here = len(self.running) + len(waiting)
        assert self.num_arrived == self.num_ended + here + self.num_refused, "1: conservation"
        assert all(state.status is Status.WAITING for state in waiting), "1: status of who waits"
        assert all(state.status is Status.RUNNING for state in self.running), "1: status of who runs"
        assert not self.running.keys() & set(waiting), "1: running and waiting"
        computed = {state: _computed(self, state) for state in self.running}
        assert all(0 < c <= state.final_slots for state, c in computed.items()), "5: computed tokens"
        assert all(_computed(self, state) == 0 for state in waiting), "5: computed tokens of who waits"
        self._check_pool(computed)

    def _check_pool(self, computed: dict[RequestState, int]) -> None:
        usage = self.usage()
        assert min(usage) >= 0, "2: a class is negative"
        if isinstance(self.kv, GroupedKVCache):  # blocks leave windows: 3 does not apply
            assert sum(usage) - usage.logical == (self.kv.pool.num_blocks - 1) * self.kv.block_size, "2: sum"
            return
        assert usage.logical == sum(computed.values()), "3: KV tokens"
        classes = sum(usage) - usage.logical
        if isinstance(self.kv, ContiguousKVCache):
            held = sum(s.sequence.wanted for s in computed)
            assert classes == self.kv.num_slots, "2: the classes add up"
            assert usage.internal == sum(s.sequence.wanted - s.final_slots for s in computed), "3: waste"
            assert usage.round_up == sum(s.sequence.num_slots for s in computed) - held, "2: round-up"
            assert usage.free + usage.holes == self.kv.space.num_free, "2: free"
        else:
            assert isinstance(self.kv, PagedKVCache)
            size = self.kv.block_size
            held = sum(-(-c // size) for c in computed.values()) * size
            assert classes == (self.kv.pool.num_blocks - 1) * size, "2: the classes add up"
            assert self.kv.num_logical_blocks * size == held, "3: blocks"
            last = [s for s, c in computed.items() if -(-c // size) == -(-s.final_slots // size)]
            assert usage.internal == sum(-s.final_slots % size for s in last), "3: waste"
            assert usage.free + usage.cached == self.kv.num_free_blocks * size, "2: free"
        assert usage.logical + usage.reserved + usage.internal == held, "3: slots held"

    def _check_limits(self, plan: Plan) -> None:
        if plan.admitted and len(self.running) > 1:
            assert self.kv.num_free_blocks >= self.limits.watermark_blocks, "4: watermark"
        limits, shape = self.limits, plan.shape
        assert len(self.running) <= limits.max_num_seqs, "4: max_num_seqs"
        assert plan.running - plan.num_draining <= len(self.running), "4: running"
        assert shape.num_tokens <= limits.max_num_batched_tokens, "4: max_num_batched_tokens"
        assert shape.num_sampled <= shape.num_decodes + len(shape.chunks), "4: sampled"
        for state, tokens, before in plan.scheduled:
            assert tokens > 0, "4: nothing scheduled"
            threshold = self._threshold_in_force()
            assert not threshold or tokens <= threshold, "4: long_prefill_token_threshold"
            if not limits.enable_chunked_prefill and not threshold and state in plan.admitted:
                assert before + tokens == state.num_tokens, "4: chunked prefill is off"

    def _threshold_in_force(self) -> int:
        alone = len(self.running) + len(self.waiting) == 1
        spared = alone and self.rules.threshold_spares_lone_request
        return 0 if spared else self.limits.long_prefill_token_threshold

    def _in_order(self) -> list[RequestState]:
        queue = self.waiting.unordered()
        return sorted(queue, key=lambda s: s.priority_key) if self.limits.priority_policy else queue

    def _check_order(self, plan: Plan, queue: list[RequestState]) -> None:
        assert plan.admitted == queue[: len(plan.admitted)], "6: order of admission"

    def _check_preemption(self, plan: Plan) -> None:
        if plan.preempted:
            assert not plan.admitted, "7: admitted beside a preemption"
        for victim in plan.preempted:
            for state in self.running:
                if self.limits.priority_policy:
                    assert state.priority_key[:2] <= victim.priority_key[:2], "7: victim by priority"
                else:
                    assert state.admission < victim.admission, "7: victim by admission"

    def _check_head_is_blocked(self, plan: Plan) -> None:
        limits, kv = self.limits, self.kv
        left = limits.max_num_batched_tokens - plan.shape.num_tokens
        if not self.waiting or not left or len(self.running) >= limits.max_num_seqs:
            return
        head = self.waiting.head
        hit = kv.find_hit(head.sequence, head.num_tokens - 1)
        cached = hit.num_tokens if hit else 0
        lacking = head.num_tokens - cached
        chunk = min(lacking, self._threshold_in_force() or lacking)
        if chunk > left and not limits.enable_chunked_prefill:
            return
        slots = head.num_tokens if limits.scheduler_reserve_full_isl else cached + min(chunk, left)
        if isinstance(kv, ContiguousKVCache):
            needed = kv.space.granted(head.sequence.wanted)
        elif isinstance(kv, GroupedKVCache):
            return
        else:
            assert isinstance(kv, PagedKVCache)
            taken, revived = (hit.num_blocks, hit.num_evictable) if hit else (0, 0)
            needed = max(-(-slots // kv.block_size) - taken, 0) + revived
        watermark = limits.watermark_blocks if self.running else 0
        assert needed > kv.num_free_blocks - watermark, "8: the head of the queue fits"


def _computed(scheduler: Scheduler, state: RequestState) -> int:
    """Computed tokens, wherever they are kept."""
    return scheduler.group.tick + state.offset if state.grouped else state.num_computed_tokens
