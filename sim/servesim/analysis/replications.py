"""Independent replications of a scenario: one number each for every figure, and intervals from them.

Each has a seed of its own, so every random number differs; replication i of two scenarios has the same seed,
hence the same requests, and their differences are paired. A trace draws nothing: replications of one with its
own times are other traffic of its kind (workload.resampled), of one with lengths alone other lengths from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from servesim.analysis.intervals import Interval, needed_samples, paired_interval, t_interval
from servesim.analysis.metrics import summarise
from servesim.analysis.quantities import QUANTITIES, Quantity, value_of
from servesim.analysis.run import Run
from servesim.analysis.simulation import Prepared, prepare, run_prepared
from servesim.analysis.steady import has_steady_state, steady_summary
from servesim.analysis.summary import Summary
from servesim.analysis.warmup import Load, arrival_span_s, cuts_of, load_of, mean_load
from servesim.config.load import LoadedScenario
from servesim.config.workload import TimedTrace
from servesim.workload.resampled import ResampledWorkload

__all__ = [
    "Estimate",
    "PairedEstimate",
    "Replications",
    "differences",
    "is_resampled",
    "replicate",
    "replicate_pair",
    "replicate_runs",
    "resampled",
    "run_replication",
    "with_seed",
]

Floats = NDArray[np.float64]
_OF_THE_WINDOW = ("completed", "duration")  # how much is left of a run after both cuts: no figure to compare
Map = Callable[[Callable[[LoadedScenario], Run], Sequence[LoadedScenario]], Iterable[Run]]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure over the replications: its interval, or the reason why there is none."""

    quantity: Quantity
    interval: Interval | None
    refused: str = ""


@dataclass(frozen=True, slots=True)
class PairedEstimate:
    """A figure of two scenarios and the interval of the difference b - a over pairs of replications."""

    quantity: Quantity
    a: Interval | None
    b: Interval | None
    difference: Interval | None
    refused: str = ""

    @property
    def is_told_apart(self) -> bool:
        """The difference is surely not zero."""
        return self.difference is not None and not self.difference.is_zero_inside


@dataclass(frozen=True, slots=True)
class Replications:
    """The figures of every replication, without warm-up."""

    scenario: LoadedScenario
    seeds: tuple[int, ...]
    summaries: tuple[Summary, ...]
    resampled: bool
    """The workload is a trace drawn again in blocks, not replayed."""
    warm_up_s: float | None
    """Left out at the begin on average; None: no steady state was found, figures are of whole runs."""
    load: Load | None
    """The queue and the KV use over time, mean over the replications; None when all requests come at once."""

    @property
    def steady(self) -> bool:
        """A warm-up was found and left out, or there is none by the kind of the workload."""
        return self.warm_up_s is not None

    @property
    def varies(self) -> bool:
        """The replications differ: something is drawn at random."""
        every = (self.values(one) for one in QUANTITIES.values())
        return not all(np.array_equal(values, np.roll(values, 1), equal_nan=True) for values in every)

    def values(self, quantity: Quantity) -> Floats:
        """A figure's value in each replication."""
        return np.array([value_of(quantity, summary) for summary in self.summaries])

    def estimate(self, key: str) -> Estimate:
        """A figure with its interval; refused where a replication has too few samples for it."""
        quantity = QUANTITIES[key]
        refused = self.refusal(quantity)
        if refused:
            return Estimate(quantity, None, refused)
        return Estimate(quantity, t_interval(self.values(quantity)))

    def estimates(self) -> list[Estimate]:
        """Every figure that the replications have."""
        return [self.estimate(key) for key, one in QUANTITIES.items() if not np.isnan(self.values(one)).all()]

    def refusal(self, quantity: Quantity) -> str:
        """Why the figure cannot be given; empty when it can."""
        if np.isnan(self.values(quantity)).any():
            return "not in every replication"
        if quantity.quantile is None or quantity.samples is None:
            return ""
        fewest, needed = min(map(quantity.samples, self.summaries)), needed_samples(quantity.quantile)
        return "" if fewest >= needed else f"{fewest:,} samples, needs {needed:,}"


def is_resampled(loaded: LoadedScenario) -> bool:
    """Whether the replications of a scenario are drawn from its trace."""
    return isinstance(loaded.scenario.workload.trace, TimedTrace)


def with_seed(loaded: LoadedScenario, seed: int) -> LoadedScenario:
    """The scenario under another seed; the rows of a trace of lengths are drawn again by it."""
    return replace(loaded, scenario=loaded.scenario.model_copy(update={"seed": seed}), redraws=True)


def run_replication(loaded: LoadedScenario) -> Run:
    """One replication, under the scenario's seed."""
    return run_prepared(resampled(loaded, prepare(loaded)))


def resampled(loaded: LoadedScenario, prepared: Prepared) -> Prepared:
    """The prepared scenario with requests drawn from its trace, where it has one with times."""
    if not is_resampled(loaded):
        return prepared
    return replace(prepared, workload=ResampledWorkload(prepared.workload, loaded.scenario.seed))


def one_after_another(
    run: Callable[[LoadedScenario], Run], scenarios: Sequence[LoadedScenario]
) -> Iterable[Run]:
    """The plain map."""
    return map(run, scenarios)


def replicate(loaded: LoadedScenario, count: int, each: Map = one_after_another) -> Replications:
    """``count`` replications under the seeds from the scenario's on; ``each`` maps a function over them."""
    return replicate_runs(loaded, count, lambda scenarios: list(each(run_replication, scenarios)))[0]


def replicate_runs(
    loaded: LoadedScenario, count: int, runs: Callable[[Sequence[LoadedScenario]], Sequence[Run]]
) -> tuple[Replications, list[float] | None]:
    """The same, with the share that was left out of each as warm-up; ``runs`` simulates the scenarios."""
    found = runs(_seeded(loaded, count))
    cuts = _cuts(found)
    return _replications(loaded, found, cuts), cuts


def replicate_pair(
    a: LoadedScenario, b: LoadedScenario, count: int, each: Map = one_after_another
) -> tuple[Replications, Replications]:
    """Replications of two scenarios under the same seeds, with the same shares left out as warm-up."""
    b = with_seed(b, a.scenario.seed)
    runs = list(each(run_replication, [*_seeded(a, count), *_seeded(b, count)]))
    halves = runs[:count], runs[count:]
    cuts = [_cuts(half) for half in halves]
    common = None if None in cuts else [max(pair) for pair in zip(*(one or () for one in cuts), strict=True)]
    return _replications(a, halves[0], common), _replications(b, halves[1], common)


def _seeded(loaded: LoadedScenario, count: int) -> list[LoadedScenario]:
    return [with_seed(loaded, loaded.scenario.seed + number) for number in range(count)]


def _cuts(runs: Sequence[Run]) -> list[float] | None:
    """Share of the arrivals' time to leave out of each run; None when they never settle."""
    if not all(map(has_steady_state, runs)):
        return [0.0] * len(runs)
    return cuts_of([load_of(run) for run in runs])


def _replications(loaded: LoadedScenario, runs: Sequence[Run], cuts: list[float] | None) -> Replications:
    if cuts is None or not all(map(has_steady_state, runs)):
        summaries = [summarise(run) for run in runs]
    else:
        summaries = [steady_summary(run, cut) for run, cut in zip(runs, cuts, strict=True)]
    spans_s = [last_s - first_s for first_s, last_s in map(arrival_span_s, runs)]
    return Replications(
        loaded,
        tuple(run.scenario.seed for run in runs),
        tuple(summaries),
        is_resampled(loaded),
        None if cuts is None else float(np.mean(np.multiply(cuts, spans_s))),
        mean_load([load_of(run) for run in runs]),
    )


def differences(a: Replications, b: Replications, comparisons: int = 1) -> list[PairedEstimate]:
    """Every figure of two scenarios whose replications share their seeds, pair by pair.

    With several ``comparisons`` of this kind in one table all of them hold at once (Bonferroni).
    """
    found = (
        (one.quantity, one, b.estimate(one.quantity.key))
        for one in a.estimates()
        if one.quantity.key not in _OF_THE_WINDOW
    )
    return [_paired(a, b, *each, comparisons) for each in found]


def _paired(
    a: Replications, b: Replications, quantity: Quantity, of_a: Estimate, of_b: Estimate, comparisons: int
) -> PairedEstimate:
    difference = None
    if of_a.interval and of_b.interval:
        difference = paired_interval(a.values(quantity), b.values(quantity), comparisons)
    return PairedEstimate(quantity, of_a.interval, of_b.interval, difference, of_a.refused or of_b.refused)
