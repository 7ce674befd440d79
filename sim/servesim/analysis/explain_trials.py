"""What one change makes of a scenario's tail: a simulation of the same requests, or of fresh ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from servesim.analysis.distribution import distribution
from servesim.analysis.metrics import request_times, summarise
from servesim.analysis.relaxations import relaxations_of
from servesim.analysis.remedies import Remedy, applied
from servesim.analysis.replications import run_replication
from servesim.analysis.run import Run
from servesim.analysis.simulation import Prepared, prepare, run_prepared
from servesim.config.load import LoadedScenario
from servesim.errors import ServesimError

__all__ = ["Figures", "Trial", "TrialTask", "figures_of", "run_trial", "usd_per_hour"]


class Figures(NamedTuple):
    """99th percentiles over the completed requests, how many they are, and how many are not."""

    ttft: float
    tpot: float
    e2e: float
    completed: int
    unserved: int


@dataclass(frozen=True, slots=True)
class TrialTask:
    """One simulation: a relaxation by its key, a remedy, or neither.

    ``fresh``: of other requests of the same kind, drawn under the scenario's seed. ``prices`` by GPU take the
    place of those in the GPUs' files.
    """

    loaded: LoadedScenario
    relaxation: str | None = None
    remedy: Remedy | None = None
    fresh: bool = False
    prices: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Trial:
    """What one change makes of the figures; ``refused`` says why it could not be tried."""

    key: str
    label: str
    cause: str
    """Of a relaxation: what is the matter when it helps."""
    kind: str
    figures: Figures | None
    refused: str = ""
    usd_per_hour: float | None = None
    """Price of the GPUs; None for what cannot be bought, and where a GPU's file gives no price."""

    @property
    def rounds(self) -> bool:
        """Whether it changes the answers, which is not simulated."""
        return "=fp8" in self.key

    def change(self, metric: str, base: Figures) -> float:
        """Share by which the figure moves; NaN when it could not be tried."""
        if self.figures is None:
            return float("nan")
        before: float = getattr(base, metric)
        after: float = getattr(self.figures, metric)
        return after / before - 1


def run_trial(task: TrialTask) -> Trial:
    """Simulate one change."""
    try:
        if task.remedy is not None:
            text, loaded = task.remedy.text, applied(task.loaded, task.remedy)
            run = run_replication(loaded) if task.fresh else run_prepared(prepare(loaded))
            price = usd_per_hour(run, task.prices) if task.remedy.has_price else None
            return Trial(text, text, "", task.remedy.kind, figures_of(run), usd_per_hour=price)
        if task.relaxation is None:
            run = run_replication(task.loaded) if task.fresh else run_prepared(prepare(task.loaded))
            return Trial("base", "as it is", "", "base", figures_of(run))
        return _relaxed(prepare(task.loaded), task.relaxation)
    except ServesimError as error:
        text = task.remedy.text if task.remedy is not None else str(task.relaxation)
        problems = getattr(error, "problems", ())
        why = problems[0].problem if problems else str(error)
        return Trial(text, text, "", "refused", None, why)


def _relaxed(prepared: Prepared, key: str) -> Trial:
    [one] = [one for one in relaxations_of(prepared) if one.key == key]
    law = one.law
    watch = None if law is None else lambda replica, engine, scheduler, step_time: law(step_time)
    run = run_prepared(replace(one.relax(prepared), relax=one.relax), watch=watch)
    return Trial(one.key, one.label, one.cause, "relaxation", figures_of(run))


def figures_of(run: Run) -> Figures:
    """The figures of a run."""
    times = request_times(run.log)
    done = times.completed
    tpot_s = times.tpot_s[done]
    return Figures(
        distribution(times.ttft_s[done]).p99_s,
        distribution(tpot_s[np.isfinite(tpot_s)]).p99_s,
        distribution(times.e2e_s[done]).p99_s,
        int(done.sum()),
        int((~done).sum()),
    )


def usd_per_hour(run: Run, prices: Mapping[str, float]) -> float | None:
    """Price of all GPUs of a run; with an autoscaler of those that are paid for, averaged over time."""
    engine, replicas = run.scenario.engine, float(run.scenario.hardware.replicas)
    if run.scenario.fleet is not None and run.scenario.fleet.autoscaler is not None:
        fleet = summarise(run).fleet
        assert fleet is not None
        assert fleet.scaling is not None
        replicas = fleet.scaling.mean_paid
    gpus = [(run.gpu, engine.tensor_parallel_size * engine.pipeline_parallel_size * replicas)]
    if run.pools:
        gpus = [(pool.gpu, float(pool.replicas * pool.gpus_per_replica)) for pool in run.pools]
    total = 0.0
    for gpu, count in gpus:
        price = prices.get(gpu.name, gpu.price_per_hour_usd)
        if price is None:
            return None
        total += price * count
    return total
