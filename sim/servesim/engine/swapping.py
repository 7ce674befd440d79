"""Preemption by swapping: a victim's blocks wait in host memory, and nobody is admitted until it is back.

As vLLM did up to its V0 engine (PagedAttention paper, arXiv 2309.06180, sections 4.3 and 4.5). A victim for
which there is no room computes its tokens anew.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from servesim.engine.scheduler import Scheduler, SchedulerLimits
from servesim.engine.state import AdmissionFailure, Plan, RequestState, Status
from servesim.engine.versions import Rules
from servesim.kv.base import KVCacheManager
from servesim.kv.host import SwapSpace, Traffic

__all__ = ["SwappingScheduler"]


class SwappingScheduler(Scheduler):
    """The scheduler with a swap space; ``kv`` must know ``suspend``. Not for async scheduling."""

    _meets_newcomers = False

    def __init__(
        self,
        limits: SchedulerLimits,
        rules: Rules,
        kv: KVCacheManager[Any],
        windows: tuple[int | None, ...] = (None,),
        *,
        space: SwapSpace,
        one_by_one: bool = False,
    ) -> None:
        super().__init__(limits, rules, kv, windows, one_by_one=one_by_one)
        self.space = space
        self.num_swapped_out = self.num_swapped_in = 0  # blocks
        self.num_recomputed = 0  # victims that found no room
        self._swapped: deque[RequestState] = deque()  # first preempted, first back
        self._moved = Traffic()  # blocks that the next step moves

    def counters(self) -> dict[str, int]:
        """Blocks swapped, and preemptions that had to recompute."""
        return {
            **super().counters(),
            "swapped_out_blocks": self.num_swapped_out,
            "swapped_in_blocks": self.num_swapped_in,
            "preemptions_recomputed": self.num_recomputed,
        }

    @property
    def num_unfinished(self) -> int:
        """Requests that are running, swapped out or waiting."""
        return super().num_unfinished + len(self._swapped)

    def unfinished(self) -> list[RequestState]:
        """The requests that are running, swapped out or waiting."""
        return [*super().unfinished(), *self._swapped]

    def _open(self, group_size: int) -> Plan:
        plan = super()._open(group_size)
        if self._swapped:  # nobody is alone
            self._threshold = self.limits.long_prefill_token_threshold
        return plan

    def _preempt(self, plan: Plan, victim: RequestState) -> None:
        """Move the victim's blocks out if they fit; else free them."""
        blocks = self._physical_blocks(victim)
        if not self.space.has_room(blocks):
            self.num_recomputed += 1
            super()._preempt(plan, victim)
            return
        self.kv.suspend(victim.sequence)  # type: ignore[attr-defined]
        self._count(self.space.put(victim, blocks))
        self.num_swapped_out += blocks
        del self.running[victim], self._loose[victim]
        victim.status = Status.WAITING
        victim.num_preemptions += 1
        self.num_preemptions += 1
        self._swapped.append(victim)
        plan.preempted.append(victim)

    def _physical_blocks(self, request: RequestState) -> int:
        blocks: int = request.sequence.num_blocks
        return blocks

    def _admit(self, plan: Plan, budget: int) -> bool:
        """Bring back who was swapped out, in order; nobody is admitted before all of them are back.

        Until then every step is planned anew: its blocks may do for the first of them.
        """
        kv, limits = self.kv, self.limits
        while self._swapped:
            request = self._swapped[0]
            want = min(self._want(request), budget)
            if want <= 0 or len(self.running) >= limits.max_num_seqs:
                plan.failure = AdmissionFailure.SEATS
                return False
            before = request.num_computed_tokens
            free = kv.num_free_blocks - (limits.watermark_blocks if self.running else 0)
            if kv.num_blocks_needed(request.sequence, self._slots(before + want), None) > free:
                plan.failure = AdmissionFailure.MEMORY
                return False
            self._swapped.popleft()
            moved = self.space.take(request)
            self._count(moved)
            self.num_swapped_in += sum(moved)
            self._start(plan, request, before)
            self._schedule(plan, request, want)
            budget -= want + self._draft_rows
        return super()._admit(plan, budget)

    def _count(self, moved: Traffic) -> None:
        self._moved = Traffic(self._moved.host + moved.host, self._moved.disk + moved.disk)

    def _advance(self, plan: Plan) -> None:
        super()._advance(plan)
        plan.waiting += len(self._swapped)
        if any(self._moved) and (plan.shape.num_sampled or plan.shape.chunks):
            plan.shape = plan.shape._replace(swapped_blocks=self._moved)
            self._moved = Traffic()
