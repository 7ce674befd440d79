"""The innermost loop: everybody who runs decodes in the group, and who arrives is let in.

It does what the engine's loop does with plans and flights (engine/loop.py), without making them for the two
kinds of steps that are most frequent. A row is a run of steps of the group alone; it lasts until the first of
its members ends or somebody arrives. A newcomer's step computes the whole prompt of one request beside the
group, which it joins.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any, NamedTuple

from servesim.cost.step_time import StepShape, StepTime
from servesim.engine.events import Log
from servesim.engine.flight import Flight, duration_s, steps_until
from servesim.engine.ledger import Ledger
from servesim.engine.scheduler import Scheduler
from servesim.engine.state import RequestState

__all__ = ["Cruise"]


_NOBODY: list[RequestState] = []


class _Newcomer(NamedTuple):
    """A step of the group and of somebody's whole prompt, as scheduled."""

    request: RequestState
    shape: StepShape
    ended: list[RequestState]
    first_s: float


class Cruise:
    """Serves for as long as all that run decode together and nobody is left waiting.

    ``lead``: steps scheduled ahead of the running one, 0 or 1. ``set_pace`` asks the law of step time about a
    plan; ``next_event_s()`` is when something else is due, ``wait_until(time_s)`` the event to wait for.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        step_time: StepTime,
        log: Log,
        ledger: Ledger,
        lead: int,
        set_pace: Callable[[Flight], None],
        next_event_s: Callable[[], float],
        wait_until: Callable[[float], Any],
        stop: Callable[[], bool],
    ) -> None:
        self._scheduler = scheduler
        self._step_time = step_time
        self._log = log
        self._ledger = ledger
        self._lead = lead
        self._set_pace = set_pace
        self._next_event_s = next_event_s
        self._wait_until = wait_until
        self._stop = stop

    def run(self, begun: Flight, now_s: float) -> Generator[Any, Any, tuple[float, Flight | None]]:
        """Go on from a plan that coasts and begins now; returns the time and what begins then, if anything.

        Returns where blocks may run short, where somebody is not let in whole, and once ``stop()`` is true.
        """
        scheduler, lead, ledger, stop = self._scheduler, self._lead, self._ledger, self._stop
        group, kv, log, next_event_s = scheduler.group, scheduler.kv, self._log, self._next_event_s
        pack, write, decode_steps = log.steps.pack, log.steps.write, self._step_time.decode_steps
        members, waiting, wait_until = group.members, scheduler.waiting, self._wait_until
        levels, first_s, growth_s, num_steps = (
            begun.levels,
            begun.first_s,
            begun.growth_s,
            begun.num_steps,
        )
        # What is in flight: a plan, else a newcomer's step, else a row.
        flight: Flight | None = begun
        newcomer: _Newcomer | None = None
        if not (begun.plan.scheduled or begun.plan.finishing):
            scheduler.drop_plans()
            flight = None
        while True:
            # How many steps, when what follows them is decided, and when they end.
            steps, end_s, end_levels, event_s, ended = 1, now_s + first_s, levels, next_event_s(), _NOBODY
            decided_s = now_s if lead else end_s
            if flight is not None:
                if len(members) > kv.num_free_blocks or stop():
                    return now_s, flight
            elif newcomer is not None:
                request, shape, ended, _ = newcomer
                decodes, (context_tokens,), chunks, outputs, _, _ = shape
                itl_samples, prefill_tokens = outputs - 1, chunks[0][0] if chunks else 0
            else:
                decodes = outputs = itl_samples = len(members)
                context_tokens, prefill_tokens = levels[0], 0
                last = 1 + group.steps_to_finish()
                steps = last if last < num_steps else num_steps
                decided_s = now_s + duration_s(steps - lead, first_s, growth_s)
                break_s = now_s if waiting else event_s
                if break_s <= decided_s:
                    past = steps_until(break_s - now_s, first_s, growth_s) if break_s > now_s else 0
                    steps, decided_s = past + lead, now_s + duration_s(past, first_s, growth_s)
                blocks = group.blocks_demanded(steps - 1) if steps > 1 else 0
                if blocks + decodes > kv.num_free_blocks or stop():
                    return now_s, self._row_in_flight(now_s, first_s, growth_s, num_steps, levels)
                if steps > 1:
                    end_s = now_s + duration_s(steps, first_s, growth_s)
                    scheduler.advance_group(steps - 1, blocks)
                    end_levels = scheduler.levels()
                if steps == last:
                    ended = scheduler.pop_ended()
            after = None
            if lead:
                while event_s <= decided_s:
                    yield wait_until(decided_s)
                    event_s = next_event_s()
                if waiting:
                    after = self._let_in(len(ended), decided_s)
                elif members:
                    scheduler.advance_group(1, group.blocks_demanded(1))
            if event_s < end_s:
                yield wait_until(end_s)
            if flight is not None:
                flight.leave_behind(1)
                ledger.commit(flight, 1, end_s)
            else:
                scheduler.commit_group(ended, steps, end_s)
                if newcomer is not None:
                    scheduler.greet(request, end_s)
                write(pack(
                    now_s, first_s, growth_s, steps, decodes, outputs - decodes, prefill_tokens,
                    context_tokens, outputs, itl_samples, outputs, 0, 0, 0, *levels, *end_levels,
                ))  # fmt: skip
                log.end_s = end_s
                for each in ended:
                    ledger.end(each, end_s)
            now_s = end_s
            if not lead:
                while next_event_s() <= now_s:
                    yield wait_until(now_s)
                if waiting:
                    after = self._let_in(0, now_s)
                elif members:
                    scheduler.advance_group(1, group.blocks_demanded(1))
            flight, newcomer, levels = None, None, scheduler.levels()
            if after is None:
                count = len(members)
                if not count:
                    return now_s, None
                first_s, growth_s, num_steps = decode_steps(count, (levels[0],), (count,))
            elif isinstance(after, _Newcomer):
                newcomer, first_s, growth_s = after, after.first_s, 0.0
            else:
                flight, first_s = after, after.first_s
                flight.begin(now_s, levels)
                if waiting or not flight.plan.coasts:
                    return now_s, flight

    def _row_in_flight(
        self, now_s: float, first_s: float, growth_s: float, num_steps: int, levels: tuple[int, ...]
    ) -> Flight:
        """The row that begins now, for those who take over."""
        flight = Flight(self._scheduler.plan_of_group(self._lead))
        flight.first_s, flight.growth_s, flight.num_steps = first_s, growth_s, num_steps
        flight.begin(now_s, levels)
        return flight

    def _let_in(self, draining: int, now_s: float) -> Flight | _Newcomer | None:
        """Schedule the next step of the group and of those who have arrived."""
        scheduler = self._scheduler
        request = scheduler.newcomer()
        if request is not None:
            decodes = len(scheduler.group.members)
            cached, context_tokens, ended = scheduler.let_in(request)
            request.scheduled_s = now_s
            tokens = request.num_prompt_tokens - cached
            if tokens == 1 and cached:  # one token on a prefix is computed as a decode is
                shape = StepShape(decodes + 1, (context_tokens + cached + 1,), (), decodes + 1)
            else:
                shape = StepShape(decodes, (context_tokens,), ((tokens, cached),), decodes + 1)
            return _Newcomer(request, shape, ended, self._step_time.step_s(shape))
        plan = scheduler.plan_beside_group(draining, bool(self._lead))
        if plan is None:
            return None
        for state in plan.admitted:
            if state.num_preemptions == 0:
                state.scheduled_s = now_s
        flight = Flight(plan)
        self._set_pace(flight)
        return flight
