"""vLLM's scheduler before chunked prefill: steps that compute prompts, and steps that decode."""

from __future__ import annotations

from servesim.engine.scheduler import Scheduler
from servesim.engine.state import Plan

__all__ = ["PrefillFirstScheduler"]


class PrefillFirstScheduler(Scheduler):
    """Waiting requests come first: whole prompts in a step of their own, while everybody else stands still.

    A step decodes only when nobody can be admitted. One step at a time is in flight. Source: vLLM 0.1 to
    0.5, vllm/core/scheduler.py; the PagedAttention paper (arXiv 2309.06180, section 4.5).
    """

    _meets_newcomers = False

    _attempt: Plan  # this step's try to admit somebody
    _settled: bool  # whether its outcome lasts until news come

    def plan(self) -> Plan | None:
        """Schedule the next step; None when there is nothing to do."""
        return self._prefill() or super().plan()

    def plan_beside_group(self, draining: int, pending: bool) -> Plan | None:
        """As every scheduler's, but that those who wait do not join the group's step."""
        return self._prefill() or super().plan_beside_group(draining, pending)

    def _prefill(self) -> Plan | None:
        """Schedule a step of prompts; None when nobody can be admitted."""
        plan = self._attempt = self._open(0)
        plan.together = plan.coasts = False
        self._settled = super()._admit(plan, self.limits.max_num_batched_tokens)
        if not plan.scheduled:
            return None
        self._dissolve_group()  # its members yield no token in this step
        self._close(plan)
        return plan

    def _admit(self, plan: Plan, budget: int) -> bool:
        """Nobody joins a step that decodes; what stopped the attempt before it still does."""
        plan.lookup, plan.failure = self._attempt.lookup, self._attempt.failure
        return self._settled
