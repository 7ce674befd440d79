"""The innermost loop: everybody who runs decodes in the group, and who arrives is let in.

It does what the engine's loop does with plans and flights (engine/loop.py), without making them for steps of
the group alone: those come in rows. A row is a run of steps of the same requests; it lasts until the first of
them ends or somebody arrives.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

from servesim.cost.step_time import StepTime
from servesim.engine.events import Log
from servesim.engine.flight import Flight
from servesim.engine.ledger import Ledger
from servesim.engine.scheduler import Scheduler

__all__ = ["Cruise"]


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
        scheduler, lead, next_event_s, ledger = self._scheduler, self._lead, self._next_event_s, self._ledger
        group, kv, pack, write = scheduler.group, scheduler.kv, self._log.steps.pack, self._log.steps.write
        decode_steps, duration_s = self._step_time.decode_steps, Flight.duration_s
        members = group.members
        alone = not (flight.plan.scheduled or flight.plan.finishing)  # a row of the group, not a plan
        if alone:
            scheduler.drop_plans()
        while True:
            # The steps after the first, when what follows them is decided, and when they end.
            count, levels, more, decided_s = len(members), flight.levels, 0, now_s
            end_s = now_s + flight.first_s
            if alone:
                more, event_s = group.steps_to_finish(), now_s if scheduler.waiting else next_event_s()
                if more >= flight.num_steps:
                    more = flight.num_steps - 1
                decided_s += duration_s(flight, more + 1 - lead)
                if event_s <= decided_s:
                    steps = flight.steps_until(event_s - now_s) if event_s > now_s else 0
                    more, decided_s = steps - 1 + lead, now_s + duration_s(flight, steps)
                end_s = now_s + duration_s(flight, more + 1)
            elif not lead:
                decided_s = end_s
            blocks = group.blocks_demanded(more) if more else 0
            if blocks + count > kv.num_free_blocks or self._stop():
                if alone:
                    flight.plan = scheduler.plan_of_group(lead)
                return now_s, flight
            if more:
                scheduler.advance_group(more, blocks)
                levels = scheduler.levels()
            ended = scheduler.pop_ended() if alone else []
            after = None
            if lead:
                while next_event_s() <= decided_s:
                    yield self._wait_until(decided_s)
                if scheduler.waiting:
                    after = self._let_in(len(ended), decided_s)
                elif members:
                    scheduler.advance_group(1, group.blocks_demanded(1))
            if next_event_s() < end_s:
                yield self._wait_until(end_s)
            if alone:
                scheduler.commit_group(ended, more + 1, end_s)
                write(pack(
                    now_s, flight.first_s, flight.growth_s, more + 1, count, 0, 0, flight.levels[0],
                    count, count, count, 0, 0, 0, *flight.levels, *levels,
                ))  # fmt: skip
                self._log.end_s = end_s
                for request in ended:
                    ledger.end(request, end_s)
            else:
                flight.leave_behind(1)
                ledger.commit(flight, 1, end_s)
            now_s = end_s
            if not lead:
                while next_event_s() <= now_s:
                    yield self._wait_until(now_s)
                if scheduler.waiting:
                    after = self._let_in(0, now_s)
                elif members:
                    scheduler.advance_group(1, group.blocks_demanded(1))
            if after is not None:
                alone, flight = False, after
                flight.begin(now_s, scheduler.levels())
                if scheduler.waiting or not flight.plan.coasts:
                    return now_s, flight
            elif members:
                if not alone:
                    alone, flight = True, Flight(flight.plan)
                count, levels = len(members), scheduler.levels()
                flight.first_s, flight.growth_s, flight.num_steps = decode_steps(
                    count, (levels[0],), (count,)
                )
                flight.begin(now_s, levels)
            else:
                return now_s, None

    def _let_in(self, draining: int, now_s: float) -> Flight | None:
        """Schedule the next step of the group and of those who have arrived."""
        plan = self._scheduler.plan_beside_group(draining, bool(self._lead))
        if plan is None:
            return None
        for state in plan.admitted:
            if state.num_preemptions == 0:
                state.scheduled_s = now_s
        flight = Flight(plan)
        self._set_pace(flight)
        return flight
