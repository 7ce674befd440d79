"""Orca's scheduler: batching step by step, with memory reserved for a request before it starts."""

from __future__ import annotations

from typing import Any

from servesim.engine.scheduler import Scheduler, SchedulerLimits
from servesim.engine.versions import Rules
from servesim.kv.base import KVCacheManager

__all__ = ["OrcaScheduler", "whole_prompts"]

_NO_LIMIT = 1 << 60


def whole_prompts(limits: SchedulerLimits) -> SchedulerLimits:
    """Limits under which a prompt is computed in one step, however long the step gets."""
    return limits._replace(
        max_num_batched_tokens=_NO_LIMIT, enable_chunked_prefill=False, long_prefill_token_threshold=0
    )


class OrcaScheduler(Scheduler):
    """Iteration-level scheduling, first come, first served; a new request's whole prompt joins the decodes.

    The batch is limited by max_num_seqs and by the memory that the allocator reserves; Orca reserves
    max_tokens slots (OSDI 2022, section 4.2). Selective batching is how it computes such a step: attention
    by request, all else for all tokens together, as every law of step time here assumes (section 4.1).
    """

    def __init__(
        self,
        limits: SchedulerLimits,
        rules: Rules,
        kv: KVCacheManager[Any],
        windows: tuple[int | None, ...] = (None,),
        *,
        one_by_one: bool = False,
    ) -> None:
        super().__init__(whole_prompts(limits), rules, kv, windows, one_by_one=one_by_one)
