"""Request-level batching, as FasterTransformer's server did it: a batch begins and ends as one."""

from __future__ import annotations

from typing import Any

from servesim.engine.orca import whole_prompts
from servesim.engine.scheduler import Scheduler, SchedulerLimits
from servesim.engine.state import AdmissionFailure, Plan, RequestState
from servesim.engine.versions import Rules
from servesim.kv.base import KVCacheManager

__all__ = ["StaticScheduler"]


class StaticScheduler(Scheduler):
    """When a batch has ended, the next is made of all who wait and fit; it ends with its longest request.

    A request that has its last token keeps its seat and its memory, and its answer is returned with the
    batch. It stays a row of every matrix product and of the LM head; attention skips it, as the kernels of
    FasterTransformer do (decoder_masked_multihead_attention, ``finished``). Prompts are computed at their own
    lengths, without padding. Memory must be reserved: nobody is preempted. Source: Orca (OSDI 2022, section
    2) and the PagedAttention paper (arXiv 2309.06180, section 6.1).
    """

    def __init__(
        self,
        limits: SchedulerLimits,
        rules: Rules,
        kv: KVCacheManager[Any],
        windows: tuple[int | None, ...] = (None,),
    ) -> None:
        super().__init__(whole_prompts(limits), rules, kv, windows, one_by_one=True)
        self._num_ended = 0  # of the batch; they have their last token or are about to get it

    def plan(self) -> Plan | None:
        """Schedule the next step; None when there is nothing to do."""
        plan = self._open(0)
        plan.together = plan.coasts = False
        if not self.running:
            self._num_ended = 0
            self._admit(plan, self.limits.max_num_batched_tokens)
        else:
            self._schedule_running(plan)
            if self.waiting:
                self._deny(plan, self.waiting.head, AdmissionFailure.SEATS)
        if not plan.scheduled:
            return None
        self._close(plan)
        return plan

    def _held(self) -> tuple[int, int]:
        """As every scheduler's; what an ended request still holds is wasted."""
        computed = waste = 0
        for request in self.running:
            waste += request.final_waste
            if self._has_ended(request):
                waste += request.final_slots
            else:
                computed += request.num_computed_tokens
        return computed, waste

    def _has_ended(self, request: RequestState) -> bool:
        """Whether it got its last token before the step that was scheduled last."""
        return request.num_computed_tokens >= request.final_slots and request.planned_step < self.step - 1

    def _advance(self, plan: Plan) -> None:
        padded = plan.num_discarded = self._num_ended
        super()._advance(plan)
        shape = plan.shape
        plan.shape = shape._replace(
            num_decodes=shape.num_decodes + padded, num_sampled=shape.num_sampled + padded
        )

    def _expect_token(self, plan: Plan, request: RequestState) -> None:
        super()._expect_token(plan, request)
        self._num_ended += request.num_computed_tokens >= request.final_slots
        plan.finishing = list(self.running) if self._num_ended == len(self.running) else []
