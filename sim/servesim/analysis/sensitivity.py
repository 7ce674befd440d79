"""What a result depends on: every input moved a little, and three sources of uncertainty kept apart.

The same replications serve the scenario and all its moved variants, so effects are paired. Seeds, the
workload and the model are three different doubts: a longer run helps against the first, a longer trace
against the second, a calibration against the third.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from servesim.analysis.inputs import Input, inputs_of
from servesim.analysis.intervals import Interval, share_interval, t_interval
from servesim.analysis.metrics import summarise
from servesim.analysis.model_error import ModelError, joint_errors, model_error
from servesim.analysis.quantities import QUANTITIES, value_of
from servesim.analysis.replications import Replications, replicate_runs, resampled, with_seed
from servesim.analysis.run import Run
from servesim.analysis.simulation import run_prepared
from servesim.analysis.steady import has_steady_state, steady_summary
from servesim.analysis.summary import Summary
from servesim.analysis.validate import regime_of
from servesim.config.load import LoadedScenario
from servesim.config.profiles import load_gpu

__all__ = ["Effect", "Odds", "Sensitivity", "Task", "run_task", "sensitivity_of"]

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Task:
    """One replication with one input moved."""

    loaded: LoadedScenario
    key: str
    factor: float
    hits: bool
    cut: float | None


@dataclass(frozen=True, slots=True)
class Effect:
    """What moving one input does to one figure, in shares of the figure; None where it cannot be told."""

    input: Input
    down: Interval | None
    up: Interval | None
    elasticity: Interval | None
    """d ln(figure) / d ln(input)."""

    @property
    def swing(self) -> float:
        """The larger of the two changes."""
        return max((abs(one.value) for one in (self.down, self.up) if one is not None), default=0.0)


@dataclass(frozen=True, slots=True)
class Odds:
    """The probability that limits of the SLO are kept, all at once, by what is doubted."""

    limits_s: dict[str, float]
    """By metric."""
    chance: Interval
    """Over the replications: fresh seeds, or other traffic of the trace's kind."""
    model: Interval | None
    """Over the recorded errors of the model, at the mean of the replications."""
    both: float
    """Over all pairs of the two; NaN without recorded errors."""


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """The base replications, every variant's figures, and what they say."""

    base: Replications
    load: str
    """Of the base, as the accuracy page names it."""
    change: float
    inputs: tuple[Input, ...]
    figures: dict[tuple[str, float], tuple[Summary, ...]]
    """By input and factor, the variants' replications."""

    def effects(self, key: str) -> list[Effect]:
        """The effects on a figure, the largest first."""
        one = QUANTITIES[key]
        base = self.base.values(one)
        found = []
        for moved in self.inputs:
            values = {
                factor: np.array([value_of(one, summary) for summary in self.figures[moved.key, factor]])
                for factor in self._factors(moved)
            }
            found.append(self._effect(moved, base, values))
        return sorted(found, key=lambda effect: -effect.swing)

    def model_error(self, key: str) -> ModelError | None:
        """The recorded errors of a figure at this load."""
        return model_error(key, self.load, **self._recorded_with)

    def odds(self) -> list[Odds]:
        """The limits of the SLO one by one, then, if there are several, all of them at once."""
        numbers = range(len(self.base.summaries[0].slo))
        each = [self._odds([number]) for number in numbers]
        return [*each, self._odds(numbers)] if len(each) > 1 else each

    @property
    def _recorded_with(self) -> dict[str, bool]:
        """Which recorded errors are those of this deployment."""
        loaded = self.base.scenario
        gpu = load_gpu(loaded.find("gpus", loaded.scenario.hardware.gpu))
        return {
            "calibrated": loaded.scenario.engine.profile is not None,
            "on_cpu": gpu.architecture == "cpu",
        }

    def _factors(self, moved: Input) -> tuple[float, ...]:
        return (1 - self.change,) if moved.down_only else (1 - self.change, 1 + self.change)

    def _effect(self, moved: Input, base: Floats, values: dict[float, Floats]) -> Effect:
        changes = {factor: _interval(of / base - 1) for factor, of in values.items() if (base != 0).all()}
        factors = sorted(values)
        first, last = factors[0], factors[-1] if len(factors) > 1 else 1.0
        ends = values[first], values[last] if len(factors) > 1 else base
        elasticity = None
        if all((end > 0).all() for end in ends):
            elasticity = _interval(np.log(ends[1] / ends[0]) / math.log(last / first))
        return Effect(moved, changes.get(1 - self.change), changes.get(1 + self.change), elasticity)

    def _odds(self, numbers: Sequence[int]) -> Odds:
        checks = [[summary.slo[number] for number in numbers] for summary in self.base.summaries]
        limits_s = {check.metric: check.limit_s for check in checks[0]}
        limit_s = np.array(list(limits_s.values()))
        attained_s = np.array([[check.p99_s for check in each] for each in checks])
        kept = (attained_s <= limit_s).all(axis=1)
        chance = share_interval(float(kept.sum()), len(checks))
        keys = [f"p99_{metric}_ms" for metric in limits_s]
        errors = joint_errors(keys, self.load, **self._recorded_with)
        if errors is None:
            return Odds(limits_s, chance, None, math.nan)
        # Latencies of one recorded run go together, and so do those of one replication.
        real = np.exp(-errors.errors)
        at_mean = (attained_s.mean(axis=0) * real <= limit_s).all(axis=1)
        pairs = (attained_s[:, None] * real[None] <= limit_s).all(axis=2)
        model = share_interval(float(at_mean.sum()), len(real))
        return Odds(limits_s, chance, model, float(pairs.mean()))


def sensitivity_of(
    loaded: LoadedScenario,
    count: int,
    change: float,
    runs: Callable[[Sequence[LoadedScenario]], Sequence[Run]],
    summaries: Callable[[Sequence[Task]], Sequence[Summary]],
) -> Sensitivity:
    """``count`` replications of the scenario, and of each input lowered and raised by ``change``.

    ``runs`` simulates scenarios, ``summaries`` tasks by ``run_task``; both may do so side by side.
    """
    base, cuts = replicate_runs(loaded, count, runs)
    hits = any(summary.load.prefix_cache_hits for summary in base.summaries)
    inputs = tuple(inputs_of(loaded, hits))
    factors = {one.key: (1 - change,) if one.down_only else (1 - change, 1 + change) for one in inputs}
    tasks = [
        Task(with_seed(loaded, seed), one.key, factor, hits, None if cuts is None else cuts[number])
        for one in inputs
        for factor in factors[one.key]
        for number, seed in enumerate(base.seeds)
    ]
    found = list(summaries(tasks))
    figures = {
        (task.key, task.factor): tuple(found[first : first + count])
        for first, task in list(enumerate(tasks))[::count]
    }
    return Sensitivity(base, regime_of(base.summaries[0]), change, inputs, figures)


def run_task(task: Task) -> Summary:
    """The figures of one replication with one input moved."""
    [moved] = [one for one in inputs_of(task.loaded, task.hits) if one.key == task.key]
    run = run_prepared(resampled(task.loaded, moved.move(task.loaded, task.factor)))
    return summarise(run) if task.cut is None or not has_steady_state(run) else steady_summary(run, task.cut)


def _interval(values: Floats) -> Interval | None:
    return t_interval(values) if np.isfinite(values).all() else None
