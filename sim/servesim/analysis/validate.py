"""Simulation against recorded runs: the signed error of every figure, by load, with its uncertainty."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from servesim.analysis.figures import METRICS, figures_of, memory_figures, request_figures, sample_of
from servesim.analysis.measured import Latencies, MeasuredWorkload, simulated_latencies
from servesim.analysis.metrics import summarise
from servesim.analysis.recorded import RecordedFolder, RecordedRow, RecordedRun, failure
from servesim.analysis.simulation import Prepared, prepare, run_prepared
from servesim.analysis.summary import Summary
from servesim.config.load import LoadedScenario
from servesim.config.profiles import ModelProfile
from servesim.config.scenario import EngineConfig
from servesim.errors import ServesimError

if TYPE_CHECKING:
    from servesim.analysis.validate_steps import StepwiseFindings

__all__ = [
    "FITTED_TO",
    "Finding",
    "Refusal",
    "Regime",
    "Validation",
    "about",
    "listed",
    "memory_findings",
    "regime_of",
    "validate_folder",
    "with_profile",
]

Regime = Literal["latency-bound", "middle", "saturated", "KV-limited", "memory"]
FITTED_TO = "rows fitted to"
"""judged_on of calibrated rows that their own calibration was fitted to: shown, but no evidence."""
_FEW_RUNNING = 4  # mean batch below which a step is all launches and weight streaming
_RESAMPLES = 1000
_OF_POOL = ("kv_cache_gib", "num_gpu_blocks")


@dataclass(frozen=True, slots=True)
class Finding:
    """One figure of one recorded run, real and simulated."""

    source: str
    row: str
    gpu: str
    num_gpus: int
    model: str
    features: tuple[str, ...]
    """What the deployment uses beyond a dense bf16 model on one GPU."""
    regime: Regime
    metric: str
    real: float
    simulated: float
    calibrated: bool
    judged_on: str
    """Which part of the recording both numbers come from."""
    low: float = math.nan
    high: float = math.nan
    """Bootstrap interval (95 %) of the error over requests; NaN where single requests are not known."""
    load: str = ""
    """As the recording names it: a share of the capacity, burst."""
    repeats: int = 1
    """Real runs of the same requests; ``real`` is their geometric mean."""
    noise: float = math.nan
    """Standard deviation of ln(real) from repeat to repeat; NaN without repeats."""

    @property
    def error(self) -> float:
        """ln(simulated / real): +0.10 reads as ten percent too much."""
        return math.log(self.simulated / self.real)


@dataclass(frozen=True, slots=True)
class Refusal:
    """A recorded run that the simulator cannot serve."""

    source: str
    row: str
    reason: str


@dataclass(frozen=True, slots=True)
class Validation:
    """Everything found in one folder."""

    folder: RecordedFolder
    findings: tuple[Finding, ...]
    refusals: tuple[Refusal, ...]
    stepwise: StepwiseFindings | None = None


def validate_folder(folder: RecordedFolder, on_row: Callable[[], None] = lambda: None) -> Validation:
    """Replay what a folder holds, without and with its calibration; ``on_row()`` is called after each run."""
    findings: list[Finding] = []
    refusals: list[Refusal] = []
    if folder.run is not None:
        with listed(refusals, folder.name, folder.run.loaded.scenario.name):
            findings += _replayed_run(folder.name, folder.run)
        on_row()
    for row in folder.rows:
        with listed(refusals, folder.name, row.name):
            findings += _replayed_row(folder.name, row)
        on_row()
    if folder.stepwise is None:
        return Validation(folder, tuple(findings), tuple(refusals))
    from servesim.analysis.validate_steps import validate_steps  # builds on this module

    stepwise = validate_steps(folder.name, folder.stepwise, on_row)
    return Validation(folder, stepwise.findings, stepwise.refusals, stepwise)


@contextmanager
def listed(refusals: list[Refusal], source: str, name: str) -> Iterator[None]:
    """Add what the simulator refuses in this block to ``refusals``, and go on."""
    try:
        yield
    except ServesimError as error:
        refusals.append(Refusal(source, name, failure(error)))


def regime_of(summary: Summary) -> Regime:
    """The load that a run was under, told from its simulation.

    KV-limited: requests were preempted, or waited while the pool was full; saturated: requests waited for
    more than half of the time; latency-bound: at most four requests ran on average.
    """
    load = summary.load
    if load.preemptions or (load.queue_share > 0.05 and summary.kv.peak_usage > 0.95):
        return "KV-limited"
    if load.queue_share > 0.5:
        return "saturated"
    return "latency-bound" if load.mean_running <= _FEW_RUNNING else "middle"


def _features(engine: EngineConfig, model: ModelProfile, hits: bool) -> tuple[str, ...]:
    """What a deployment uses that has kernels or rules of its own; names as in analysis.coverage."""
    mxfp4 = model.moe is not None and model.moe.routed_weight_bits == 4.25
    graphs = engine.cudagraph_mode
    named = {
        f"tensor parallelism {engine.tensor_parallel_size}": engine.tensor_parallel_size > 1,
        "pipeline parallelism": engine.pipeline_parallel_size > 1,
        "expert parallelism": engine.enable_expert_parallel,
        f"{engine.quantization} weights": engine.quantization != "none",
        "mxfp4 weights": mxfp4 or engine.quantization == "mxfp4",
        f"{engine.kv_cache_dtype} KV cache": engine.kv_cache_dtype != "auto",
        "mixture of experts": model.moe is not None,
        "latent attention (MLA)": model.mla is not None,
        "sliding windows": len(set(model.windows)) > 1 or model.windows[0] is not None,
        "async scheduling": engine.async_scheduling,
        "prefix caching with hits": hits,
        "eager mode": engine.enforce_eager or graphs == "none",
        f"CUDA graphs {graphs}": graphs not in ("full_and_piecewise", "none"),
        "no chunked prefill": not engine.enable_chunked_prefill,
        "speculative decoding": engine.speculative is not None,
        "priority scheduling": engine.scheduling_policy == "priority",
        "swapping": engine.preemption_mode == "swap",
        "KV eviction": engine.kv_eviction is not None,
        f"{engine.batching} batching": engine.batching != "continuous",
        "contiguous allocator": engine.allocator != "paged",
    }
    return tuple(name for name, used in named.items() if used)


def _replayed_run(source: str, recorded: RecordedRun) -> Iterator[Finding]:
    """A run as it comes, and on the second half of its requests without and with calibration."""
    workload = MeasuredWorkload(recorded.requests)
    real = recorded.requests.latencies
    second = slice(len(real) // 2, None)
    simulated, found = _replay(source, prepare(recorded.loaded, workload))
    yield from memory_findings(source, found.row, recorded.loaded, recorded.memory)
    yield from _request_findings(found, real, simulated, "all requests")
    if recorded.profile is None:
        return
    yield from _request_findings(found, real.part(second), simulated.part(second), "second half")
    profiled = with_profile(recorded.loaded, recorded.profile)
    simulated, found = _replay(source, prepare(profiled, workload))
    calibrated = replace(found, calibrated=True)
    yield from _request_findings(calibrated, real.part(second), simulated.part(second), "second half")


def _replay(source: str, prepared: Prepared) -> tuple[Latencies, Finding]:
    run = run_prepared(prepared)
    summary = summarise(run)
    hits = summary.load.prefix_cache_hits > 0
    return simulated_latencies(run), about(source, prepared, regime_of(summary), hits=hits)


def _request_findings(
    found: Finding, real: Latencies, simulated: Latencies, judged_on: str
) -> Iterator[Finding]:
    """Every figure of a run with the bootstrap interval of its error, requests drawn in pairs."""
    real_figures, simulated_figures = request_figures(real), request_figures(simulated)
    draws = np.random.default_rng(0).integers(0, len(real), (_RESAMPLES, len(real)))
    for metric, value in real_figures.items():
        low, high = _interval(metric, real, simulated, draws)
        yield replace(
            found,
            metric=metric,
            real=value,
            simulated=simulated_figures[metric],
            judged_on=judged_on,
            low=low,
            high=high,
        )


def _interval(
    metric: str, real: Latencies, simulated: Latencies, draws: np.ndarray[tuple[int, ...], np.dtype[np.int64]]
) -> tuple[float, float]:
    pair = sample_of(metric, real), sample_of(metric, simulated)
    if pair[0] is None or pair[1] is None:
        return math.nan, math.nan
    statistic = METRICS[metric].statistic
    with np.errstate(all="ignore"):
        errors = np.log(statistic(pair[1][draws]) / statistic(pair[0][draws]))
    low, high = np.percentile(errors, (2.5, 97.5))
    return float(low), float(high)


def _replayed_row(source: str, row: RecordedRow) -> Iterator[Finding]:
    loaded = row.load()
    memory = {name: value for name, value in row.measured.items() if METRICS[name].of_memory}
    if memory:
        yield from memory_findings(source, row.name, loaded, memory)
    if len(memory) == len(row.measured):
        return
    yield from _simulated_row(source, row, loaded)
    if row.profile is not None and row.profile.is_file():
        judged_on = "other rows" if row.judged else FITTED_TO
        for finding in _simulated_row(source, row, with_profile(loaded, row.profile)):
            yield replace(finding, calibrated=True, judged_on=judged_on)


def memory_findings(
    source: str, name: str, loaded: LoadedScenario, measured: dict[str, float]
) -> Iterator[Finding]:
    """What the memory model finds by itself, whatever the scenario or its profile say of the pool.

    A pool that the server was given in bytes is not found by anyone, and not judged.
    """
    engine = loaded.scenario.engine
    unsaid = {"num_gpu_blocks_override": None, "profile": None}
    prepared = prepare(_with_engine(loaded, unsaid))
    found, simulated = about(source, prepared, "memory"), memory_figures(prepared.memory)
    for metric, value in measured.items():
        if metric in _OF_POOL and engine.kv_cache_memory_bytes is not None:
            continue
        yield replace(
            found, row=name, metric=metric, real=value, simulated=simulated[metric], judged_on="start-up"
        )


def _simulated_row(source: str, row: RecordedRow, loaded: LoadedScenario) -> Iterator[Finding]:
    prepared = prepare(loaded)
    summary = summarise(run_prepared(prepared))
    hits = summary.load.prefix_cache_hits > 0
    found, simulated = about(source, prepared, regime_of(summary), hits=hits), figures_of(summary)
    for metric, value in row.measured.items():
        if metric in simulated:
            yield replace(
                found,
                row=row.name,
                metric=metric,
                real=value,
                simulated=simulated[metric],
                judged_on="whole run",
            )


def about(source: str, prepared: Prepared, regime: Regime, *, hits: bool = False) -> Finding:
    """A finding with everything but its numbers."""
    gpu, model, engine = prepared.gpu, prepared.model, prepared.engine
    return Finding(
        source=source,
        row=prepared.loaded.scenario.name,
        gpu=gpu.name,
        num_gpus=engine.tensor_parallel_size * engine.pipeline_parallel_size,
        model=model.name,
        # On a CPU nothing is learned about a GPU's kernels.
        features=() if gpu.architecture == "cpu" else _features(engine, model, hits),
        regime=regime,
        metric="",
        real=math.nan,
        simulated=math.nan,
        calibrated=False,
        judged_on="",
    )


def with_profile(loaded: LoadedScenario, profile: Path) -> LoadedScenario:
    """The scenario with an engine profile named in it."""
    return _with_engine(loaded, {"profile": str(profile)})


def _with_engine(loaded: LoadedScenario, update: dict[str, Any]) -> LoadedScenario:
    engine = loaded.scenario.engine.model_copy(update=update)
    return replace(loaded, scenario=loaded.scenario.model_copy(update={"engine": engine}))
