"""Replicas behind a router, on one clock: they serve, fail and come back, are ordered and given back."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice
from math import inf, nan, nextafter
from typing import Literal, NamedTuple

import simpy

from servesim.config.fleet import FailureConfig, FleetConfig
from servesim.cost.step_time import StepTime
from servesim.engine.autoscaler import Autoscaler
from servesim.engine.events import FleetLog, Log
from servesim.engine.handover import Handover, KvPort
from servesim.engine.loop import Engine, Process, Traffic, run_to_end
from servesim.engine.router import Members, Route, outstanding
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
    ``kv_port`` is its end of the link between the replicas.
    """

    make: Callable[[], Replica]
    pipeline_depth: int = 1
    serves: Literal["all", "prefill", "decode"] = "all"
    weight: float = 1.0
    kv_port: KvPort = KvPort(0.0, 0.0)


def simulate_fleet(
    workload: Workload,
    sites: Sequence[Site],
    router: Callable[[Members], Route],
    *,
    events: FleetConfig | None = None,
    link_latency_s: float | None = None,
    num_at_begin: int | None = None,
    waits_for_nothing: bool = False,
    on_end: Callable[[float], None] = lambda now_s: None,
    stop: Callable[[], bool] = lambda: False,
) -> Log:
    """Serve a workload by several engines and return what happened, replica by replica.

    ``router(members)`` makes what names the replica that gets a request, at the instant it arrives: every
    step that ended before is committed. ``waits_for_nothing``: no request of the workload waits for another
    one to end, so that engines meet at arrivals only, which is faster; with ``events`` they meet whenever
    anything happens. Sites that serve prefill and decode need a link. With an autoscaler the first
    ``num_at_begin`` sites have a replica at the begin.
    """
    begin = len(sites) if num_at_begin is None else num_at_begin
    return _Fleet(
        workload, sites, router, events, link_latency_s, begin, waits_for_nothing, on_end, stop
    ).run()


class _Place:
    """A site, the engine that serves there, if one does, and the log of all that did."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.log = Log()
        self.scheduler: Scheduler | None = None
        self.engine: Engine | None = None
        self.is_leaving = False
        self.is_starting = False
        self.ordered_s = self.ready_s = 0.0


class _Fleet:
    def __init__(
        self,
        workload: Workload,
        sites: Sequence[Site],
        router: Callable[[Members], Route],
        events: FleetConfig | None,
        link_latency_s: float | None,
        num_at_begin: int,
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
        if link_latency_s is not None:
            decoding = Members([site.weight if site.serves == "decode" else 0.0 for site in sites])
            ports = [site.kv_port for site in sites]
            self._handover = Handover(env, link_latency_s, ports, self._log, decoding)
        scale = events.autoscaler if events else None
        if scale is not None:
            del self._members.open[num_at_begin:]
        for number in range(len(sites) if scale is None else num_at_begin):
            self._begin(number)
        self._route = router(self._members)
        if self._handover is not None:
            self._handover.route = router(self._handover.members)
        failures = events.failures if events else ()
        for number in sorted({one.replica for one in failures}):
            env.process(self._fail(number, [one for one in failures if one.replica == number]))
        if scale is not None:
            env.process(self._scale(Autoscaler(scale)))

    def run(self) -> Log:
        """Serve the workload to its end."""
        run_to_end(self._env)
        for number, place in enumerate(self._places):
            if place.engine is not None:
                place.engine.close()
                self._log.spans.append(place.ordered_s, place.ready_s, nan, number)
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
        place.scheduler, place.is_leaving, place.ready_s = scheduler, False, self._env.now
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
            stop=stop if self._events is None else lambda: place.is_leaving or stop(),
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

    def _scale(self, scaler: Autoscaler) -> Process:
        """Look at the load from time to time; order replicas, and give back those that are not needed."""
        places, members = self._places, self._members
        while True:
            yield self._env.timeout(scaler.rule.interval_s)
            if self._is_over() or self._stop():
                return
            draining = [
                number
                for number, place in enumerate(places)
                if place.engine is not None and not (place.is_leaving or members.is_open(number))
            ]
            serving = [members.schedulers[number] for number in members.open]
            current = len(serving) + sum(one.is_starting for one in places)
            missing = scaler.wanted(serving, current, self._env.now) - current
            by_load = sorted(members.open, key=lambda n: (outstanding(members.schedulers[n]), -n))
            for number in by_load[: max(0, min(-missing, len(by_load) - 1))]:
                members.leave(number)
            for number in draining:
                if missing > 0:  # it has not come to an end: it goes on
                    members.join(number, members.schedulers[number])
                    missing -= 1
                elif outstanding(members.schedulers[number]) == 0:
                    self._env.process(self._give_back(number))
            absent = (n for n, one in enumerate(places) if one.engine is None and not one.is_starting)
            for number in islice(absent, max(0, missing)):
                self._env.process(self._order(number, scaler.rule.startup_s))

    def _order(self, number: int, startup_s: float) -> Process:
        """A replica starts; it serves when it is up."""
        place = self._places[number]
        place.is_starting, place.ordered_s = True, self._env.now
        yield self._env.timeout(startup_s)
        place.is_starting = False
        self._begin(number)

    def _give_back(self, number: int) -> Process:
        """A replica without requests ends."""
        place = self._places[number]
        yield from self._leave(number)
        self._log.spans.append(place.ordered_s, place.ready_s, self._env.now, number)

    def _leave(self, number: int) -> Process:
        """A replica completes the steps that are scheduled, and is gone with its cache and its requests."""
        place = self._places[number]
        engine, scheduler = place.engine, place.scheduler
        assert engine is not None and scheduler is not None  # noqa: PT018  # failures do not overlap
        self._members.leave(number)
        place.is_leaving = True
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
