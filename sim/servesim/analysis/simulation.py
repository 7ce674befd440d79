"""From a loaded scenario to a finished run: every file read, every default filled, then the engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar, cast

from servesim.analysis.run import Run
from servesim.config.defaults import resolve_engine, with_whole_tables
from servesim.config.engine_profile import profiled_engine
from servesim.config.load import LoadedScenario
from servesim.config.profiles import GpuProfile, ModelProfile, load_gpu, load_model
from servesim.config.scenario import EngineConfig
from servesim.config.workload import ClosedLoopArrivals
from servesim.cost.first_calls import after
from servesim.cost.memory import MemoryBudget, memory_budget
from servesim.cost.step_time import StepTime, build_step_time
from servesim.engine.acceptance import RecordedDrafts, build_acceptance
from servesim.engine.beams import build_beams
from servesim.engine.build import build_scheduler
from servesim.engine.events import Log
from servesim.engine.loop import Replica, simulate, simulate_fleet
from servesim.engine.router import BLIND, blind_route, build_route
from servesim.engine.scheduler import Scheduler
from servesim.engine.step_trace import NotedAcceptance, Step, trace_head, trace_steps
from servesim.errors import ConfigError, Problem
from servesim.workload.build import build_workload
from servesim.workload.request import Workload
from servesim.workload.routed import shares

__all__ = ["Prepared", "prepare", "run_prepared"]


@dataclass(frozen=True, slots=True)
class Prepared:
    """A scenario with nothing left to look up."""

    loaded: LoadedScenario
    gpu: GpuProfile
    model: ModelProfile
    engine: EngineConfig
    """Resolved, the engine profile applied."""
    memory: MemoryBudget
    workload: Workload
    draft: ModelProfile | None = None
    """The model that drafts, where one does."""
    rows_met: tuple[int, ...] = ()
    """Tokens of steps that the server ran before; they matter to cost.first_calls only."""
    drafts: RecordedDrafts | None = None
    """Takes the place of the scenario's law of acceptance."""


def prepare(loaded: LoadedScenario, workload: Workload | None = None) -> Prepared:
    """Everything that the simulation needs; ``workload`` takes the place of the scenario's own.

    Raises ServesimError for anything that the scenario's author can mend.
    """
    scenario = loaded.scenario
    gpu = _profile(load_gpu, loaded.find("gpus", scenario.hardware.gpu))
    model = _profile(load_model, loaded.find("models", scenario.model))
    engine = profiled_engine(loaded)
    if scenario.workload.forks is not None:
        engine = with_whole_tables(engine)
        if "preemption_mode" not in engine.model_fields_set:  # vLLM swaps requests of several sequences
            engine = engine.model_copy(update={"preemption_mode": "swap"})
    engine = resolve_engine(engine, model, gpu)
    draft = None
    if engine.speculative is not None and engine.speculative.draft_model is not None:
        draft = _profile(load_model, loaded.find("models", engine.speculative.draft_model))
    memory = memory_budget(model, gpu, engine, draft)
    if workload is None:
        workload = build_workload(scenario.workload, scenario.seed, lambda name: loaded.find("traces", name))
    return Prepared(loaded, gpu, model, engine, memory, workload, draft)


Loaded = TypeVar("Loaded", GpuProfile, ModelProfile)
_profiles: dict[tuple[str, int, int], GpuProfile | ModelProfile] = {}


def _profile(load: Callable[[str], Loaded], path: Path) -> Loaded:
    """A profile, read once for as long as its file stays the same: a table of runs asks for it again."""
    about = path.stat()
    key = (str(path.resolve()), about.st_mtime_ns, about.st_size)
    if key not in _profiles:
        _profiles[key] = load(str(path))
    return cast(Loaded, _profiles[key])


def run_prepared(
    prepared: Prepared,
    *,
    on_end: Callable[[float], None] = lambda now_s: None,
    stop: Callable[[], bool] = lambda: False,
    step_trace: Callable[[Step], None] | None = None,
    observe: Callable[[Scheduler], None] | None = None,
    watch: Callable[[Scheduler, StepTime], StepTime] | None = None,
) -> Run:
    """Simulate to the end, or until ``stop()``; ``on_end(now_s)`` is called for each ended request.

    ``step_trace`` is given every line of a step trace; ``observe`` the scheduler, before it begins, its KV
    cache knowing every block by its id. Each step is then computed on its own. ``watch`` is given the
    scheduler and the law of step time before the first step, and returns the law that holds.
    """
    engine, loaded = prepared.engine, prepared.loaded
    step_time = build_step_time(prepared.model, prepared.gpu, engine, prepared.draft)
    step_time = after(step_time, prepared.rows_met)
    resolved = loaded.scenario.model_copy(update={"engine": engine})
    depth = 2 if engine.async_scheduling else 1
    if loaded.scenario.hardware.replicas > 1:
        if step_trace or observe or watch:
            what = "a step trace" if step_trace else "a memory map" if observe else "an explanation"
            step = "set hardware.replicas=1, and give that replica its share of the traffic"
            problem = Problem(f"{what} is of one engine", path="hardware.replicas", next_step=step)
            raise ConfigError(problem)
        serve = partial(simulate_fleet, pipeline_depth=depth, on_end=on_end, stop=stop)
        log = Log.of_fleet(_fleet(prepared, step_time, serve))
        return Run(resolved, prepared.gpu, prepared.model, prepared.memory, log)
    observed = observe is not None
    replica, accept = _replica(
        prepared, step_time, one_by_one=step_trace is not None or observed, track_ids=observed
    )
    scheduler = replica.scheduler
    if observe is not None:
        observe(scheduler)
    recorder = None
    if step_trace is not None:
        step_trace(trace_head(engine.version, resolved.model_dump(mode="json")))
        recorder = trace_steps(scheduler, step_trace, accept)
    watched = watch(scheduler, step_time) if watch else step_time
    log = simulate(prepared.workload, scheduler, watched, pipeline_depth=depth, on_end=on_end, stop=stop)
    if step_trace is not None and recorder is not None:
        step_trace({"summary": recorder.summary()})
    return Run(resolved, prepared.gpu, prepared.model, prepared.memory, log)


def _replica(
    prepared: Prepared, step_time: StepTime, *, one_by_one: bool = False, track_ids: bool = False
) -> tuple[Replica, NotedAcceptance | None]:
    """An engine with an empty cache, and what says which drafts it accepts."""
    engine, loaded, accept = prepared.engine, prepared.loaded, None
    drafts = prepared.drafts
    if engine.speculative is not None:
        law = drafts or build_acceptance(
            engine.speculative, loaded.scenario.seed, lambda name: loaded.find("traces", name)
        )
        accept = NotedAcceptance(law)
    sampling = loaded.scenario.workload.forks
    scheduler = build_scheduler(
        engine,
        prepared.memory,
        step_time.windows,
        one_by_one=one_by_one,
        track_ids=track_ids,
        accept=accept,
        propose=drafts.propose if drafts else None,
        sampling=sampling,
        beams=build_beams(sampling, loaded.scenario.seed) if sampling else None,
    )
    return Replica(scheduler, step_time), accept


def _fleet(prepared: Prepared, step_time: StepTime, serve: Callable[..., list[Log]]) -> list[Log]:
    """The log of every replica that is simulated.

    A router that looks at no replica splits the requests in advance, if none of them waits for another one,
    or if not all replicas are simulated: then what follows on a request goes where that went.
    """
    scenario, workload = prepared.loaded.scenario, prepared.workload
    hardware, count = scenario.hardware, scenario.hardware.num_simulated
    closed = isinstance(scenario.workload.arrivals, ClosedLoopArrivals)
    waits_for_nothing = scenario.workload.sessions is None and not closed
    sampled = count < hardware.replicas
    if sampled and closed:
        step = "remove it, or describe the arrivals by a rate"
        raise ConfigError(
            Problem("does not go with a closed loop", path="hardware.simulated_replicas", next_step=step)
        )
    replicas = [_replica(prepared, step_time)[0] for _ in range(count)]
    if hardware.router in BLIND and (waits_for_nothing or sampled):
        parts = shares(workload, blind_route(hardware.router, hardware.replicas, scenario.seed), count)
        pairs = zip(parts, replicas, strict=True)
        return [serve(part, [one], lambda request: 0)[0] for part, one in pairs]
    route = build_route(hardware.router, [one.scheduler for one in replicas], scenario.seed)
    return serve(workload, replicas, route, waits_for_nothing=waits_for_nothing)
