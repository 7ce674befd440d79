"""Schedulers of replicas that share the work on a request: one computes the prompt, the other the output.

As vLLM does it with a connector that pulls (NIXL): the prefilling engine gets the request with one output
token and keeps the blocks of the prompt until they have been read; the decoding engine finds blocks for the
whole prompt, lets them be written while it goes on with others, and computes the last prompt token itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from servesim.engine.queues import FcfsQueue
from servesim.engine.scheduler import Scheduler
from servesim.engine.state import AdmissionFailure, Plan, RequestState, Status
from servesim.workload.request import Request

__all__ = ["DecodeScheduler", "PrefillScheduler"]


class _Kept:
    """Sequences that hold KV beside those of the running requests, as KVCacheManager's account counts."""

    def __init__(self) -> None:
        self.states: dict[int, RequestState] = {}
        self.computed = self.waste = 0

    def add(self, state: RequestState) -> None:
        """Its prompt is held from now on."""
        self.states[state.request.index] = state
        self._count(state, 1)

    def remove(self, index: int) -> RequestState:
        """No longer, or no longer here."""
        state = self.states.pop(index)
        self._count(state, -1)
        return state

    def _count(self, state: RequestState, sign: int) -> None:
        tokens = state.num_prompt_tokens
        self.computed += sign * tokens
        if tokens >= state.waste_from_slot:
            self.waste += sign * state.final_waste


class _Keeping(Scheduler):
    """A scheduler with sequences that hold KV and do not run."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._kept = _Kept()

    def levels(self) -> tuple[int, ...]:
        """What the KV pool's classes are made of, as scheduled so far: see kv.base.Account."""
        computed, waste, *rest = super().levels()
        return (computed + self._kept.computed, waste + self._kept.waste, *rest)

    def keeps_kv(self) -> bool:
        """Whether requests that do not run hold KV."""
        return bool(self._kept.states)


class PrefillScheduler(_Keeping):
    """Computes prompts; their blocks stay until ``release``."""

    def release(self, index: int) -> None:
        """The KV cache of a request has been read."""
        if index in self._kept.states:
            self.kv.free(self._kept.remove(index).sequence)
            self.news = True

    def has_kept(self, index: int) -> bool:
        """Whether the KV cache of an ended request is still here; a preemption may have cost it."""
        return index in self._kept.states

    def _finish(self, request: RequestState) -> None:
        if request.status is not Status.RUNNING:  # preempted while its only token was on its way
            super()._finish(request)
            return
        del self.running[request], self._loose[request]
        self._cache_at_end(request)
        self._kept.add(request)
        self._mark_finished(request)


class DecodeScheduler(_Keeping):
    """Decodes requests whose prompts are computed elsewhere.

    ``on_pull(request, tokens)`` is called when blocks were found for a prompt of which so many tokens must be
    pulled; ``received`` says that they are there. Waiting requests whose KV cache is there come first, the
    others in the order of the queue; a preempted one computes its tokens here.
    """

    on_pull: Callable[[Request, int], None]
    waiting: FcfsQueue  # priorities do not go with it

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.computes = set[int]()
        """Requests, by index, of which nothing can be pulled: their prompts are computed here."""
        self._remote = set[RequestState]()  # waiting for blocks to be pulled into
        self._ready: dict[RequestState, None] = {}  # waiting for a seat, KV cache complete

    def add(self, request: Request) -> RequestState:
        """Take a request in."""
        state = super().add(request)
        if state.status is Status.WAITING and request.index not in self.computes:
            self._remote.add(state)
        return state

    def received(self, index: int) -> None:
        """The KV cache of a request's prompt is complete."""
        state = self._kept.states[index]
        self.kv.cache(state.sequence, state.num_prompt_tokens)
        self._ready[state] = None
        self.news = True

    def _admit(self, plan: Plan, budget: int) -> bool:
        blocked = False
        for state in list(self._ready):
            if len(self.running) >= self.limits.max_num_seqs:
                self._deny(plan, state, AdmissionFailure.SEATS)
                blocked = True
            if blocked or budget <= 0:
                break
            self._begin(plan, state)
            budget -= 1
        settled, queue = True, self.waiting
        for state in queue:
            if blocked:
                break
            if state.status is Status.RUNNING or state.request.index in self._kept.states:
                continue
            if state in self._remote:
                blocked = not self._pull(plan, state)
                continue
            self.waiting, before = FcfsQueue([state]), len(plan.scheduled)
            settled = super()._admit(plan, budget)
            budget -= sum(tokens for _, tokens, _ in plan.scheduled[before:])
            blocked = bool(self.waiting)
        for state in plan.admitted:
            queue.remove(state)
        self.waiting = queue
        return settled

    def _begin(self, plan: Plan, state: RequestState) -> None:
        """Admit a request whose KV cache is there; its last prompt token is computed again."""
        del self._ready[state]
        self._kept.remove(state.request.index)
        self._start(plan, state, state.num_prompt_tokens - 1)
        plan.scheduled.append((state, 1, state.num_prompt_tokens - 1))

    def _pull(self, plan: Plan, state: RequestState) -> bool:
        """Find blocks for the whole prompt; whether there are enough."""
        kv, prompt_tokens = self.kv, state.num_prompt_tokens
        hit = kv.find_hit(state.sequence, prompt_tokens - 1)
        if kv.num_blocks_needed(state.sequence, prompt_tokens, hit) > kv.num_free_blocks:
            self._deny(plan, state, AdmissionFailure.MEMORY)
            return False
        kv.allocate(state.sequence, prompt_tokens, hit)
        state.cached_tokens = hit.num_tokens if hit else 0
        if hit:
            self.prefix_cache_queries += prompt_tokens
            self.prefix_cache_hits += state.cached_tokens
        self._remote.discard(state)
        self._kept.add(state)
        self.on_pull(state.request, prompt_tokens - state.cached_tokens)
        return True
