"""Commits what has been computed, and writes it down."""

from __future__ import annotations

from collections.abc import Callable
from math import nan

from servesim.engine.events import Log
from servesim.engine.flight import Flight
from servesim.engine.scheduler import Scheduler
from servesim.engine.state import RequestState
from servesim.workload.request import Request

__all__ = ["Ledger"]


class Ledger:
    """Has the scheduler process the output of steps, and writes their rows and the requests that end."""

    def __init__(self, scheduler: Scheduler, log: Log, on_end: Callable[[Request, float], None]) -> None:
        self._scheduler = scheduler
        self._log, self._rows, self._requests = log, log.steps, log.requests
        self._on_end = on_end
        self._keeps_kv = False

    def commit(self, flight: Flight, steps: int, now_s: float) -> None:
        """Process the output of a plan's last steps, which ended now, and write its row."""
        plan, shape = flight.plan, flight.plan.shape
        itl_samples, gaps = self._scheduler.commit(plan, now_s, steps)
        if gaps:
            self._log.itl_gaps_s.extend(gaps)
        self._log.end_s = now_s
        prefill_tokens = 0
        for tokens, _ in shape.chunks:
            prefill_tokens += tokens
        self._rows.write(self._rows.pack(
            flight.begun_s, flight.row_first_s, flight.growth_s,
            flight.done, shape.num_decodes, len(shape.chunks), prefill_tokens,
            shape.decode_context_tokens[0], shape.num_sampled - plan.num_discarded, itl_samples,
            plan.running - plan.num_draining, plan.waiting, len(plan.preempted), plan.failure,
            *flight.levels, *flight.end_levels,
        ))  # fmt: skip
        for state in plan.finishing:
            self.end(state, now_s)

    def rest(self, now_s: float) -> None:
        """Nothing runs for now: a row without steps says what is held meanwhile, if the last one does not."""
        scheduler, kept = self._scheduler, self._keeps_kv
        self._keeps_kv = scheduler.keeps_kv()
        if kept or self._keeps_kv:
            levels, nothing = scheduler.levels(), (0,) * 8
            self._rows.append(now_s, 0.0, 0.0, *nothing, len(scheduler.waiting), 0, 0, *levels, *levels)

    def end(self, state: RequestState, now_s: float) -> None:
        """A request has yielded its last token."""
        self.write(state, now_s)
        self._rows.seal()
        self._on_end(state.request, now_s)

    def refuse(self, state: RequestState) -> None:
        """A request was turned away when it arrived."""
        self.write(state)
        self._on_end(state.request, state.request.arrival_s)

    def write(self, state: RequestState, finish_s: float = nan) -> None:
        """Write down a request; NaN: it has not ended."""
        request = state.request
        self._requests.write(self._requests.pack(
            request.arrival_s, state.scheduled_s, state.first_token_s, finish_s,
            request.index, request.prompt_tokens, request.output_tokens, state.num_output_tokens,
            state.cached_tokens if state.cached_tokens > 0 else 0, state.num_preemptions, state.status,
        ))  # fmt: skip
