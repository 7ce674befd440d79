"""A scenario with every file read and every default filled in, and the engines that it describes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar, cast

from servesim.config.defaults import resolve_engine, with_whole_tables
from servesim.config.engine_profile import profiled_engine
from servesim.config.fleet import PoolConfig
from servesim.config.load import LoadedScenario
from servesim.config.profiles import GpuProfile, ModelProfile, load_gpu, load_model
from servesim.config.scenario import EngineConfig
from servesim.cost.memory import MemoryBudget, memory_budget
from servesim.cost.step_time import StepTime
from servesim.engine.acceptance import RecordedDrafts, build_acceptance
from servesim.engine.beams import build_beams
from servesim.engine.build import build_scheduler
from servesim.engine.fleet import Replica
from servesim.engine.scheduler import Scheduler
from servesim.errors import ConfigError, Problem
from servesim.workload.build import build_workload
from servesim.workload.request import Request, Workload

__all__ = ["Prepared", "Watch", "build_replica", "of_pool", "prepare", "refuse_if_none_fits"]

Watch = Callable[[int, EngineConfig, Scheduler, StepTime], StepTime]
"""Given a replica's number, settings, scheduler and law before it begins; returns the law that holds."""


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
    relax: Callable[[Prepared], Prepared] | None = None
    """Applied to what every pool is made of, too."""


def prepare(loaded: LoadedScenario, workload: Workload | None = None) -> Prepared:
    """Everything that the simulation needs; ``workload`` takes the place of the scenario's own.

    Where pools serve, GPU, engine and memory are those of the first. Raises ServesimError for anything that
    the scenario's author can mend.
    """
    scenario = loaded.scenario
    if scenario.fleet is not None and scenario.fleet.pools:
        first = next(iter(scenario.fleet.pools.values()))
        return replace(prepare(_of_pool(loaded, first), workload), loaded=loaded)
    gpu = _profile(load_gpu, loaded.find("gpus", scenario.hardware.gpu))
    model = _profile(load_model, loaded.find("models", scenario.model))
    engine = scenario.engine
    if scenario.workload.forks is not None:
        engine = with_whole_tables(engine)
        if "preemption_mode" not in engine.model_fields_set:  # vLLM swaps requests of several sequences
            engine = engine.model_copy(update={"preemption_mode": "swap"})
    engine = profiled_engine(loaded, resolve_engine(engine, model, gpu))
    draft = None
    if engine.speculative is not None and engine.speculative.draft_model is not None:
        draft = _profile(load_model, loaded.find("models", engine.speculative.draft_model))
    memory = memory_budget(model, gpu, engine, draft)
    if workload is None:
        find = partial(loaded.find, "traces")
        workload = build_workload(scenario.workload, scenario.seed, find, redraw_lengths=loaded.redraws)
    return Prepared(loaded, gpu, model, engine, memory, workload, draft)


def refuse_if_none_fits(prepared: Prepared) -> None:
    """Raise ConfigError where the prompt of every request fills max_model_len. Uses the workload up."""
    fleet = prepared.loaded.scenario.fleet
    pools = [of_pool(prepared, pool) for pool in fleet.pools.values()] if fleet else []
    longest, shortest = max(each.engine.max_model_len or 0 for each in pools or [prepared]), 0
    for first in prepared.workload.arrivals():
        request: Request | None = first
        while request is not None:
            if request.prompt_tokens < longest:
                return
            shortest = min(shortest or request.prompt_tokens, request.prompt_tokens)
            request = prepared.workload.follow_up(request, request.arrival_s)
    if shortest:
        problem = Problem(
            "every request would be refused: no prompt leaves room for an answer",
            file=str(prepared.loaded.file),
            path="engine.max_model_len",
            got=str(longest),
            hint=f"the shortest prompt has {shortest:,} tokens",
            next_step="raise engine.max_model_len",
        )
        raise ConfigError(problem)


Loaded = TypeVar("Loaded", GpuProfile, ModelProfile)
_profiles: dict[tuple[str, int, int], GpuProfile | ModelProfile] = {}


def _profile(load: Callable[[str], Loaded], path: Path) -> Loaded:
    """A profile, read once for as long as its file stays the same: a table of runs asks for it again."""
    about = path.stat()
    key = (str(path.resolve()), about.st_mtime_ns, about.st_size)
    if key not in _profiles:
        _profiles[key] = load(str(path))
    return cast(Loaded, _profiles[key])


def of_pool(prepared: Prepared, pool: PoolConfig) -> Prepared:
    """The same, for one of the replicas of a pool."""
    own = prepare(_of_pool(prepared.loaded, pool), prepared.workload)
    own = replace(own, rows_met=prepared.rows_met)
    return own if prepared.relax is None else prepared.relax(own)


def _of_pool(loaded: LoadedScenario, pool: PoolConfig) -> LoadedScenario:
    """The scenario of one replica of a pool."""
    scenario = loaded.scenario
    hardware = scenario.hardware.model_copy(update={"gpu": pool.gpu or scenario.hardware.gpu})
    changes = {"hardware": hardware, "engine": scenario.pool_engine(pool), "fleet": None}
    return replace(loaded, scenario=scenario.model_copy(update=changes))


def build_replica(
    prepared: Prepared,
    step_time: StepTime,
    *,
    one_by_one: bool = False,
    track_ids: bool = False,
    serves: Literal["all", "prefill", "decode"] = "all",
) -> Replica:
    """An engine with an empty cache."""
    engine, loaded, accept = prepared.engine, prepared.loaded, None
    drafts = prepared.drafts
    if engine.speculative is not None:
        accept = drafts or build_acceptance(
            engine.speculative, loaded.scenario.seed, lambda name: loaded.find("traces", name)
        )
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
        serves=serves,
    )
    return Replica(scheduler, step_time)
