"""The clock: requests arrive, and the engine plans a step, waits for it, commits it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from math import nan
from typing import Any

import simpy

from servesim.cost.step_time import AffineSteps, StepTime
from servesim.engine.events import Log
from servesim.engine.scheduler import Scheduler
from servesim.engine.state import Plan, RequestState, Status
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


class _Run:
    """A plan in flight and the pace of its repetitions."""

    __slots__ = ("contexts", "growth", "pace", "plan")

    def __init__(self, plan: Plan, step_time: StepTime, growth: tuple[int, ...]) -> None:
        self.plan = plan
        self.contexts = plan.shape.decode_context_tokens
        self.growth = growth
        if plan.repeat > 1:
            self.pace = step_time.decode_steps(plan.group_size, self.contexts, growth)
        else:
            self.pace = AffineSteps(step_time.step_s(plan.shape) if plan.shape.num_tokens else 0.0, 0.0, 1)

    @property
    def repeat(self) -> int:
        """Steps that the plan and its pace cover."""
        return min(self.plan.repeat, self.pace.num_steps)

    def duration_s(self, steps: int) -> float:
        """Seconds of the next ``steps`` steps."""
        return steps * self.pace.first_s + 0.5 * steps * (steps - 1) * self.pace.growth_s

    def steps_until(self, elapsed_s: float) -> int:
        """Steps that have begun by then, at least one; a step that ends just then has no successor yet."""
        first, growth = self.pace.first_s, self.pace.growth_s
        if growth > 0:  # the root of n * first + n (n - 1) / 2 * growth = elapsed
            half = first - 0.5 * growth
            steps = int(2 * elapsed_s / (half + (half * half + 2 * growth * elapsed_s) ** 0.5))
        else:
            steps = int(elapsed_s / first)
        steps = max(steps, 1)
        while steps > 1 and self.duration_s(steps - 1) >= elapsed_s:
            steps -= 1
        while self.duration_s(steps) < elapsed_s:
            steps += 1
        return steps

    def done(self, steps: int) -> None:
        """Leave ``steps`` steps behind."""
        first, growth, num_steps = self.pace
        self.pace = AffineSteps(first + steps * growth, growth, num_steps - steps)
        self.contexts = tuple(c + steps * g for c, g in zip(self.contexts, self.growth, strict=True))
        self.plan.repeat = 1


class Engine:
    """One engine: a scheduler, a step-time law and a log, driven by simulated time.

    ``pipeline_depth`` is the number of steps in flight: 1, or 2 with async scheduling, where the next step
    is scheduled while the GPU computes this one. ``on_end(request, now_s)`` is called for each request that
    ends or is refused.
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
        self._in_flight: deque[_Run] = deque()
        self._idle: simpy.Event | None = None
        self._interruptible = False
        self._process = env.process(self._serve())

    def submit(self, request: Request) -> None:
        """A request arrives now."""
        state = self._scheduler.add(request)
        if state.status is Status.REFUSED:
            self._end(state, nan)
        elif self._idle is not None:
            self._idle.succeed()
            self._idle = None
        elif self._interruptible and self._scheduler.news:
            self._interruptible = False
            self._process.interrupt()

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
        }

    def _serve(self) -> Process:
        while not self._stop():
            if self._env.peek() <= self._env.now:
                yield self._env.timeout(0)  # what arrives at this very moment comes first
            if self._in_flight and not self._scheduler.news:
                yield from self._advance(self._in_flight[0], leave=1)
            plan = self._scheduler.plan()
            if plan is not None:
                self._begin(plan)
                if len(self._in_flight) < self._depth:
                    continue
            if self._in_flight:
                yield from self._advance(self._in_flight[0], leave=0)
            else:
                self._idle = self._env.event()
                yield self._idle
        self._log.interrupted = True

    def _begin(self, plan: Plan) -> None:
        for state in plan.admitted:
            if state.num_preemptions == 0:
                state.scheduled_s = self._env.now
        self._in_flight.append(_Run(plan, self._step_time, self._scheduler.group.context_growth()))

    def _advance(self, run: _Run, leave: int) -> Process:
        """Wait for the repetitions of a plan, but for ``leave`` of them, and commit what was computed.

        With ``leave`` 0 the plan ends. Repetitions end early, at a step's end, when a request arrives.
        """
        if leave and len(self._scheduler.running) != run.plan.running:  # a step in flight before it has ended
            run.plan.running, run.plan.usage = len(self._scheduler.running), self._scheduler.usage()
        repeat = run.repeat if leave or len(self._in_flight) == 1 == self._depth else 1
        steps = repeat - leave
        if steps < 1:
            return
        start_s = self._env.now
        self._interruptible = steps > 1
        try:
            yield self._env.timeout(run.duration_s(steps))
        except simpy.Interrupt:
            elapsed_s = self._env.now - start_s
            steps = run.steps_until(elapsed_s)
            yield self._env.timeout(max(run.duration_s(steps) - elapsed_s, 0.0))
        self._interruptible = False
        self._commit(run, steps, start_s, leave)

    def _commit(self, run: _Run, steps: int, start_s: float, leave: int) -> None:
        plan, scheduler = run.plan, self._scheduler
        before = after = plan.usage
        if steps > 1:
            scheduler.extend(plan, steps - 1)
            after = scheduler.usage()
        itl_samples = plan.shape.num_sampled
        if leave:
            scheduler.extend(plan, leave)
            scheduler.commit_repetitions(steps, self._env.now)
            plan.usage = scheduler.usage()
        else:
            self._in_flight.popleft()
            itl_samples, gaps = scheduler.commit(plan, self._env.now)
            self._log.itl_gaps_s.extend(gaps)
        self._log.end_s = self._env.now
        shape = plan.shape
        self._log.steps.append(
            start_s, run.pace.first_s, run.pace.growth_s,
            steps, shape.num_decodes, len(shape.chunks), shape.num_tokens - shape.num_decodes,
            run.contexts[0], shape.num_sampled, itl_samples, plan.running, plan.waiting, len(plan.preempted),
            *before, *after,
        )  # fmt: skip
        run.done(steps)
        if not leave:
            for state in plan.finishing:
                self._end(state, self._env.now)

    def _end(self, state: RequestState, finish_s: float) -> None:
        self._write(state, finish_s)
        self._on_end(state.request, self._env.now)

    def _write(self, state: RequestState, finish_s: float) -> None:
        request = state.request
        self._log.requests.append(
            request.arrival_s, state.scheduled_s, state.first_token_s, finish_s,
            request.index, request.prompt_tokens, request.output_tokens, state.num_output_tokens,
            max(state.cached_tokens, 0), state.num_preemptions, state.status,
        )  # fmt: skip
