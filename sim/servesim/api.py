"""What a notebook imports: load a scenario, simulate it, compare two."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

from servesim.analysis.fleet import check_engines
from servesim.analysis.metrics import summarise
from servesim.analysis.prepared import refuse_if_none_fits
from servesim.analysis.run import Run
from servesim.analysis.simulation import Prepared, prepare, run_prepared
from servesim.config.load import LoadedScenario, find_data, load_scenario, loaded_scenario
from servesim.config.profiles import load_gpu
from servesim.config.scenario import EngineVersion
from servesim.config.step_trace import load_requests, load_settings
from servesim.cost.budget import MemoryBudget
from servesim.engine.step_trace import Replay, Step, trace_head
from servesim.errors import CalibrationError, ConfigError, Problem, did_you_mean
from servesim.results import (
    Accuracy,
    Calibrations,
    Comparison,
    FinishedComparison,
    FragmentationReport,
    PrefixCacheReport,
    Result,
)

if TYPE_CHECKING:
    from servesim.analysis.kernel_fit import KernelFit
    from servesim.studies import (
        Capacity,
        Explained,
        FleetPlan,
        PairedReplications,
        Replicated,
        SensitivityStudy,
        Sweep,
        capacity,
        explain,
        plan,
        replicate,
        replicate_compared,
        sensitivity,
        sweep,
    )

__all__ = [
    "Accuracy",
    "Calibrations",
    "Capacity",
    "Comparison",
    "Explained",
    "FinishedComparison",
    "FleetPlan",
    "FragmentationReport",
    "PairedReplications",
    "PrefixCacheReport",
    "Replicated",
    "Result",
    "SensitivityStudy",
    "Sweep",
    "calibrate",
    "capacity",
    "check",
    "check_expect",
    "compare",
    "compare_many",
    "explain",
    "fit",
    "fragmentation",
    "is_finished",
    "load",
    "plan",
    "prefix_cache",
    "replicate",
    "replicate_compared",
    "sensitivity",
    "simulate",
    "sweep",
    "trace",
    "validate",
]


def __getattr__(name: str) -> Any:
    """Import the studies of many runs when one is first asked for: a single run does not need them."""
    if name not in __all__:
        raise AttributeError(f"module 'servesim.api' has no attribute '{name}'")
    from servesim import studies

    return getattr(studies, name)


load = load_scenario

Source = LoadedScenario | str | Path
Progress = Callable[[int, int, float], None]
"""Called with (requests ended, requests in all, simulated seconds)."""


def simulate(
    scenario: Source,
    *,
    overrides: Sequence[str] = (),
    progress: Progress | None = None,
    stop: Callable[[], bool] = lambda: False,
    step_trace: Callable[[Step], None] | None = None,
    split_latencies: bool = False,
) -> Result:
    """Simulate a scenario: a loaded one, a file or a shipped name.

    ``overrides`` are texts like ``"engine.block_size=32"``. Once ``stop()`` is true the simulation ends
    early and its result is marked as partial. ``step_trace`` is given every line of a step trace; each step
    is then computed on its own, so it takes longer. ``split_latencies`` takes notes, so that the report says
    where the requests' time went. Raises ServesimError for anything its author can mend.
    """
    prepared = _prepare(scenario, overrides)
    hardware, ended = prepared.loaded.scenario.hardware, 0
    total = round(prepared.workload.num_requests * hardware.num_simulated / hardware.replicas)

    def on_end(now_s: float) -> None:
        nonlocal ended
        ended += 1
        if progress is not None:
            progress(ended, max(ended, total), now_s)  # the share of some replicas is known by about

    if not split_latencies:
        return Result(run_prepared(prepared, on_end=on_end, stop=stop, step_trace=step_trace))
    from servesim.analysis.watched_run import watched_run

    return Result(*watched_run(prepared, on_end=on_end, stop=stop, step_trace=step_trace))


def check_expect(scenario: Source, *, overrides: Sequence[str] = ()) -> None:
    """Raise ConfigError when a scenario expects nothing, or a metric that no result of it has."""
    prepared = _prepare(scenario, overrides)
    if not prepared.loaded.scenario.expect:
        problem = Problem(
            "the scenario expects nothing",
            file=str(prepared.loaded.file),
            path="expect",
            next_step="add a list of metrics with value and tolerance (docs/expectations.md)",
        )
        raise ConfigError(problem)
    _refuse_unknown_metrics(prepared)


def _refuse_unknown_metrics(prepared: Prepared) -> None:
    """Look the scenario's metrics up in the result of a run in which nothing happens."""
    from servesim.analysis.expectations import metrics_of, refuse_unknown_metrics
    from servesim.engine.events import Log
    from servesim.report.as_json import result

    resolved = prepared.loaded.scenario.model_copy(update={"engine": prepared.engine})
    nothing = Run(resolved, prepared.gpu, prepared.model, prepared.memory, Log())
    metrics = metrics_of(result(summarise(nothing)))
    refuse_unknown_metrics(resolved.expect, metrics, str(prepared.loaded.file))


def compare(a: Source, b: Source, *, overrides: Sequence[str] = (), **options: Any) -> Comparison:
    """Simulate two scenarios; what they draw at random is the same wherever they ask for the same."""
    return Comparison(
        simulate(a, overrides=overrides, **options), simulate(b, overrides=overrides, **options)
    )


def compare_many(
    sources: Sequence[Source], *, overrides: Sequence[str] = (), **options: Any
) -> FinishedComparison:
    """Finished reports (paths of their result.json) and scenarios, mixed; the latter are simulated."""
    from servesim.analysis.finished import read_finished

    read = {i: read_finished(Path(str(each))) for i, each in enumerate(sources) if is_finished(each)}
    return FinishedComparison(
        tuple(
            read[i] if i in read else simulate(each, overrides=overrides, **options).finished()
            for i, each in enumerate(sources)
        )
    )


def is_finished(source: Source) -> bool:
    """Whether a source is the JSON of a finished report and not a scenario."""
    return not isinstance(source, LoadedScenario) and str(source).endswith(".json")


def fragmentation(
    scenario: str | Path, *, overrides: Sequence[str] = (), **options: Any
) -> FragmentationReport:
    """Where the KV memory goes with each allocator, on the same requests.

    ``options`` are those of analysis.lab.run_lab: allocators, replications, block_sizes, capacity, maps.
    """
    from servesim.analysis.lab import run_lab

    return FragmentationReport(run_lab(str(scenario), overrides, **options))


def prefix_cache(
    scenario: Source,
    sizes_tokens: Sequence[int] = (),
    *,
    overrides: Sequence[str] = (),
    on_size: Callable[[float], None] = lambda size: None,
) -> PrefixCacheReport:
    """Replay a scenario's prompts through prefix caches of several sizes, without an engine.

    Sizes in tokens; multiples of the engine's own pool when none are given.
    """
    from servesim.analysis.prefix_cache import study_cache

    return PrefixCacheReport(study_cache(_prepare(scenario, overrides), sizes_tokens, on_size))


def check(scenario: Source, *, overrides: Sequence[str] = ()) -> tuple[LoadedScenario, MemoryBudget, int]:
    """Everything short of simulating: files, settings, memory; returns them with the number of requests.

    Raises ConfigError, too, where every request would be refused.
    """
    prepared = _prepare(scenario, overrides)
    refuse_if_none_fits(prepared)
    check_engines(prepared)
    if prepared.loaded.scenario.expect:
        _refuse_unknown_metrics(prepared)
    return prepared.loaded, prepared.memory, prepared.workload.num_requests


def _prepare(source: Source, overrides: Sequence[str]) -> Prepared:
    return prepare(loaded_scenario(source, overrides))


def fit(gpu: str | Path, measurements: Path | None = None) -> tuple[Path, KernelFit]:
    """Fit a GPU's kernel efficiencies to measured times; returns its file, too, which is not changed.

    ``measurements``: a table with the columns of hardware/measurements, instead of that one.
    """
    from servesim.analysis.kernel_fit import fit_gpu
    from servesim.analysis.kernel_table import read_kernel_table

    path = find_data("gpus", str(gpu))
    profile = load_gpu(path)
    return path, fit_gpu(profile, read_kernel_table(profile, measurements))


def validate(
    folders: Sequence[str | Path] = (), *, on_run: Callable[[str, int, int], None] | None = None
) -> Accuracy:
    """Replay recorded runs: those of ``folders``, or the shipped ones.

    ``on_run(name, done, total)`` is called after each run. Raises ServesimError for a folder that cannot be
    read; a run that the simulator refuses is listed in the result.
    """
    from servesim.analysis.recorded import find_folders, read_folder
    from servesim.analysis.validate import validate_folder

    recorded = [read_folder(path) for path in find_folders([Path(folder) for folder in folders])]
    total, done = sum(one.num_replays for one in recorded), 0

    def count(name: str) -> None:
        nonlocal done
        done += 1
        if on_run is not None:
            on_run(name, done, total)

    return Accuracy(tuple(validate_folder(one, lambda name=one.name: count(name)) for one in recorded))  # type: ignore[misc]


def calibrate(
    source: str | Path, scenario: Source | None = None, *, overrides: Sequence[str] = ()
) -> Calibrations:
    """Fit the scalars of a server to a folder of recorded runs, or to a detailed `vllm bench serve` result.

    A benchmark's JSON needs the ``scenario`` (model, GPU, engine) of the server; its workload is not used.
    Raises CalibrationError when the measurements cannot tell anything.
    """
    from servesim.analysis.benchmark import read_benchmark
    from servesim.analysis.calibrate import calibrate_folder, calibrate_requests
    from servesim.analysis.recorded import read_folder

    path = Path(source)
    if path.is_dir():
        if scenario is not None or overrides:
            step = "leave out --scenario and --set"
            problem = Problem("recorded runs have scenarios of their own", str(path), next_step=step)
            raise CalibrationError(problem)
        return Calibrations(calibrate_folder(read_folder(path)))
    measured = read_benchmark(path)
    if scenario is None:
        raise CalibrationError(
            Problem(
                "a benchmark's result does not say what served it",
                file=str(path),
                next_step="name the server's model, GPU and engine settings with --scenario",
            )
        )
    loaded = scenario if isinstance(scenario, LoadedScenario) else load_scenario(scenario, overrides)
    name = f"{loaded.scenario.name}-calibrated"
    return Calibrations({f"{name}.yaml": calibrate_requests(loaded, measured, path.name, name)})


def trace(
    settings: str | Path | Mapping[str, Any],
    requests: str | Path | Sequence[Mapping[str, Any]],
    *,
    version: str = "0.26",
    blocks: bool = False,
) -> Iterator[Step]:
    """The lines of the step trace of a bare scheduler: its settings, every step, a summary.

    ``settings`` and ``requests`` are files (JSON or YAML; JSON lines) or what they hold, as in
    docs/step_traces.md. ``blocks`` adds block tables and the ids of reclaimed blocks.
    """
    versions = get_args(EngineVersion)
    if version not in versions:
        hint = f"{did_you_mean(version, versions)} (docs/conformance.md)"
        raise ConfigError(Problem("unknown vLLM version", got=version, hint=hint))
    loaded = load_settings(settings)
    listed = load_requests(requests, loaded.max_model_len)
    replay = Replay(loaded, listed, cast(EngineVersion, version), blocks=blocks)

    def lines() -> Iterator[Step]:
        yield trace_head(version, loaded.model_dump(mode="json", exclude_unset=True))
        yield from replay.steps()
        yield {"summary": replay.summary}

    return lines()
