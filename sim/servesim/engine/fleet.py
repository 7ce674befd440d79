"""Replicas behind a router, on one clock: they serve, they fail, they come back."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from math import inf, nan, nextafter
from typing import Literal, NamedTuple

import simpy

from servesim.config.fleet import FailureConfig, FleetConfig
from servesim.cost.step_time import StepTime
from servesim.engine.events import FleetLog, Log
from servesim.engine.handover import Handover, KvLink
from servesim.engine.loop import Engine, Process, Traffic, run_to_end
from servesim.engine.router import Members, Route
from servesim.engine.scheduler import Scheduler
from servesim.engine.state import RequestState, Status
from servesim.workload.request import Request, Workload

__all__ = ["Replica", "Site", "simulate_fleet"]


class Replica(NamedTuple):
    """What one engine of a fleet is made of."""

    scheduler: Scheduler
    step_time: StepTime


class Site(NamedTuple):
    """Where a replica of a fleet stands.

    ``make()`` gives the replica with an empty cache: at the begin, and whenever it comes back.
    ``kv_bytes_per_s`` is what it can send or receive over the link between the replicas.
    """

    make: Callable[[], Replica]
    pipeline_depth: int = 1
    serves: Literal["all", "prefill", "decode"] = "all"
    weight: float = 1.0
    kv_bytes_per_s: float = 0.0


def simulate_fleet(
    workload: Workload,
    sites: Sequence[Site],
    router: Callable[[Members], Route],
    *,
    events: FleetConfig | None = None,
    link: KvLink | None = None,
    waits_for_nothing: bool = False,
    on_end: Callable[[float], None] = lambda now_s: None,
    stop: Callable[[], bool] = lambda: False,
) -> Log:
    """Serve a workload by several engines and return what happened, replica by replica.

    ``router(members)`` makes what names the replica that gets a request, at the instant it arrives: every
    step that ended before is committed. ``waits_for_nothing``: no request of the workload waits for another
    one to end, so that engines meet at arrivals only, which is faster; with ``events`` they meet whenever
    anything happens. Sites that serve prefill and decode need a ``link``.
    """
    return _Fleet(workload, sites, router, events, link, waits_for_nothing, on_end, stop).run()


class _Place:
    """A site, the engine that serves there, if one does, and the log of all that did."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.log = Log()
        self.scheduler: Scheduler | None = None
        self.engine: Engine | None = None
        self.has_failed = False


class _Fleet:
    def __init__(
        self,
        workload: Workload,
        sites: Sequence[Site],
        router: Callable[[Members], Route],
        events: FleetConfig | None,
        link: KvLink | None,
        waits_for_nothing: bool,
        on_end: Callable[[float], None],
        stop: Callable[[], bool],
    ) -> None:
        env = self._env = simpy.Environment()
        self._events, self._stop = events, stop
        self._log = FleetLog()
        self._places = [_Place(site) for site in sites]
        self._held = deque[Request]()  # while no replica takes requests
        self._num_here = 0  # requests that have been submitted and have not ended
        self._traffic = Traffic(env, workload, self._arrive, on_end, stop)
        self._next_event_s = env.peek if len(sites) == 1 else self._next_of_all_s
        if waits_for_nothing and events is None:
            self._next_event_s = self._next_submission_s
        self._members = Members([site.weight if site.serves != "decode" else 0.0 for site in sites])
        self._handover = None
        if link is not None:
            decoding = Members([site.weight if site.serves == "decode" else 0.0 for site in sites])
            self._handover = Handover(env, link, [site.kv_bytes_per_s for site in sites], self._log, decoding)
        for number in range(len(sites)):
            self._begin(number)
        self._route = router(self._members)
        if self._handover is not None:
            self._handover.route = router(self._handover.members)
        failures = events.failures if events else ()
        for number in sorted({one.replica for one in failures}):
            env.process(self._fail(number, [one for one in failures if one.replica == number]))

    def run(self) -> Log:
        """Serve the workload to its end."""
        run_to_end(self._env)
        for place in self._places:
            if place.engine is not None:
                place.engine.close()
        for request in self._held:
            self._give_up(request)
        logs = [place.log for place in self._places]
        if self._handover is not None:
            self._handover.join(logs)
        alike = self._events is None or not self._events.pools
        return Log.of_fleet(logs, None if self._events is None else self._log, alike=alike)

    # ---- when engines look up from their steps ---------------------------------------------------

    def _next_submission_s(self) -> float:
        due_s = self._traffic.due_s
        return due_s[0] if due_s else inf

    def _next_of_all_s(self) -> float:
        due_s = self._traffic.due_s
        # Another engine that wakes at the same instant must not be waited for: it would wait, too.
        return min(due_s[0] if due_s else inf, nextafter(self._env.peek(), inf))

    # ---- requests --------------------------------------------------------------------------------

    def _arrive(self, request: Request) -> None:
        self._num_here += 1
        self._submit(request)

    def _submit(self, request: Request) -> None:
        if not self._members.open:
            self._held.append(request)
            return
        engine = self._places[self._route(request)].engine
        assert engine is not None  # a member that is open has one
        engine.submit(request if self._handover is None else self._handover.prompt_of(request))

    def _ended(self, request: Request, now_s: float) -> None:
        self._num_here -= 1
        self._traffic.ended(request, now_s)

    def _is_over(self) -> bool:
        """Nobody is here and nobody will come."""
        return self._traffic.has_begun_all and not (self._traffic.due_s or self._num_here)

    def _give_up(self, request: Request) -> None:
        """Write down a request for which no replica was left."""
        status = Status.WAITING if self._stop() else Status.LOST
        self._places[0].log.requests.append(
            request.arrival_s, nan, nan, nan,
            request.index, request.prompt_tokens, request.output_tokens, 0, 0, 0, status,
        )  # fmt: skip

    # ---- replicas --------------------------------------------------------------------------------

    def _begin(self, number: int) -> None:
        """A replica serves from now on, with an empty cache."""
        place, stop, handover = self._places[number], self._stop, self._handover
        scheduler, step_time = place.site.make()
        if place.scheduler is None:
            place.log = Log(scheduler.kv.account, len(scheduler.kv.levels()))
        place.scheduler, place.has_failed = scheduler, False
        ended: Callable[[Request, float], None] = self._ended
        is_decoder = place.site.serves == "decode"
        if handover is not None and not is_decoder:
            ended = handover.ends_at(number, self._ended)
        place.engine = Engine(
            self._env,
            scheduler,
            step_time,
            place.log,
            pipeline_depth=place.site.pipeline_depth,
            next_event_s=self._next_event_s,
            on_end=ended,
            stop=stop if self._events is None else lambda: place.has_failed or stop(),
            cruises=not is_decoder,
        )
        if handover is not None:
            handover.add(number, scheduler, place.engine)
        if not is_decoder:
            self._members.join(number, scheduler)
        held, self._held = self._held, deque()
        for request in held:
            self._submit(request)

    def _fail(self, number: int, failures: Sequence[FailureConfig]) -> Process:
        """A replica fails and comes back, time after time."""
        env = self._env
        for failure in sorted(failures, key=lambda one: one.at_s):
            yield env.timeout(max(0.0, failure.at_s - env.now))
            if self._is_over() or self._stop():
                return
            failed_s = env.now
            yield from self._leave(number)
            back_s = nan if failure.down_s is None else max(failed_s + failure.down_s, env.now)
            self._log.failures.append(failed_s, back_s, number)
            if failure.down_s is None:
                return
            yield env.timeout(back_s - env.now)
            self._begin(number)

    def _leave(self, number: int) -> Process:
        """A replica completes the steps that are scheduled, and is gone with its cache and its requests."""
        place = self._places[number]
        engine, scheduler = place.engine, place.scheduler
        assert engine is not None and scheduler is not None  # noqa: PT018  # failures do not overlap
        self._members.leave(number)
        place.has_failed = True
        engine.wake()
        yield engine.process
        yield from engine.land()
        engine.count()
        place.engine, place.log.interrupted = None, self._stop()
        for state in scheduler.unfinished():
            self._abort(engine, state, number)

    def _abort(self, engine: Engine, state: RequestState, number: int) -> None:
        """A request that a replica leaves behind goes to another one, or is lost."""
        request, now_s = state.request, self._env.now
        self._log.aborts.append(now_s, request.index, number, state.num_output_tokens)
        if self._events is not None and self._events.in_flight == "retry":
            self._submit(request)
        else:
            state.status = Status.LOST
            engine.write(state)
            self._ended(request, now_s)
