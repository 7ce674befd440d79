"""The fleet that a scenario describes: its replicas, and how the requests are split among them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

from servesim.analysis.prepared import Prepared, Watch, build_replica, of_pool
from servesim.analysis.run import Pool
from servesim.config.link import load_link
from servesim.config.workload import ClosedLoopArrivals
from servesim.cost.first_calls import after
from servesim.cost.kv_groups import kv_layout
from servesim.cost.step_time import StepTime, build_step_time
from servesim.engine.events import Log
from servesim.engine.fleet import Replica, Site, simulate_fleet
from servesim.engine.handover import KvPort
from servesim.engine.loop import simulate
from servesim.engine.router import BLIND, Members, Route, build_route
from servesim.errors import ConfigError, Problem
from servesim.workload.routed import shares

Serves = Literal["all", "prefill", "decode"]

__all__ = ["check_engines", "serve_fleet", "serve_pools"]


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
        return _watched(build_replica(prepared, after(step_time, prepared.rows_met)), number, prepared, watch)

    if hardware.router in BLIND and (waits_for_nothing or sampled) and scenario.fleet is None:
        parts = shares(workload, router(Members([1.0] * hardware.replicas)), count)
        logs = [
            simulate(part, *make(number), pipeline_depth=depth, on_end=on_end, stop=stop)
            for number, part in enumerate(parts)
        ]
        return Log.of_fleet(logs)
    sites = count if scenario.fleet is None else scenario.num_replicas
    return simulate_fleet(
        workload,
        [Site(partial(make, number), depth) for number in range(sites)],
        router,
        events=scenario.fleet,
        num_at_begin=count,
        waits_for_nothing=waits_for_nothing,
        on_end=on_end,
        stop=stop,
    )


def serve_pools(
    prepared: Prepared,
    *,
    on_end: Callable[[float], None],
    stop: Callable[[], bool],
    watch: Watch | None = None,
) -> tuple[Log, tuple[Pool, ...]]:
    """Serve the workload by the replicas of all pools; returns what they are, too."""
    scenario = prepared.loaded.scenario
    fleet, router = scenario.fleet, scenario.hardware.router
    assert fleet is not None
    link = load_link(prepared.loaded.find("links", fleet.kv_link)) if fleet.kv_link else None
    sites, pools = list[Site](), list[Pool]()
    for name, pool in fleet.pools.items():
        own = of_pool(prepared, pool)
        law = build_step_time(own.model, own.gpu, own.engine, own.draft)
        num_gpus = own.engine.tensor_parallel_size * own.engine.pipeline_parallel_size

        def make(
            number: int, own: Prepared = own, law: StepTime = law, serves: Serves = pool.serves
        ) -> Replica:
            return _watched(build_replica(own, after(law, own.rows_met), serves=serves), number, own, watch)

        token_bytes = kv_layout(own.model, own.engine).token_bytes * own.engine.tensor_parallel_size
        port = KvPort(link.replica_bytes_per_s(num_gpus) if link else 0.0, token_bytes)
        depth = 2 if own.engine.async_scheduling else 1
        sites += [
            Site(partial(make, len(sites) + number), depth, pool.serves, pool.weight, port)
            for number in range(pool.replicas)
        ]
        pools.append(Pool(name, pool.serves, pool.replicas, num_gpus, own.gpu, own.engine, own.memory))
    log = simulate_fleet(
        prepared.workload,
        sites,
        lambda members: build_route(router, members, scenario.seed),
        events=fleet,
        link_latency_s=link.latency_s if link else None,
        on_end=on_end,
        stop=stop,
    )
    return log, tuple(pools)


def check_engines(prepared: Prepared) -> None:
    """Raise ServesimError for a link or an engine that could not serve."""
    fleet = prepared.loaded.scenario.fleet
    if fleet is not None and fleet.kv_link:
        load_link(prepared.loaded.find("links", fleet.kv_link))
    each: list[tuple[Prepared, Serves]] = [(prepared, "all")]
    if fleet is not None and fleet.pools:
        each = [(of_pool(prepared, pool), pool.serves) for pool in fleet.pools.values()]
    for own, serves in each:
        build_replica(own, build_step_time(own.model, own.gpu, own.engine, own.draft), serves=serves)


def _watched(replica: Replica, number: int, prepared: Prepared, watch: Watch | None) -> Replica:
    return replica if watch is None else replica._replace(step_time=watch(number, prepared.engine, *replica))
