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

    def run(self, flight: Flight, now_s: float) -> Generator[Any, Any, tuple[float, Flight | None]]:
        """Go on from a plan that coasts and begins now; returns the time and what begins then, if anything.

        Returns where blocks may run short, where somebody is not let in whole, and once ``stop()`` is true.
        """
        scheduler, lead, ledger, stop = self._scheduler, self._lead, self._ledger, self._stop
        group, kv, pack, write = scheduler.group, scheduler.kv, self._log.steps.pack, self._log.steps.write
        next_event_s, wait_until, decode_steps = (
            self._next_event_s,
            self._wait_until,
            self._step_time.decode_steps,
        )
        members, waiting = group.members, scheduler.waiting
        levels, first_s, growth_s, num_steps = (
            flight.levels,
            flight.first_s,
            flight.growth_s,
            flight.num_steps,
        )
        step: Flight | _Newcomer | None = flight  # what is in flight; None: a row
        if not (flight.plan.scheduled or flight.plan.finishing):
            scheduler.drop_plans()
            step = None
        while True:
            # How many steps, when what follows them is decided, and when they end.
            steps, end_levels, event_s = 1, levels, next_event_s()
            if step is None:
                decodes = outputs = len(members)
                context_tokens, prefill_tokens = levels[0], 0
                last = 1 + group.steps_to_finish()
                steps = last if last < num_steps else num_steps
                break_s = now_s if waiting else event_s
                decided_s = now_s + duration_s(steps - lead, first_s, growth_s)
                if break_s <= decided_s:
                    begun = steps_until(break_s - now_s, first_s, growth_s) if break_s > now_s else 0
                    steps, decided_s = begun + lead, now_s + duration_s(begun, first_s, growth_s)
                end_s = now_s + duration_s(steps, first_s, growth_s)
                blocks = group.blocks_demanded(steps - 1) if steps > 1 else 0
                if blocks + decodes > kv.num_free_blocks or stop():
                    flight = Flight(scheduler.plan_of_group(lead))
                    flight.first_s, flight.growth_s, flight.num_steps = first_s, growth_s, num_steps
                    flight.begin(now_s, levels)
                    return now_s, flight
                if steps > 1:
                    scheduler.advance_group(steps - 1, blocks)
                    end_levels = scheduler.levels()
                ended = scheduler.pop_ended() if steps == last else []
            else:
                end_s = now_s + first_s
                decided_s = now_s if lead else end_s
                if isinstance(step, _Newcomer):
                    newcomer, shape, ended, _ = step
                    decodes, (context_tokens,), chunks, outputs, _, _ = shape
                    prefill_tokens = chunks[0][0] if chunks else 0
                elif len(members) > kv.num_free_blocks or stop():
                    return now_s, step
                else:
                    ended = []
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
            if isinstance(step, Flight):
                step.leave_behind(1)
                ledger.commit(step, 1, end_s)
            else:
                scheduler.commit_group(ended, steps, end_s)
                itl_samples = outputs
                if step is not None:
                    scheduler.greet(newcomer, end_s)
                    itl_samples -= 1
                write(pack(
                    now_s, first_s, growth_s, steps, decodes, outputs - decodes, prefill_tokens,
                    context_tokens, outputs, itl_samples, outputs, 0, 0, 0, *levels, *end_levels,
                ))  # fmt: skip
                self._log.end_s = end_s
                for request in ended:
                    ledger.end(request, end_s)
            now_s = end_s
            if not lead:
                while next_event_s() <= now_s:
                    yield wait_until(now_s)
                if waiting:
                    after = self._let_in(0, now_s)
                elif members:
                    scheduler.advance_group(1, group.blocks_demanded(1))
            step, levels = after, scheduler.levels()
            if step is None:
                if not members:
                    return now_s, None
                count = len(members)
                first_s, growth_s, num_steps = decode_steps(count, (levels[0],), (count,))
            elif isinstance(step, _Newcomer):
                first_s, growth_s = step.first_s, 0.0
            else:
                step.begin(now_s, levels)
                first_s = step.first_s
                if waiting or not step.plan.coasts:
                    return now_s, step

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
