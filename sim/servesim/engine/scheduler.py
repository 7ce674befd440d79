"""The scheduler: as vLLM's, with the requests that only decode advanced together.

The decode group moves as one whenever no decision about one of its members can depend on another; otherwise
every request is looked at, one by one, as vLLM does (engine/one_by_one.py).
"""

from __future__ import annotations

from typing import Any

from servesim.cost.step_time import StepShape
from servesim.engine.decode_group import DecodeGroup
from servesim.engine.one_by_one import OneByOneScheduler, SchedulerLimits, by_admission
from servesim.engine.state import Plan, RequestState
from servesim.engine.versions import Rules
from servesim.kv.base import KVCacheManager

__all__ = ["Scheduler", "SchedulerLimits"]


class Scheduler(OneByOneScheduler):
    """Decides, step by step, which tokens are computed.

    ``one_by_one`` never advances requests together; the schedule is the same, only slower to find.
    """

    _meets_newcomers = True  # admits as vLLM does; other schedulers make a plan for it

    def __init__(
        self,
        limits: SchedulerLimits,
        rules: Rules,
        kv: KVCacheManager[Any],
        windows: tuple[int | None, ...] = (None,),
        *,
        one_by_one: bool = False,
    ) -> None:
        super().__init__(limits, rules, kv, windows)
        self.group = DecodeGroup(windows, kv.growth_block_size)
        self._one_by_one = one_by_one or not kv.advances_together

    def plan(self) -> Plan | None:
        """Schedule the next step; None when there is nothing to do."""
        if self._one_by_one:
            return super().plan()
        if not self.group.members:
            self._form_group()
        plan = self._open(len(self.group.members))
        chunks = self._chunks_beside_group()
        if chunks is None:
            self._dissolve_group()
            plan.together, plan.group_size = False, 0
            budget = self._schedule_running(plan)
        else:
            budget = self._advance_together(plan, chunks, bool(self._in_flight))
        settled = not plan.preempted and self._admit(plan, budget)
        if not (plan.scheduled or plan.group_size or plan.preempted):
            return None
        self._close(plan)
        plan.coasts = (
            settled and plan.together and len(self._loose) == plan.num_draining + len(plan.finishing)
        )
        return plan

    def unfinished(self) -> list[RequestState]:
        """The requests that are running or waiting, for a simulation that is cut off."""
        self._dissolve_group()
        return super().unfinished()

    def levels(self) -> tuple[int, ...]:
        """What the KV pool's classes are made of, as scheduled so far: see kv.base.Account."""
        group = self.group
        held = group.computed_tokens(), group.final_waste
        if self._loose:
            computed, waste = self._held()
            held = held[0] + computed, held[1] + waste
        return held + self.kv.levels()

    # ---- a plan that coasts: the decode group goes on, step after step --------------------------

    def segment(self, plan: Plan, num_steps: int) -> int:
        """Steps, at most ``num_steps``, from the plan's next one on that compute the same requests."""
        if plan.scheduled or plan.finishing:
            return 1
        group = self.group
        others = min(group.steps_to_finish(), group.steps_within(self.kv.num_free_blocks))
        if group.has_windows:
            others = min(others, group.steps_to_crossing())
        return min(1 + others, num_steps)

    def extend(self, plan: Plan, steps: int) -> None:
        """Schedule ``steps`` repetitions of the plan, within its segment."""
        if steps:
            self.kv.grow(self.group.blocks_demanded(steps))
            self._collect_finishing(plan, steps, bool(self._in_flight))
            plan.last_step += steps
            self._count_steps(plan, steps)

    def _count_steps(self, plan: Plan, steps: int) -> None:
        self.step += steps
        self.prefix_cache_queries += plan.lookup[0] * steps
        self.prefix_cache_hits += plan.lookup[1] * steps

    def commit_repetitions(self, steps: int, now_s: float) -> None:
        """Process the output of ``steps`` steps of a plan of which one more is in flight."""
        self._committed_step += steps
        self._committed_s = now_s

    def advance_group(self, steps: int, blocks: int) -> None:
        """Schedule steps of the group alone, which take so many blocks and lead nobody beyond the end."""
        if blocks:
            self.kv.grow(blocks)
        self.group.pass_steps(steps)
        self.step += steps

    def plan_beside_group(self, draining: int, pending: bool) -> Plan | None:
        """Schedule a step of the group, for which there are blocks, and of those who wait; None if of nobody.

        ``draining`` requests have left the group with a step that is in flight; ``pending``: one is.
        """
        plan = self._open(len(self.group.members))
        budget = self._advance_together(plan, [], pending)
        settled = self._admit(plan, budget)
        if not (plan.scheduled or plan.group_size):
            return None
        self._close(plan)
        plan.num_draining += draining
        plan.coasts = settled and len(self._loose) == plan.num_draining + len(plan.finishing)
        return plan

    def newcomer(self) -> RequestState | None:
        """The one request that waits, if the next step is sure to have room for its whole prompt.

        It decodes with the group from then on; there are blocks for a step after that, too.
        """
        waiting, limits, kv = self.waiting, self.limits, self.kv
        if len(waiting) != 1 or self._outputs_are_shared or not self._meets_newcomers:
            return None
        request, count = waiting.head, len(self.group.members)
        tokens, sequence = request.num_prompt_tokens, request.sequence
        if (
            request.num_preemptions
            or tokens >= request.final_slots
            or tokens > limits.max_num_batched_tokens - count
            or 0 < limits.long_prefill_token_threshold < tokens
            or len(self.running) >= limits.max_num_seqs
        ):
            return None
        spare = kv.num_free_blocks - limits.watermark_blocks - 2 * count - 1
        if kv.num_blocks_needed(sequence, tokens, None) > spare or (
            limits.scheduler_reserve_full_isl and kv.num_blocks_to_admit(sequence, tokens, None) > spare
        ):
            return None
        return request

    def let_in(self, request: RequestState) -> tuple[int, int, list[RequestState]]:
        """Schedule a step of the group and of a newcomer's prompt, as far as it is not cached.

        Returns its cached tokens, the KV tokens that the group attends to, and the members whose last token
        is on its way.
        """
        kv, group, sequence, tokens = self.kv, self.group, request.sequence, request.num_prompt_tokens
        context_tokens, ended = 0, []
        if group.members:
            blocks = group.blocks_demanded(1)
            if blocks:
                kv.grow(blocks)
            group.pass_steps(1)
            context_tokens, ended = group.computed_tokens(), self.pop_ended()
        hit, cached = kv.find_hit(sequence, tokens - 1), 0
        if hit is not None:
            cached = hit.num_tokens
            self.prefix_cache_queries += tokens
            self.prefix_cache_hits += cached
        self.waiting.popleft()
        self.news = False
        kv.allocate(sequence, tokens, hit)
        kv.cache(sequence, tokens)
        self.running[request] = None
        self._seat(request, cached)
        request.num_computed_tokens = tokens
        request.planned_step = request.joined_step = self.step
        group.join(request)
        self.step += 1
        return cached, context_tokens, ended

    def greet(self, request: RequestState, now_s: float) -> None:
        """Process a newcomer's first token, which came out with the last step committed."""
        request.first_token_s = request.emitted_s = now_s
        request.emitted_step = self._committed_step

    def pop_ended(self) -> list[RequestState]:
        """The members whose last token is on its way; they leave the group."""
        ended = self.group.pop_ended()
        for request in ended:
            self._loose[request] = None
        return ended

    def commit_group(self, ended: list[RequestState], steps: int, now_s: float) -> None:
        """Process the output of ``steps`` steps of the group alone; ``ended`` left it with the last one."""
        self._committed_step += steps
        self._committed_s = now_s
        if not ended:
            return
        if len(ended) > 1:
            ended.sort(key=by_admission)
        kv = self.kv
        for request in ended:
            del self.running[request], self._loose[request]
            sequence, computed = request.sequence, request.num_computed_tokens
            kv.settle(sequence, computed)
            kv.cache(sequence, computed)
            kv.free(sequence)
            self._mark_finished(request)
        self.news |= bool(self.waiting)

    def plan_of_group(self, lead: int) -> Plan:
        """The plan of the group's last scheduled step, which is the only one in flight.

        ``lead``: steps that were in flight when it was scheduled.
        """
        plan = Plan(self.step - 1, len(self.group))
        plan.running = plan.group_size
        plan.waiting = 0
        plan.shape = StepShape(plan.group_size, self.group.context_tokens(), (), plan.group_size)
        self._collect_finishing(plan, 0, bool(lead))
        self._in_flight.clear()
        self._in_flight.append(plan)
        return plan

    def drop_plans(self) -> None:
        """Nothing is in flight any more."""
        self._in_flight.clear()

    # ---- the decode group ----------------------------------------------------------------------

    def _form_group(self) -> None:
        """Let the decoding requests advance together again, if each yielded a token in the last step."""
        if self.kv.num_free_blocks < len(self._loose):
            return
        decoding = [r for r in self._loose if _decodes(r)]
        if any(r.planned_step != self.step - 1 for r in decoding):
            return
        for request in decoding:
            self._join(request)

    def _join(self, request: RequestState) -> None:
        request.joined_step = request.planned_step
        del self._loose[request]
        self.group.join(request)

    def _chunks_beside_group(self) -> list[tuple[RequestState, int]] | None:
        """Tokens for the running requests outside the group.

        None when the order in which requests are looked at matters: the group and the chunks together
        exceed the free blocks, or the token budget in a way that is not settled by the last one's share.
        """
        budget = self.limits.max_num_batched_tokens - len(self.group.members)
        blocks = self.kv.num_free_blocks - self.group.blocks_demanded(1)
        chunks: list[tuple[RequestState, int]] = []
        for request in self._loose:
            if _decodes(request):
                return None
            want = self._want(request)
            if want <= 0:
                continue
            if want > budget:
                if chunks or request is not next(reversed(self.running)):
                    return None
                want = max(budget, 0)
            budget -= want
            if want:
                slots = request.num_computed_tokens + want
                blocks -= self.kv.num_blocks_needed(request.sequence, slots, None)
                chunks.append((request, want))
        return chunks if budget >= 0 and blocks >= 0 else None

    def _advance_together(self, plan: Plan, chunks: list[tuple[RequestState, int]], pending: bool) -> int:
        """Schedule the group and the chunks; returns the tokens left. ``pending``: see _collect_finishing."""
        group = self.group
        budget = self.limits.max_num_batched_tokens - plan.group_size
        if plan.group_size:
            plan.group_contexts = group.next_contexts()
            self.kv.grow(group.blocks_demanded(1))
            self._collect_finishing(plan, 1, pending)
            if self._outputs_are_shared:
                self._cache_group_outputs(pending)
        for request, tokens in chunks:
            self._schedule(plan, request, tokens)
            budget -= tokens
        return budget

    def _collect_finishing(self, plan: Plan, steps: int, pending: bool) -> None:
        """Advance the group; ``pending``: the output of the step before is not processed yet."""
        for request in self.group.advance(steps):
            request.num_placeholders += 1
            self.kv.settle(request.sequence, request.num_computed_tokens)
            self.kv.cache(request.sequence, request.num_computed_tokens - pending)
            self._loose[request] = None
            plan.finishing.append(request)

    def _cache_group_outputs(self, pending: bool) -> None:
        """Make what the group has generated hit-able, for prompts that contain it."""
        for request in self.group.members:
            if request.request.output_name is not None:
                computed = self.group.tick + request.offset
                self.kv.settle(request.sequence, computed)
                self.kv.cache(request.sequence, computed - pending)

    def _dissolve_group(self) -> None:
        """Give every member its own numbers back."""
        group = self.group
        if not group:
            return
        in_flight = self._in_flight[-1] if self._in_flight else None
        for request in group.members:
            request.grouped = False
            computed = request.num_computed_tokens = group.tick + request.offset
            request.num_placeholders = 1 if in_flight else 0
            request.num_output_tokens = computed + 1 - request.num_prompt_tokens - request.num_placeholders
            request.planned_step = self.step - 1
            if request.joined_step <= self._committed_step:
                request.emitted_step, request.emitted_s = self._committed_step, self._committed_s
            if in_flight and in_flight.together and request.joined_step < in_flight.last_step:
                in_flight.yielding = [*in_flight.yielding, request]
                in_flight.group_size -= 1
            self.kv.settle(request.sequence, computed)
            self.kv.cache(request.sequence, computed - request.num_placeholders)
        self._loose = dict.fromkeys(self.running)
        group.clear()

    def _expect_token(self, plan: Plan, request: RequestState) -> None:
        super()._expect_token(plan, request)
        if plan.together and request.num_computed_tokens < request.final_slots:
            self._join(request)


def _decodes(request: RequestState) -> bool:
    """Lacks exactly its newest token, and has more to come."""
    return (
        request.num_computed_tokens == request.num_tokens + request.num_placeholders - 1
        and 0 < request.num_computed_tokens < request.final_slots
    )
