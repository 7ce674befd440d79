"""From a loaded scenario to a finished run."""

from __future__ import annotations

from collections.abc import Callable

from servesim.analysis.fleet import serve_fleet, serve_pools
from servesim.analysis.prepared import Prepared, Watch, build_replica, prepare
from servesim.analysis.run import Run
from servesim.cost.first_calls import after
from servesim.cost.step_time import build_step_time
from servesim.engine.loop import simulate
from servesim.engine.scheduler import Scheduler
from servesim.engine.step_trace import Step, trace_head, trace_steps
from servesim.errors import ConfigError, Problem

__all__ = ["Prepared", "Watch", "prepare", "run_prepared"]


def run_prepared(
    prepared: Prepared,
    *,
    on_end: Callable[[float], None] = lambda now_s: None,
    stop: Callable[[], bool] = lambda: False,
    step_trace: Callable[[Step], None] | None = None,
    observe: Callable[[Scheduler], None] | None = None,
    watch: Watch | None = None,
) -> Run:
    """Simulate to the end, or until ``stop()``; ``on_end(now_s)`` is called for each ended request.

    ``step_trace`` is given every line of a step trace; ``observe`` the scheduler, before it begins, its KV
    cache knowing every block by its id. Each step is then computed on its own. ``watch`` is given the number
    of the replica, its scheduler and its law of step time before the first step, and again when it comes
    back; it returns the law that holds.
    """
    engine, loaded = prepared.engine, prepared.loaded
    step_time = build_step_time(prepared.model, prepared.gpu, engine, prepared.draft)
    step_time = after(step_time, prepared.rows_met)
    resolved = loaded.scenario.model_copy(update={"engine": engine})
    depth = 2 if engine.async_scheduling else 1
    fleet = loaded.scenario.fleet
    if loaded.scenario.num_replicas > 1 or fleet is not None:
        if step_trace or observe:
            what = "a step trace" if step_trace else "a memory map"
            step = "set hardware.replicas=1 and fleet=null, and give that replica its share of the traffic"
            problem = Problem(f"{what} is of one engine", path="hardware.replicas", next_step=step)
            raise ConfigError(problem)
        if fleet is not None and fleet.pools:
            log, pools = serve_pools(prepared, on_end=on_end, stop=stop, watch=watch)
            first = pools[0]
            resolved = loaded.scenario.model_copy(update={"engine": first.engine})
            return Run(resolved, first.gpu, prepared.model, first.memory, log, pools)
        log = serve_fleet(prepared, step_time, on_end=on_end, stop=stop, watch=watch)
        return Run(resolved, prepared.gpu, prepared.model, prepared.memory, log)
    observed = observe is not None
    scheduler, _ = build_replica(
        prepared, step_time, one_by_one=step_trace is not None or observed, track_ids=observed
    )
    if observe is not None:
        observe(scheduler)
    recorder = None
    if step_trace is not None:
        step_trace(trace_head(engine.version, resolved.model_dump(mode="json")))
        recorder = trace_steps(scheduler, step_trace)
    watched = watch(0, engine, scheduler, step_time) if watch else step_time
    log = simulate(prepared.workload, scheduler, watched, pipeline_depth=depth, on_end=on_end, stop=stop)
    if step_trace is not None and recorder is not None:
        step_trace({"summary": recorder.summary()})
    return Run(resolved, prepared.gpu, prepared.model, prepared.memory, log)
