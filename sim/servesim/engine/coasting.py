"""The innermost loop: rows of decode steps, one after another, as long as nothing is to be decided.

A row is a run of steps of the same requests; it lasts until the first of them ends. The loop does for a row
what a plan, its flight and its commit do for any step, without making them anew for each.
"""

from __future__ import annotations

from collections.abc import Callable

from servesim.cost.step_time import StepTime
from servesim.engine.events import Log
from servesim.engine.flight import Flight
from servesim.engine.ledger import Ledger
from servesim.engine.scheduler import Scheduler

__all__ = ["Coaster"]


class Coaster:
    """Completes whole rows of the decode group.

    ``lead``: steps scheduled ahead of the running one, 0 or 1. ``next_event_s()`` is when something else is
    due.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        step_time: StepTime,
        log: Log,
        ledger: Ledger,
        lead: int,
        next_event_s: Callable[[], float],
    ) -> None:
        self._scheduler = scheduler
        self._pace = step_time.decode_steps
        self._log = log
        self._ledger = ledger
        self._lead = lead
        self._next_event_s = next_event_s

    def run(self, flight: Flight, now_s: float) -> tuple[float, bool]:
        """Complete the plan that ``flight`` begins now, then rows; the flight is then at the begin of a row.

        Stops before a row in which another event is due, blocks may run short or the pace changes. Nobody may
        be waiting. Returns the time, and whether there is a row: not when all have ended, or when somebody
        must be heard before it is scheduled.
        """
        scheduler, lead, next_event_s = self._scheduler, self._lead, self._next_event_s
        kv, group, append, end = scheduler.kv, scheduler.group, self._log.steps.append, self._ledger.end
        first_s, growth_s, num_steps = flight.first_s, flight.growth_s, flight.num_steps
        levels = flight.levels
        count = len(group.members)
        begins = False
        if flight.plan.scheduled or flight.plan.finishing:
            end_s = now_s + first_s
            if (now_s if lead else end_s) >= next_event_s() or group.blocks_demanded(1) > kv.num_free_blocks:
                return now_s, True
            if lead and count:
                scheduler.schedule_group()
            flight.leave_behind(1)
            self._ledger.commit(flight, 1, end_s)
            now_s, begins = end_s, True
        while True:
            if begins:
                if not count or (not lead and (scheduler.news or next_event_s() <= now_s)):
                    self._log.end_s = now_s
                    scheduler.drop_plans()
                    return now_s, False
                if not lead:
                    scheduler.schedule_group()
                levels = scheduler.levels()
                first_s, growth_s, num_steps = self._pace(count, (levels[0],), (count,))
            more = group.steps_to_finish()
            decided_s = now_s + (more + 1 - lead) * (first_s + 0.5 * (more - lead) * growth_s)
            if more >= num_steps or decided_s >= next_event_s() or scheduler.news:
                break
            blocks = group.blocks_demanded(more)
            if blocks + count > kv.num_free_blocks:
                break
            end_s = now_s + (more + 1) * (first_s + 0.5 * more * growth_s)
            end_levels = levels
            if more:
                kv.grow(blocks)
                group.pass_steps(more)
                end_levels = scheduler.levels()
            ended = group.pop_ended()
            going_on = count - len(ended)
            if lead and going_on:
                scheduler.schedule_group()
            scheduler.commit_group(ended, more + 1, end_s)
            append(
                now_s, first_s, growth_s, more + 1, count, 0, 0, levels[0], count, count, count, 0, 0, 0,
                *levels, *end_levels,
            )  # fmt: skip
            now_s, count, begins = end_s, going_on, True
            for request in ended:
                end(request, now_s)
        if begins:
            flight.first_s, flight.growth_s, flight.num_steps = first_s, growth_s, num_steps
            flight.plan = scheduler.plan_of_group(lead)
            flight.begin(now_s, levels)
            self._log.end_s = now_s
        return now_s, True
