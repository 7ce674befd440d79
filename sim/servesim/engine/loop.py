"""The clock: requests arrive, and the engine plans a step, waits for it, commits it."""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from heapq import heappop, heappush
from typing import Any

import simpy

from servesim.cost.step_time import StepTime
from servesim.engine.cruise import Cruise
from servesim.engine.events import Log
from servesim.engine.flight import Flight
from servesim.engine.ledger import Ledger
from servesim.engine.scheduler import Scheduler
from servesim.engine.state import REFUSED, Plan, RequestState
from servesim.workload.request import Request, Workload

__all__ = ["Engine", "Process", "Traffic", "run_to_end", "simulate"]

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
    env, log = simpy.Environment(), Log(scheduler.kv.account, len(scheduler.kv.levels()))
    traffic = Traffic(env, workload, lambda request: engine.submit(request), on_end, lambda: log.interrupted)
    engine = Engine(
        env, scheduler, step_time, log, pipeline_depth=pipeline_depth, next_event_s=env.peek,
        on_end=traffic.ended, stop=stop,
    )  # fmt: skip
    run_to_end(env)
    engine.close()
    return log


class Traffic:
    """Hands the requests of a workload over when they are due.

    ``submit(request)`` is called at its arrival, ``on_end(now_s)`` after each request that ends. Nobody
    arrives any more once ``is_over()``.
    """

    def __init__(
        self,
        env: simpy.Environment,
        workload: Workload,
        submit: Callable[[Request], None],
        on_end: Callable[[float], None],
        is_over: Callable[[], bool],
    ) -> None:
        self._env, self._workload = env, workload
        self._submit, self._on_end, self._is_over = submit, on_end, is_over
        self.due_s: list[float] = []
        """When requests will be submitted, and whatever else concerns all engines; soonest first."""
        self.has_begun_all = False
        """No request is left that depends on no other one."""
        self._due_now = deque[Request]()
        env.process(self._arrive())

    def ended(self, request: Request, now_s: float) -> None:
        """A request is over; what follows on it is submitted when it is due."""
        self._on_end(now_s)
        next_request = self._workload.follow_up(request, now_s)
        if next_request is not None:
            self._submit_later(next_request)

    def _arrive(self) -> Process:
        env, due_s, submit, is_over = self._env, self.due_s, self._submit, self._is_over
        for request in self._workload.arrivals():
            now_s = env.now
            if request.arrival_s > now_s:
                delay_s = request.arrival_s - now_s
                heappush(due_s, now_s + delay_s)  # as SimPy rounds it
                yield env.timeout(delay_s)
                heappop(due_s)
            if is_over():
                break
            submit(request)
        self.has_begun_all = True

    def _submit_later(self, request: Request) -> None:
        env = self._env

        def arrived(_: simpy.Event) -> None:
            heappop(self.due_s)
            self._submit(request)

        if request.arrival_s <= env.now:
            self._submit_now(request)
        else:
            delay_s = request.arrival_s - env.now
            heappush(self.due_s, env.now + delay_s)
            env.timeout(delay_s).callbacks.append(arrived)

    def _submit_now(self, request: Request) -> None:
        """Submit one after the other: a request that is refused lets the next one follow on the spot."""
        due_now = self._due_now
        due_now.append(request)
        if len(due_now) == 1:  # else whoever submits the first one goes on with this one
            while due_now:
                self._submit(due_now[0])
                due_now.popleft()


def run_to_end(env: simpy.Environment) -> None:
    """Let simulated time pass until nothing is left to happen."""
    with _without_garbage_collection():
        env.run()


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

    The engine keeps its own clock and lets simulated time catch up only when something that may matter to it
    is due before its step ends: ``next_event_s()`` is when. ``cruises``: it may plan without saying when.
    """

    def __init__(
        self,
        env: simpy.Environment,
        scheduler: Scheduler,
        step_time: StepTime,
        log: Log,
        *,
        pipeline_depth: int,
        next_event_s: Callable[[], float],
        on_end: Callable[[Request, float], None],
        stop: Callable[[], bool],
        cruises: bool = True,
    ) -> None:
        self._env = env
        self._scheduler = scheduler
        self._step_time = step_time
        self._log = log
        self._depth = pipeline_depth
        self._next_event_s = next_event_s
        self._stop = stop
        self._now_s = float(env.now)
        self._flights: deque[Flight] = deque()
        self._idle: simpy.Event | None = None
        self._ledger = Ledger(scheduler, log, on_end)
        self._cruise = None
        if step_time.windows == (None,) and cruises:
            self._cruise = Cruise(
                scheduler, step_time, log, self._ledger, pipeline_depth - 1,
                self._set_pace, next_event_s, lambda time_s: env.timeout(time_s - env.now), stop,
            )  # fmt: skip
        self.process = env.process(self._serve())

    @property
    def now_s(self) -> float:
        """Its own clock, when the scheduler plans: at or after simulated time."""
        return self._now_s

    def submit(self, request: Request) -> None:
        """A request arrives now."""
        state = self._scheduler.add(request)
        if state.status is REFUSED:
            self._ledger.refuse(state)
        else:
            self.wake()

    def wake(self) -> None:
        """Look again for something to do, if there was nothing."""
        if self._idle is not None:
            self._idle.succeed()
            self._idle = None

    def land(self) -> Process:
        """Complete the steps that are scheduled, after the engine has stopped."""
        while self._flights:
            yield from self._finish(self._flights[0])
        if self._now_s > self._env.now:
            yield self._env.timeout(self._now_s - self._env.now)

    def write(self, state: RequestState) -> None:
        """Write down a request that has not ended."""
        self._ledger.write(state)

    def close(self) -> None:
        """Write down the requests that are still here, and the counters."""
        for state in self._scheduler.unfinished():
            self._ledger.write(state)
        self.count()

    def count(self) -> None:
        """Add the counters to those of the log."""
        scheduler, before = self._scheduler, self._log.counters
        counters = {
            "steps": scheduler.step,
            "preemptions": scheduler.num_preemptions,
            "prefix_cache_queries": scheduler.prefix_cache_queries,
            "prefix_cache_hits": scheduler.prefix_cache_hits,
            "evicted_blocks": scheduler.kv.evictions,
            **scheduler.counters(),
        }
        self._log.counters = {name: before.get(name, 0) + value for name, value in counters.items()}

    def _serve(self) -> Process:
        env, scheduler, flights, next_event_s = self._env, self._scheduler, self._flights, self._next_event_s
        while not self._stop():
            while next_event_s() <= self._now_s:  # what is due by now comes first
                yield env.timeout(self._now_s - env.now)
            if flights and flights[0].plan.coasts and not scheduler.news:
                if self._cruise and not (scheduler.waiting or flights[0].done):
                    self._now_s, flight = yield from self._cruise.run(flights.popleft(), self._now_s)
                    if flight is not None:
                        flights.append(flight)
                    if flight is None or scheduler.news or next_event_s() <= self._now_s or self._stop():
                        continue
                yield from self._coast(flights[0])
                if next_event_s() <= self._now_s or len(flights) == self._depth:
                    continue
            plan = scheduler.plan()
            if plan is not None:
                self._take_off(plan)
                if len(flights) < self._depth or (plan.coasts and len(flights) == 1):
                    continue
            if flights:
                yield from self._finish(flights[0])
            elif not self._stop():
                self._ledger.rest(self._now_s)
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
        end_s, horizon_s = self._now_s + flight.duration_s(steps), self._next_event_s()
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
        if end_s > self._next_event_s():
            yield env.timeout(end_s - env.now)
        self._now_s = end_s
        flight.leave_behind(1)
        self._flights.popleft()
        self._ledger.commit(flight, 1, end_s)
        if self._flights:
            self._begin(self._flights[0])
