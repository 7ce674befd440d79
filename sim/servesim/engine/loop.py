"""The clock: requests arrive, and the engine plans a step, waits for it, commits it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from math import nan
from typing import Any

import simpy

from servesim.cost.step_time import StepTime
from servesim.engine.events import Log
from servesim.engine.scheduler import Scheduler
from servesim.engine.state import Plan, RequestState, Status
from servesim.kv.base import Usage
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
    log = Log()

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
    env.run()
    engine.close()
    return log


class _Flight:
    """A plan on its way through the GPU: its pace, and the log row that its steps have filled so far.

    Step j from now takes ``first_s + j * growth_s``, for ``num_steps`` steps.
    """

    __slots__ = (
        "begun_s",
        "done",
        "end_usage",
        "first_s",
        "growth_s",
        "num_steps",
        "plan",
        "row_first_s",
        "usage",
    )

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.first_s = self.growth_s = 0.0
        self.num_steps = 1
        self.done = 0  # steps of the row that have ended; it began at begun_s with row_first_s
        self.begun_s = self.row_first_s = 0.0
        self.usage: Usage
        self.end_usage: Usage

    def duration_s(self, steps: int) -> float:
        """Seconds of the next ``steps`` steps."""
        return steps * self.first_s + 0.5 * steps * (steps - 1) * self.growth_s

    def steps_until(self, elapsed_s: float) -> int:
        """Steps that have begun by then, at least one; a step that ends just then has no successor yet."""
        first_s, growth_s = self.first_s, self.growth_s
        if growth_s > 0:  # the root of n * first + n (n - 1) / 2 * growth = elapsed
            half = first_s - 0.5 * growth_s
            steps = int(2 * elapsed_s / (half + (half * half + 2 * growth_s * elapsed_s) ** 0.5))
        else:
            steps = int(elapsed_s / first_s)
        steps = max(steps, 1)
        while steps > 1 and self.duration_s(steps - 1) >= elapsed_s:
            steps -= 1
        while self.duration_s(steps) < elapsed_s:
            steps += 1
        return steps

    def leave_behind(self, steps: int) -> None:
        """Count steps as done and move the pace on."""
        self.first_s += steps * self.growth_s
        self.num_steps -= steps
        self.done += steps


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
        self._on_end = on_end
        self._stop = stop
        self._now_s = 0.0
        self._flights: deque[_Flight] = deque()
        self._idle: simpy.Event | None = None
        env.process(self._serve())

    def submit(self, request: Request) -> None:
        """A request arrives now."""
        state = self._scheduler.add(request)
        if state.status is Status.REFUSED:
            self._write(state, nan)
            self._on_end(request, request.arrival_s)
        elif self._idle is not None:
            self._idle.succeed()
            self._idle = None

    def close(self) -> None:
        """Write down the requests that are still here, and the counters."""
        scheduler = self._scheduler
        for state in scheduler.unfinished():
            self._write(state, nan)
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
        flight = _Flight(plan)
        self._set_pace(flight)
        self._flights.append(flight)
        if len(self._flights) == 1:
            self._begin(flight)

    def _set_pace(self, flight: _Flight) -> None:
        plan = flight.plan
        if plan.coasts and not plan.scheduled:
            flight.first_s, flight.growth_s, flight.num_steps = self._step_time.decode_steps(
                plan.group_size, plan.shape.decode_context_tokens, self._scheduler.group.context_growth()
            )
        elif plan.shape.num_sampled or plan.shape.chunks:
            flight.first_s = self._step_time.step_s(plan.shape)

    def _begin(self, flight: _Flight) -> None:
        """The GPU begins with a plan."""
        flight.done, flight.begun_s, flight.row_first_s = 0, self._now_s, flight.first_s
        flight.usage = flight.end_usage = self._scheduler.usage()

    def _coast(self, flight: _Flight) -> Process:
        """Let the decode group run until something must be decided.

        Requests that end on the way leave; the others go on without a new plan as long as nobody waits.
        With async scheduling a step more than has ended is scheduled at any time, also when this returns.
        """
        env, scheduler, lead = self._env, self._scheduler, self._depth - 1
        while True:
            plan = flight.plan
            whole, ends = scheduler.segment(plan, flight.num_steps, lead)
            steps = whole if ends else whole - lead
            if steps < 1:
                return
            end_s, horizon_s = self._now_s + flight.duration_s(steps), env.peek()
            interrupted = end_s > horizon_s
            if interrupted:
                steps = min(steps, flight.steps_until(horizon_s - self._now_s))
                end_s = self._now_s + flight.duration_s(steps)
                ends = ends and steps == whole
            if steps > 1:
                scheduler.extend(plan, steps - 1)
                flight.end_usage = scheduler.usage()
            after = scheduler.renew(plan) if ends and lead else None
            if lead and not ends:
                scheduler.extend(plan, 1)
            if interrupted:
                yield env.timeout(end_s - env.now)
            self._now_s = end_s
            flight.leave_behind(steps)
            if lead and not ends:
                scheduler.commit_repetitions(steps, end_s)
                flight.end_usage = scheduler.usage()
                return
            self._commit(flight, steps)
            if not self._go_on(flight, after) or interrupted:
                return

    def _go_on(self, flight: _Flight, after: Plan | None) -> bool:
        """Pass to the plan after one that has ended; returns whether the group coasts on.

        Async scheduling has made that plan before; else it is made here, unless somebody waits or arrives.
        """
        scheduler = self._scheduler
        undisturbed = not scheduler.news and self._env.peek() > self._now_s
        if self._depth == 1 and undisturbed and not scheduler.waiting:
            after = scheduler.renew(flight.plan)
        if after is None:
            self._flights.popleft()
            return False
        flight.plan = after
        self._set_pace(flight)
        self._begin(flight)
        return undisturbed

    def _finish(self, flight: _Flight) -> Process:
        """Wait for the one step in flight and commit it."""
        env = self._env
        end_s = self._now_s + flight.first_s
        if end_s > env.peek():
            yield env.timeout(end_s - env.now)
        self._now_s = end_s
        flight.leave_behind(1)
        self._flights.popleft()
        self._commit(flight, 1)
        if self._flights:
            self._begin(self._flights[0])

    def _commit(self, flight: _Flight, steps: int) -> None:
        """Process the output of a plan's last steps and write its row."""
        plan, shape, now_s = flight.plan, flight.plan.shape, self._now_s
        itl_samples, gaps = self._scheduler.commit(plan, now_s, steps)
        if gaps:
            self._log.itl_gaps_s.extend(gaps)
        self._log.end_s = now_s
        self._log.steps.append(
            flight.begun_s, flight.row_first_s, flight.growth_s,
            flight.done, shape.num_decodes, len(shape.chunks), sum([tokens for tokens, _ in shape.chunks]),
            shape.decode_context_tokens[0], shape.num_sampled - plan.num_discarded, itl_samples,
            plan.running - plan.num_draining, plan.waiting, len(plan.preempted),
            plan.failure,
            *flight.usage, *flight.end_usage,
        )  # fmt: skip
        for state in plan.finishing:
            self._write(state, now_s)
            self._on_end(state.request, now_s)

    def _write(self, state: RequestState, finish_s: float) -> None:
        request = state.request
        self._log.requests.append(
            request.arrival_s, state.scheduled_s, state.first_token_s, finish_s,
            request.index, request.prompt_tokens, request.output_tokens, state.num_output_tokens,
            max(state.cached_tokens, 0), state.num_preemptions, state.status,
        )  # fmt: skip
