"""The fleet that a scenario describes: its replicas, and how the requests are split among them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from servesim.analysis.prepared import Prepared, Watch, build_replica
from servesim.config.workload import ClosedLoopArrivals
from servesim.cost.step_time import StepTime
from servesim.engine.events import Log
from servesim.engine.fleet import Replica, simulate_fleet
from servesim.engine.loop import simulate
from servesim.engine.router import BLIND, Members, Route, build_route
from servesim.errors import ConfigError, Problem
from servesim.workload.routed import shares

__all__ = ["serve_fleet"]


def serve_fleet(
    prepared: Prepared,
    step_time: StepTime,
    *,
    on_end: Callable[[float], None],
    stop: Callable[[], bool],
    watch: Watch | None = None,
) -> Log:
    """Serve the workload by all replicas that are simulated.

    A router that looks at no replica splits the requests in advance, if none of them waits for another one,
    or if not all replicas are simulated: then what follows on a request goes where that went.
    """
    scenario, workload = prepared.loaded.scenario, prepared.workload
    hardware, count = scenario.hardware, scenario.hardware.num_simulated
    depth = 2 if prepared.engine.async_scheduling else 1
    closed = isinstance(scenario.workload.arrivals, ClosedLoopArrivals)
    waits_for_nothing = scenario.workload.sessions is None and not closed
    sampled = count < hardware.replicas
    if sampled and closed:
        step = "remove it, or describe the arrivals by a rate"
        raise ConfigError(
            Problem("does not go with a closed loop", path="hardware.simulated_replicas", next_step=step)
        )

    def router(members: Members) -> Route:
        return build_route(hardware.router, members, scenario.seed)

    def make(number: int) -> Replica:
        replica, _ = build_replica(prepared, step_time)
        return replica if watch is None else replica._replace(step_time=watch(number, *replica))

    if hardware.router in BLIND and (waits_for_nothing or sampled) and scenario.fleet is None:
        parts = shares(workload, router(Members(hardware.replicas)), count)
        logs = [
            simulate(part, *make(number), pipeline_depth=depth, on_end=on_end, stop=stop)
            for number, part in enumerate(parts)
        ]
        return Log.of_fleet(logs)
    return simulate_fleet(
        workload,
        [partial(make, number) for number in range(count)],
        router,
        events=scenario.fleet,
        pipeline_depth=depth,
        waits_for_nothing=waits_for_nothing,
        on_end=on_end,
        stop=stop,
    )
