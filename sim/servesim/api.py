"""What a notebook imports: load a scenario, simulate it, compare two."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

from servesim.analysis.metrics import summarise
from servesim.analysis.run import Run
from servesim.analysis.summary import Summary
from servesim.config.defaults import resolve_engine
from servesim.config.load import LoadedScenario, load_scenario
from servesim.config.profiles import load_gpu, load_model
from servesim.config.scenario import EngineConfig, EngineVersion
from servesim.config.step_trace import load_requests, load_settings
from servesim.cost.budget import MemoryBudget
from servesim.cost.memory import memory_budget
from servesim.cost.step_time import build_step_time
from servesim.engine.acceptance import build_acceptance
from servesim.engine.build import build_scheduler
from servesim.engine.loop import simulate as simulate_engine
from servesim.engine.step_trace import NotedAcceptance, Replay, Step, trace_steps
from servesim.errors import ConfigError, Problem, did_you_mean
from servesim.workload.build import build_workload
from servesim.workload.request import Workload

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Comparison", "Result", "check", "compare", "load", "simulate", "trace"]

load = load_scenario

Source = LoadedScenario | str | Path
Progress = Callable[[int, int, float], None]
"""Called with (requests ended, requests in all, simulated seconds)."""


@dataclass(frozen=True)
class Result:
    """A finished simulation; tables and files are made when they are asked for."""

    run: Run

    @cached_property
    def summary(self) -> Summary:
        """Every figure of the run, in SI units."""
        return summarise(self.run)

    @property
    def requests(self) -> pd.DataFrame:
        """One row per request."""
        from servesim.analysis.tables import requests_frame

        return requests_frame(self.run.log)

    @property
    def steps(self) -> pd.DataFrame:
        """One row per run of identical steps."""
        from servesim.analysis.tables import steps_frame

        return steps_frame(self.run.log)

    @property
    def kv(self) -> pd.DataFrame:
        """The KV pool by class over time, in token slots."""
        from servesim.analysis.tables import kv_frame

        return kv_frame(self.run.log)

    def __str__(self) -> str:
        from servesim.report.terminal import result_text

        return result_text(self.summary)

    def to_json(self) -> str:
        """One JSON object: vLLM's benchmark keys, then ours."""
        from servesim.report.as_json import to_json

        return to_json(self.summary)

    def to_html(self) -> str:
        """The report as one offline page."""
        from servesim.report.html import report_html

        return report_html(self.run, self.summary)

    def files(self) -> dict[str, str]:
        """Everything that ``servesim run --out`` writes, by file name."""
        from servesim.analysis.tables import to_csv

        tables = {"requests": self.requests, "steps": self.steps, "kv": self.kv}
        return {
            "report.html": self.to_html(),
            "result.json": self.to_json(),
            **{f"{name}.csv": to_csv(table) for name, table in tables.items()},
        }


@dataclass(frozen=True)
class Comparison:
    """Two simulations of the same random numbers."""

    a: Result
    b: Result

    def __str__(self) -> str:
        from servesim.report.terminal import comparison_text

        return comparison_text(self.a.summary, self.b.summary)

    def to_json(self) -> str:
        """Both results and the table of differences."""
        from servesim.report.as_json import comparison_json

        return comparison_json(self.a.summary, self.b.summary)

    def to_html(self) -> str:
        """Both results in one offline page."""
        from servesim.report.html import comparison_html

        return comparison_html((self.a.run, self.a.summary), (self.b.run, self.b.summary))

    def files(self) -> dict[str, str]:
        """Everything that ``servesim compare --out`` writes, by file name."""
        return {"compare.html": self.to_html(), "compare.json": self.to_json()}


def simulate(
    scenario: Source,
    *,
    overrides: Sequence[str] = (),
    progress: Progress | None = None,
    stop: Callable[[], bool] = lambda: False,
    step_trace: Callable[[Step], None] | None = None,
) -> Result:
    """Simulate a scenario: a loaded one, a file or a shipped name.

    ``overrides`` are texts like ``"engine.block_size=32"``. Once ``stop()`` is true the simulation ends
    early and its result is marked as partial. ``step_trace`` is given every line of a step trace; each step
    is then computed on its own, so it takes longer. Raises ServesimError for anything its author can mend.
    """
    prepared = _prepare(scenario, overrides)
    engine, total, ended = prepared.engine, prepared.workload.num_requests, 0

    def on_end(now_s: float) -> None:
        nonlocal ended
        ended += 1
        if progress is not None:
            progress(ended, total, now_s)

    resolved = prepared.loaded.scenario.model_copy(update={"engine": engine})
    step_time = build_step_time(prepared.model, prepared.gpu, engine, prepared.draft)
    accept = None
    if engine.speculative is not None:
        seed, find = prepared.loaded.scenario.seed, prepared.loaded.find
        accept = NotedAcceptance(
            build_acceptance(engine.speculative, seed, lambda name: find("traces", name))
        )
    scheduler = build_scheduler(
        engine, prepared.memory, step_time.windows, one_by_one=step_trace is not None, accept=accept
    )
    recorder = None
    if step_trace is not None:
        step_trace(_trace_head(engine.version, resolved.model_dump(mode="json")))
        recorder = trace_steps(scheduler, step_trace, accept)
    log = simulate_engine(
        prepared.workload,
        scheduler,
        step_time,
        pipeline_depth=2 if engine.async_scheduling else 1,
        on_end=on_end,
        stop=stop,
    )
    if step_trace is not None and recorder is not None:
        step_trace({"summary": recorder.summary()})
    return Result(Run(resolved, prepared.gpu, prepared.model, prepared.memory, log))


def compare(a: Source, b: Source, *, overrides: Sequence[str] = (), **options: Any) -> Comparison:
    """Simulate two scenarios; what they draw at random is the same wherever they ask for the same."""
    return Comparison(
        simulate(a, overrides=overrides, **options), simulate(b, overrides=overrides, **options)
    )


def check(scenario: Source, *, overrides: Sequence[str] = ()) -> tuple[LoadedScenario, MemoryBudget, int]:
    """Everything short of simulating: files, settings, memory; returns them with the number of requests."""
    prepared = _prepare(scenario, overrides)
    build_step_time(prepared.model, prepared.gpu, prepared.engine, prepared.draft)
    return prepared.loaded, prepared.memory, prepared.workload.num_requests


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
        yield _trace_head(version, loaded.model_dump(mode="json", exclude_unset=True))
        yield from replay.steps()
        yield {"summary": replay.summary}

    return lines()


def _trace_head(version: str, settings: dict[str, Any]) -> dict[str, Any]:
    from importlib.metadata import version as installed

    return {"servesim": installed("servesim"), "vllm": version, "settings": settings}


@dataclass(frozen=True)
class _Prepared:
    loaded: LoadedScenario
    gpu: Any
    model: Any
    engine: EngineConfig
    memory: MemoryBudget
    workload: Workload
    draft: Any


def _prepare(source: Source, overrides: Sequence[str]) -> _Prepared:
    loaded = source if isinstance(source, LoadedScenario) else load_scenario(source, overrides)
    scenario = loaded.scenario
    gpu = load_gpu(str(loaded.find("gpus", scenario.hardware.gpu)))
    model = load_model(str(loaded.find("models", scenario.model)))
    engine = resolve_engine(scenario.engine, model, gpu)
    draft = None
    if engine.speculative is not None and engine.speculative.draft_model is not None:
        draft = load_model(str(loaded.find("models", engine.speculative.draft_model)))
    memory = memory_budget(model, gpu, engine, draft)
    workload = build_workload(scenario.workload, scenario.seed, lambda name: loaded.find("traces", name))
    return _Prepared(loaded, gpu, model, engine, memory, workload, draft)
