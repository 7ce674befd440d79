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
from servesim.engine.state import RequestState

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
    ) -> None:
        self._scheduler = scheduler
        self._step_time = step_time
        self._log = log
        self._ledger = ledger
        self._lead = lead
        self._set_pace = set_pace
        self._next_event_s = next_event_s
        self._wait_until = wait_until

    def run(self, flight: Flight, now_s: float) -> Generator[Any, Any, tuple[float, Flight | None]]:
        """Go on from a plan that coasts and begins now; returns the time and what begins then, None if nothing.

        Returns where blocks may run short and where somebody is not let in whole.
        """
        scheduler, lead, next_event_s, ledger = self._scheduler, self._lead, self._next_event_s, self._ledger
        group, kv, append, pace = (
            scheduler.group,
            scheduler.kv,
            self._log.steps.append,
            self._step_time.decode_steps,
        )
        alone = not (flight.plan.scheduled or flight.plan.finishing)  # a row of the group, not a plan
        if alone:
            scheduler.drop_plans()
        while True:
            count, levels, ended = len(group.members), flight.levels, list[RequestState]()
            # When the step after these is decided, and when they end.
            more, end_s = 0, now_s + flight.first_s
            decided_s = now_s if lead else end_s
            if alone:
                more, decided_s, end_s = self._row(flight, now_s)
            blocks = group.blocks_demanded(more)
            if blocks + count > kv.num_free_blocks:
                if alone:
                    flight.plan = scheduler.plan_of_group(lead)
                return now_s, flight
            if more:
                scheduler.advance_group(more, blocks)
                levels = scheduler.levels()
            while next_event_s() <= decided_s:
                yield self._wait_until(decided_s)
            if alone:
                ended = scheduler.pop_ended()
            after = self._plan(len(ended), decided_s) if lead else None
            if alone:
                scheduler.commit_group(ended, more + 1, end_s)
                append(
                    now_s, flight.first_s, flight.growth_s, more + 1, count, 0, 0, flight.levels[0],
                    count, count, count, 0, 0, 0, *flight.levels, *levels,
                )  # fmt: skip
                self._log.end_s = end_s
                for request in ended:
                    ledger.end(request, end_s)
            else:
                flight.leave_behind(1)
                ledger.commit(flight, 1, end_s)
            now_s = end_s
            if not lead:
                while next_event_s() <= now_s:  # who follows those that have ended
                    yield self._wait_until(now_s)
                after = self._plan(0, now_s)
            if after is not None:
                alone, flight = False, after
                flight.begin(now_s, scheduler.levels())
                if scheduler.waiting or not flight.plan.coasts:
                    return now_s, flight
            elif group.members:
                if not alone:
                    alone, flight = True, Flight(flight.plan)
                levels = scheduler.levels()
                count = len(group.members)
                flight.first_s, flight.growth_s, flight.num_steps = pace(count, (levels[0],), (count,))
                flight.begin(now_s, levels)
            else:
                return now_s, None

    def _row(self, flight: Flight, now_s: float) -> tuple[int, float, float]:
        """Steps of the row after its first, when the step after the row is decided, and when the row ends."""
        lead, event_s = self._lead, self._next_event_s()
        more = min(self._scheduler.group.steps_to_finish(), flight.num_steps - 1)
        decided_s = now_s + flight.duration_s(more + 1 - lead)
        if event_s <= decided_s:
            steps = flight.steps_until(event_s - now_s) if event_s > now_s else 0
            more, decided_s = steps - 1 + lead, now_s + flight.duration_s(steps)
        return more, decided_s, now_s + flight.duration_s(more + 1)

    def _plan(self, draining: int, now_s: float) -> Flight | None:
        """Schedule the next step: of the group alone, or with those who have arrived, whose plan takes off."""
        scheduler = self._scheduler
        if not scheduler.waiting:
            if scheduler.group.members:
                scheduler.advance_group(1, scheduler.group.blocks_demanded(1))
            return None
        plan = scheduler.plan_beside_group(draining, bool(self._lead))
        if plan is None:
            return None
        for state in plan.admitted:
            if state.num_preemptions == 0:
                state.scheduled_s = now_s
        flight = Flight(plan)
        self._set_pace(flight)
        return flight
