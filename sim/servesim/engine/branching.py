"""Requests of several sequences that are scheduled as one: parallel sampling and beam search.

As vLLM's sequence groups up to its V0 engine: a prompt is computed once, then all sequences of the request
decode in the same steps, and are preempted together.
"""

from __future__ import annotations

from servesim.engine.beams import BeamSearch
from servesim.engine.scheduler import SchedulerLimits
from servesim.engine.state import Plan, RequestState, Status
from servesim.engine.swapping import SwappingScheduler
from servesim.engine.versions import Rules
from servesim.kv.forked import ForkedKVCache
from servesim.kv.host import SwapSpace
from servesim.workload.request import Request

__all__ = ["BranchingScheduler"]


class BranchingScheduler(SwappingScheduler):
    """Each request stands for ``kv.width`` sequences of equal length; ``beams`` says how they re-parent.

    ``limits.max_num_seqs`` counts sequences. A request's tokens, computed or put out, are those of one of its
    sequences; steps count all.
    """

    kv: ForkedKVCache

    def __init__(
        self,
        limits: SchedulerLimits,
        rules: Rules,
        kv: ForkedKVCache,
        windows: tuple[int | None, ...] = (None,),
        *,
        space: SwapSpace,
        beams: BeamSearch | None = None,
    ) -> None:
        groups = limits._replace(max_num_seqs=max(limits.max_num_seqs // kv.width, 1))
        super().__init__(groups, rules, kv, windows, space=space, one_by_one=True)
        self._draft_rows = kv.width - 1  # a decoding request takes a row for each of its sequences
        self._beams = beams

    def add(self, request: Request) -> RequestState:
        """Take a request in; its sequences have ends of their own once they have their first token."""
        state = super().add(request)
        if state.output_limit > 1:
            state.waste_from_slot = max(state.waste_from_slot, request.prompt_tokens + 1)
        else:
            state.final_waste //= self.kv.width
        return state

    def counters(self) -> dict[str, int]:
        """Blocks copied on write beside what swapping counts."""
        return {**super().counters(), "copied_blocks": self.kv.num_copies}

    def commit(self, plan: Plan, now_s: float, steps: int = 1) -> tuple[int, list[float]]:
        """Process a step's output; the beams that go on take over their parents' blocks."""
        result = super().commit(plan, now_s, steps)
        if self._beams is not None:
            for request in plan.yielding:
                parents = self._beams.parents(request)
                if request.status is Status.RUNNING and request.num_output_tokens > 1:
                    self.kv.branch(request.sequence, parents)
        return result

    def _advance(self, plan: Plan) -> None:
        """The step's shape, every sequence counted.

        Sequences that are recomputed after a preemption share their prompt only.
        """
        super()._advance(plan)
        width, shape, chunks = self.kv.width, plan.shape, list[tuple[int, int]]()
        for request, tokens, before in plan.scheduled:
            if tokens == 1 and before:
                continue
            chunks.append((tokens, before))
            output_from = max(before, request.num_prompt_tokens)
            if before + tokens > output_from:
                chunks += [(before + tokens - output_from, output_from)] * (width - 1)
        plan.shape = shape._replace(
            num_decodes=shape.num_decodes * width,
            decode_context_tokens=tuple(context * width for context in shape.decode_context_tokens),
            chunks=tuple(chunks),
            num_sampled=shape.num_sampled * width,
        )
