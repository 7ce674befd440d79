"""Studies of many runs, for notebooks and commands: replications with intervals, and sweeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from servesim.analysis.grid import read_axis
from servesim.analysis.plan import Plan, make_plan
from servesim.analysis.plan_trials import run_trial
from servesim.analysis.replications import (
    PairedEstimate,
    Replications,
    differences,
    replicate_pair,
    run_replication,
)
from servesim.analysis.replications import replicate as replicate_scenario
from servesim.analysis.run_folder import RunFolder
from servesim.analysis.sensitivity import Sensitivity, run_task, sensitivity_of
from servesim.analysis.sweep import OnDone, Workers, ignore, in_order, plan_sweep, run_sweep
from servesim.config.load import LoadedScenario, load_scenario, loaded_scenario
from servesim.errors import ConfigError, Problem

if TYPE_CHECKING:
    import pandas as pd

    from servesim.analysis.explain import Explanation

__all__ = [
    "Explained",
    "FleetPlan",
    "PairedReplications",
    "Replicated",
    "SensitivityStudy",
    "Sweep",
    "explain",
    "plan",
    "replicate",
    "replicate_compared",
    "sensitivity",
    "sweep",
]

Source = LoadedScenario | str | Path


@dataclass(frozen=True)
class Replicated:
    """A scenario's figures over independent replications."""

    replications: Replications

    def __str__(self) -> str:
        from servesim.report.replicated import replicated_text

        return replicated_text(self.replications)

    def to_json(self) -> str:
        """vLLM's keys with means, and the intervals."""
        from servesim.report.replicated import replicated_json

        return replicated_json(self.replications)

    def to_html(self) -> str:
        """The figures with their intervals, and the warm-up, as one offline page."""
        from servesim.report.replicated_page import replicated_html

        return replicated_html(self.replications)

    @property
    def frame(self) -> pd.DataFrame:
        """A row per replication."""
        import pandas as pd

        from servesim.report.replicated import replications_rows

        return pd.DataFrame(replications_rows(self.replications))

    def files(self) -> dict[str, str]:
        """Everything that ``servesim run --replications N --out`` writes, by file name."""
        from servesim.analysis.tables import to_csv

        return {
            "replications.html": self.to_html(),
            "result.json": self.to_json(),
            "replications.csv": to_csv(self.frame),
        }


@dataclass(frozen=True)
class PairedReplications:
    """Two scenarios over the same replications."""

    a: Replications
    b: Replications

    @property
    def differences(self) -> list[PairedEstimate]:
        """Every figure, with the interval of b - a."""
        return differences(self.a, self.b)

    def __str__(self) -> str:
        from servesim.report.replicated import paired_text

        return paired_text(self.a, self.b, self.differences)

    def to_html(self) -> str:
        """The differences with their intervals as one offline page."""
        from servesim.report.replicated_page import paired_html

        return paired_html(self.a, self.b, self.differences)

    def to_json(self) -> str:
        """Both, and the differences."""
        from servesim.report.replicated import paired_json

        return paired_json(self.a, self.b, self.differences)

    def files(self) -> dict[str, str]:
        """Everything that ``servesim compare --replications N --out`` writes, by file name."""
        return {"compare.html": self.to_html(), "compare.json": self.to_json()}


@dataclass(frozen=True)
class Sweep:
    """The points of a sweep, in order, with their figures."""

    manifest: dict[str, Any]
    points: list[dict[str, Any]]

    @property
    def frame(self) -> pd.DataFrame:
        """A row per point: what varies, then every figure."""
        import pandas as pd

        from servesim.report.sweep import sweep_rows

        return pd.DataFrame(sweep_rows(self.manifest, self.points))

    def __str__(self) -> str:
        return self.text()

    def text(self, figures: Sequence[str] = ()) -> str:
        """The table of the points with some figures, by key; a usual choice when none is given."""
        from servesim.report.sweep import sweep_text

        return sweep_text(self.manifest, self.points, figures)

    def to_json(self) -> str:
        """The manifest and every point."""
        from servesim.report.sweep import sweep_json

        return sweep_json(self.manifest, self.points)

    def to_html(self) -> str:
        """The grid as one offline page with sliders."""
        from servesim.report.sweep import sweep_html

        return sweep_html(self.manifest, self.points)

    def files(self) -> dict[str, str]:
        """What stands in the run folder besides the manifest and the points, by file name."""
        from servesim.analysis.tables import to_csv

        return {"sweep.html": self.to_html(), "sweep.json": self.to_json(), "sweep.csv": to_csv(self.frame)}


@dataclass(frozen=True)
class SensitivityStudy:
    """What a scenario's figures depend on, and how sure they are."""

    sensitivity: Sensitivity

    def __str__(self) -> str:
        return self.text()

    def text(self, figures: Sequence[str] = ()) -> str:
        """The tornado of some figures, by key, the sources of uncertainty and the odds of the SLO."""
        from servesim.report.sensitivity import sensitivity_text

        return sensitivity_text(self.sensitivity, figures)

    def to_json(self) -> str:
        """Everything, for every figure."""
        from servesim.report.sensitivity import sensitivity_json

        return sensitivity_json(self.sensitivity)

    def to_html(self, figures: Sequence[str] = ()) -> str:
        """The study as one offline page."""
        from servesim.report.sensitivity import sensitivity_html

        return sensitivity_html(self.sensitivity, figures)

    def files(self) -> dict[str, str]:
        """Everything that ``servesim sensitivity --out`` writes, by file name."""
        return {"sensitivity.html": self.to_html(), "sensitivity.json": self.to_json()}


@dataclass(frozen=True)
class FleetPlan:
    """Which GPUs, and how many, serve a rate within an SLO."""

    plan: Plan

    def __str__(self) -> str:
        from servesim.report.plan import plan_text

        return plan_text(self.plan)

    def to_json(self) -> str:
        """Every configuration, with what was found of it."""
        from servesim.report.plan import plan_json

        return plan_json(self.plan)

    def to_html(self) -> str:
        """The ranking and the prices against the latencies as one offline page."""
        from servesim.report.plan import plan_html

        return plan_html(self.plan)

    def files(self) -> dict[str, str]:
        """Everything that ``servesim plan --out`` writes, by file name."""
        return {"plan.html": self.to_html(), "plan.json": self.to_json()}


def plan(
    scenario: str | Path,
    rate_per_s: float,
    vary: Sequence[str],
    *,
    overrides: Sequence[str] = (),
    budget_usd_per_hour: float | None = None,
    prices_usd_per_hour: Mapping[str, float] | None = None,
    jobs: int | None = None,
    on_trial: OnDone = ignore,
) -> FleetPlan:
    """The cheapest fleets that serve ``rate_per_s`` requests per second within the scenario's SLO.

    ``vary``: texts like ``"hardware.gpu=h100-sxm,b200"``; every combination is one configuration of a
    replica. ``on_trial(done, total)`` is called after each simulation of a round.
    """
    from servesim.analysis.plan_setup import candidates_of, question_of

    axes = [read_axis(text) for text in vary]
    loaded = load_scenario(scenario, overrides)
    question = question_of(loaded, rate_per_s, budget_usd_per_hour, prices_usd_per_hour or {})
    candidates = candidates_of(scenario, overrides, axes, question.traffic)
    workers = Workers(jobs=jobs)
    return FleetPlan(
        make_plan(loaded, question, candidates, lambda tasks: in_order(run_trial, tasks, workers, on_trial))
    )


def sensitivity(
    scenario: Source,
    replications: int = 5,
    *,
    change: float = 0.1,
    overrides: Sequence[str] = (),
    jobs: int | None = None,
    on_run: OnDone = ignore,
) -> SensitivityStudy:
    """Move every input of a scenario down and up by ``change`` (0.1: ten percent) and see what follows.

    ``on_run(done, total)`` is called after each simulation of the variants.
    """
    if not 0 < change < 1:
        step = "give a share such as 0.1"
        raise ConfigError(Problem("a change must be between 0 and 1", got=str(change), next_step=step))
    _refuse_single(replications)
    workers = Workers(jobs=jobs)
    return SensitivityStudy(
        sensitivity_of(
            loaded_scenario(scenario, overrides),
            replications,
            change,
            lambda scenarios: in_order(run_replication, scenarios, workers),
            lambda tasks: in_order(run_task, tasks, workers, on_run),
        )
    )


@dataclass(frozen=True)
class Explained:
    """Why a scenario's percentile is what it is."""

    explanation: Explanation

    def __str__(self) -> str:
        from servesim.report.explain import explanation_text

        return explanation_text(self.explanation)

    def to_json(self) -> str:
        """Parts, cause, and everything that was tried."""
        from servesim.report.explain import explanation_json

        return explanation_json(self.explanation)

    def to_html(self) -> str:
        """The explanation as one offline page."""
        from servesim.report.explain import explanation_html

        return explanation_html(self.explanation)

    @property
    def frame(self) -> pd.DataFrame:
        """A row per completed request: its parts in seconds, and what they add up to."""
        import pandas as pd

        from servesim.analysis.attribution import PARTS

        of = self.explanation.attribution
        parts = {f"{name}_s": of.parts_s[:, number] for number, name in enumerate(PARTS)}
        return pd.DataFrame({"index": of.index, "ttft_s": of.ttft_s, "e2e_s": of.e2e_s, **parts})

    def files(self) -> dict[str, str]:
        """Everything that ``servesim explain --out`` writes, by file name."""
        from servesim.analysis.tables import to_csv

        return {
            "explain.html": self.to_html(),
            "explain.json": self.to_json(),
            "parts.csv": to_csv(self.frame),
        }


def explain(
    scenario: Source,
    metric: str = "ttft_p99",
    *,
    overrides: Sequence[str] = (),
    jobs: int | None = None,
    on_run: OnDone = ignore,
) -> Explained:
    """Split every latency into parts, name what makes the tail of ``metric``, and try what would help.

    ``metric``: ttft_p99, tpot_p99 or e2e_p99. ``on_run(done, total)`` is called after each simulation.
    """
    from servesim.analysis.explain import explain_scenario, run_trial

    name = metric.removesuffix("_p99")
    if name not in ("ttft", "tpot", "e2e"):
        step = "choose ttft_p99, tpot_p99 or e2e_p99"
        raise ConfigError(Problem("unknown metric", got=metric, next_step=step))
    workers = Workers(jobs=jobs)
    return Explained(
        explain_scenario(
            loaded_scenario(scenario, overrides),
            name,
            lambda tasks: in_order(run_trial, tasks, workers, on_run),
        )
    )


def replicate(
    scenario: Source,
    replications: int = 10,
    *,
    overrides: Sequence[str] = (),
    jobs: int | None = None,
    on_run: OnDone = ignore,
) -> Replicated:
    """Simulate a scenario under several seeds, on ``jobs`` cores (None: all); figures without warm-up.

    ``on_run(done, total)`` is called after each replication.
    """
    loaded = loaded_scenario(scenario, overrides)
    _refuse_single(replications)
    return Replicated(
        replicate_scenario(
            loaded, replications, lambda run, each: in_order(run, each, Workers(jobs=jobs), on_run)
        )
    )


def replicate_compared(
    a: Source,
    b: Source,
    replications: int = 10,
    *,
    overrides: Sequence[str] = (),
    jobs: int | None = None,
    on_run: OnDone = ignore,
) -> PairedReplications:
    """Simulate two scenarios under the same seeds; differences are taken pair by pair."""
    pair = loaded_scenario(a, overrides), loaded_scenario(b, overrides)
    _refuse_single(replications)
    return PairedReplications(
        *replicate_pair(
            *pair, replications, lambda run, each: in_order(run, each, Workers(jobs=jobs), on_run)
        )
    )


def sweep(
    scenario: str | Path,
    vary: Sequence[str],
    *,
    out: str | Path,
    overrides: Sequence[str] = (),
    latin: int | None = None,
    replications: int = 1,
    jobs: int | None = None,
    backend: str = "local",
    scheduler: str | None = None,
    on_point: OnDone = ignore,
) -> Sweep:
    """Simulate a scenario over a grid of values, or over ``latin`` points of a Latin hypercube.

    ``vary``: texts like ``"engine.block_size=8,16"`` or ``"slo.ttft_p99_s=0.1:2"`` (a range, with ``latin``).
    Finished points are kept in the folder ``out``, and a sweep that was interrupted goes on from them.
    """
    if backend not in ("local", "dask"):
        raise ConfigError(Problem("unknown backend", "--backend", got=backend, hint="allowed: local, dask"))
    workers = Workers("dask" if backend == "dask" else "local", jobs, scheduler)
    plan = plan_sweep(scenario, overrides, [read_axis(text) for text in vary], latin, replications)
    folder = RunFolder(Path(out), plan.manifest)
    return Sweep(plan.manifest, run_sweep(plan, folder, workers, on_point))


def _refuse_single(replications: int) -> None:
    if replications < 2:
        step = "ask for two or more, ten as a rule"
        raise ConfigError(Problem("an interval needs replications", got=str(replications), next_step=step))
