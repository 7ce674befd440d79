"""The clock: requests arrive, and the engine plans a step, waits for it, commits it."""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any

import simpy

from servesim.cost.step_time import StepTime
from servesim.engine.cruise import Cruise
from servesim.engine.events import Log
from servesim.engine.flight import Flight
from servesim.engine.ledger import Ledger
from servesim.engine.scheduler import Scheduler
from servesim.engine.state import Plan, Status
from servesim.workload.request import Request, Workload

__all__ = ["Engine", "simulate"]

Process = Generator[simpy.Event, Any, None]


def simulate(
    workload: Workload,
    scheduler: Scheduler,
    step_time: StepTime,
    *,
    pipeline_depth: int = 1,
    on_end: Callable[[float], None] = lambda now_s: None,
    stop: Callable[[], bool] = lambda: False,
) -> Log:
    """Serve a workload to its end and return what happened.

    ``on_end(now_s)`` is called after each request that ends. Once ``stop()`` is true the simulation ends
    early, and the log says so.
    """
    env = simpy.Environment()
    log = Log(scheduler.kv.account, len(scheduler.kv.levels()))

    def submit_later(request: Request) -> None:
        if request.arrival_s <= env.now:
            engine.submit(request)
        else:
            env.timeout(request.arrival_s - env.now).callbacks.append(lambda _: engine.submit(request))

    def ended(request: Request, now_s: float) -> None:
        on_end(now_s)
        next_request = workload.follow_up(request, now_s)
        if next_request is not None:
            submit_later(next_request)

    def arrive() -> Process:
        for request in workload.arrivals():
            if request.arrival_s > env.now:
                yield env.timeout(request.arrival_s - env.now)
            if log.interrupted:
                return
            engine.submit(request)

    engine = Engine(env, scheduler, step_time, log, pipeline_depth=pipeline_depth, on_end=ended, stop=stop)
    env.process(arrive())
    with _without_garbage_collection():
        env.run()
    engine.close()
    return log


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Leave out the search for cycles of references, a fifth of the time with a large prefix cache.

    A simulation makes no cycles that grow with it: references alone free what it drops.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


class Engine:
    """One engine: a scheduler, a step-time law and a log, driven by simulated time.

    ``pipeline_depth`` is the number of steps in flight: 1, or 2 with async scheduling, where the next step
    is scheduled while the GPU computes this one. ``on_end(request, now_s)`` is called for each request that
    ends or is refused.

    The engine keeps its own clock and lets simulated time catch up only when some other event is due before
    its step ends; until then nothing outside can matter.
    """

    def __init__(
        self,
        env: simpy.Environment,
        scheduler: Scheduler,
        step_time: StepTime,
        log: Log,
        *,
        pipeline_depth: int,
        on_end: Callable[[Request, float], None],
        stop: Callable[[], bool],
    ) -> None:
        self._env = env
        self._scheduler = scheduler
        self._step_time = step_time
        self._log = log
        self._depth = pipeline_depth
        self._stop = stop
        self._now_s = 0.0
        self._flights: deque[Flight] = deque()
        self._idle: simpy.Event | None = None
        self._ledger = Ledger(scheduler, log, on_end)
        self._cruise = None
        if step_time.windows == (None,):
            self._cruise = Cruise(
                scheduler, step_time, log, self._ledger, pipeline_depth - 1,
                self._set_pace, env.peek, lambda time_s: env.timeout(time_s - env.now),
            )  # fmt: skip
        env.process(self._serve())

    def submit(self, request: Request) -> None:
        """A request arrives now."""
        state = self._scheduler.add(request)
        if state.status is Status.REFUSED:
            self._ledger.refuse(state)
        elif self._idle is not None:
            self._idle.succeed()
            self._idle = None

    def close(self) -> None:
        """Write down the requests that are still here, and the counters."""
        scheduler = self._scheduler
        for state in scheduler.unfinished():
            self._ledger.write(state)
        self._log.counters = {
            "steps": scheduler.step,
            "preemptions": scheduler.num_preemptions,
            "prefix_cache_queries": scheduler.prefix_cache_queries,
            "prefix_cache_hits": scheduler.prefix_cache_hits,
            "evicted_blocks": scheduler.kv.evictions,
            **scheduler.counters(),
        }

    def _serve(self) -> Process:
        env, scheduler, flights = self._env, self._scheduler, self._flights
        while not self._stop():
            while env.peek() <= self._now_s:  # what is due by now comes first
                yield env.timeout(self._now_s - env.now)
            if flights and flights[0].plan.coasts and not scheduler.news:
                if self._cruise and not (scheduler.waiting or flights[0].done):
                    self._now_s, flight = yield from self._cruise.run(flights.popleft(), self._now_s)
                    if flight is not None:
                        flights.append(flight)
                    if flight is None or scheduler.news or env.peek() <= self._now_s:
                        continue
                yield from self._coast(flights[0])
                if env.peek() <= self._now_s or len(flights) == self._depth:
                    continue
            plan = scheduler.plan()
            if plan is not None:
                self._take_off(plan)
                if len(flights) < self._depth or (plan.coasts and len(flights) == 1):
                    continue
            if flights:
                yield from self._finish(flights[0])
            else:
                self._idle = env.event()
                yield self._idle
                self._now_s = env.now
        self._log.interrupted = True

    def _take_off(self, plan: Plan) -> None:
        for state in plan.admitted:
            if state.num_preemptions == 0:
                state.scheduled_s = self._now_s
        flight = Flight(plan)
        self._set_pace(flight)
        self._flights.append(flight)
        if len(self._flights) == 1:
            self._begin(flight)

    def _set_pace(self, flight: Flight) -> None:
        plan = flight.plan
        if plan.coasts and not plan.scheduled:
            flight.first_s, flight.growth_s, flight.num_steps = self._step_time.decode_steps(
                plan.group_size, plan.shape.decode_context_tokens, self._scheduler.group.context_growth()
            )
        elif plan.shape.num_sampled or plan.shape.chunks:
            flight.first_s = self._step_time.step_s(plan.shape)

    def _begin(self, flight: Flight) -> None:
        """The GPU begins with a plan."""
        flight.begin(self._now_s, self._scheduler.levels())

    def _coast(self, flight: Flight) -> Process:
        """Let the decode group run until somebody ends or something else must be decided.

        With async scheduling a step more than has ended is scheduled when this returns.
        """
        env, scheduler, lead = self._env, self._scheduler, self._depth - 1
        steps = scheduler.segment(flight.plan, flight.num_steps) - lead
        if steps < 1:
            return
        end_s, horizon_s = self._now_s + flight.duration_s(steps), env.peek()
        if end_s > horizon_s:
            steps = min(steps, flight.steps_until(horizon_s - self._now_s))
            end_s = self._now_s + flight.duration_s(steps)
        scheduler.extend(flight.plan, steps - 1 + lead)
        flight.end_levels = scheduler.levels()
        if end_s > horizon_s:
            yield env.timeout(end_s - env.now)
        self._now_s = end_s
        flight.leave_behind(steps)
        if lead:
            scheduler.commit_repetitions(steps, end_s)
        else:
            self._flights.popleft()
            self._ledger.commit(flight, steps, end_s)

    def _finish(self, flight: Flight) -> Process:
        """Wait for the one step in flight and commit it."""
        env = self._env
        end_s = self._now_s + flight.first_s
        if end_s > env.peek():
            yield env.timeout(end_s - env.now)
        self._now_s = end_s
        flight.leave_behind(1)
        self._flights.popleft()
        self._ledger.commit(flight, 1, end_s)
        if self._flights:
            self._begin(self._flights[0])
