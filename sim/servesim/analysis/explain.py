"""Why a percentile is what it is, and what would change it: parts of the tail, a cause, remedies tried.

Every run serves the same requests with the same random numbers, so that differences are due to what was
changed. The cause is where the tail's time goes; where relaxing that resource does not help, the one whose
relaxation helps most.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from servesim.analysis.attribution import Attribution
from servesim.analysis.comebacks import Outage, outages
from servesim.analysis.explain_cause import cause_of
from servesim.analysis.explain_trials import Figures, Trial, TrialTask, figures_of, usd_per_hour
from servesim.analysis.relaxations import gap_variation, relaxations_of
from servesim.analysis.remedies import Remedy, remedies_of
from servesim.analysis.replications import with_seed
from servesim.analysis.simulation import prepare
from servesim.analysis.tails import ReplicaTail, replica_tails, slow_and_usual
from servesim.analysis.watched_run import watched_run
from servesim.config.load import LoadedScenario
from servesim.errors import Problem, StudyError

__all__ = ["HELPS", "Explanation", "Trials", "explain_scenario"]

Trials = Callable[[Sequence[TrialTask]], Sequence[Trial]]

_CANDIDATES = 3  # settings, and purchases, that are tried on other requests
HELPS = 0.05
"""Share of the figure that a remedy must save to be recommended."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """The answer; ``metric`` is ttft, tpot or e2e."""

    loaded: LoadedScenario
    metric: str
    attribution: Attribution
    tail: NDArray[np.int64]
    """Rows of the attribution: the requests at or above the 99th percentile."""
    typical: NDArray[np.int64]
    """Rows of the half of the requests around the median."""
    figures: Figures
    variation: float
    """Of the gaps between arrivals."""
    replicas: tuple[ReplicaTail, ...]
    """Of a fleet, the slowest first."""
    outages: tuple[Outage, ...]
    usd_per_hour: float | None
    """Price of the GPUs; None where their file gives none."""
    relaxations: tuple[Trial, ...]
    remedies: tuple[Trial, ...]
    cause: str
    checked: Mapping[str, float]
    """By the key of a candidate: the figure's change on other requests of the same kind, if there are any."""

    @property
    def value_s(self) -> float:
        """The 99th percentile that is explained."""
        value: float = getattr(self.figures, self.metric)
        return value

    def means(self, rows: NDArray[np.int64] | None = None) -> dict[str, float]:
        """Seconds by part, mean over some requests (all that have the metric)."""
        return self.attribution.means(self.metric, rows)

    @property
    def ranked(self) -> list[Trial]:
        """The remedies that serve every request, best first."""
        served = [
            one for one in self.remedies if one.figures and one.figures.unserved <= self.figures.unserved
        ]
        return sorted(served, key=lambda one: one.change(self.metric, self.figures))

    @property
    def candidates(self) -> list[Trial]:
        """The few settings and purchases with which an SLO that is missed is kept, the cheapest first, of
        equals what leaves the answers alone; then those that help most for what they cost."""
        helping = [one for one in self.ranked if one.change(self.metric, self.figures) < -HELPS]
        helping.sort(key=self._order)
        by_kind = [[one for one in helping if one.kind == kind] for kind in ("setting", "purchase")]
        return [one for kind in by_kind for one in kind[:_CANDIDATES]]

    @property
    def recommended(self) -> list[Trial]:
        """The first setting, then the first purchase, that help on other requests too."""
        holding = [one for one in self.candidates if self.checked.get(one.key, -1.0) < -HELPS]
        firsts = (
            next((one for one in holding if one.kind == kind), None) for kind in ("setting", "purchase")
        )
        return [one for one in firsts if one is not None]

    def extra_usd_per_hour(self, one: Trial) -> float | None:
        """What a remedy costs more than what is there; None where a price is not known."""
        if one.usd_per_hour is None or self.usd_per_hour is None:
            return None
        return one.usd_per_hour - self.usd_per_hour

    @property
    def limit_s(self) -> float | None:
        """What the SLO allows."""
        limit_s: float | None = getattr(self.loaded.scenario.slo, f"{self.metric}_p99_s")
        return limit_s

    def _order(self, one: Trial) -> tuple[bool, float, bool, float]:
        limit_s = self.limit_s
        mends = limit_s is not None and getattr(one.figures, self.metric) <= limit_s < self.value_s
        if not mends:
            return True, 0.0, False, self._balance(one)
        return False, self.extra_usd_per_hour(one) or 0.0, one.rounds, self._balance(one)

    def _balance(self, one: Trial) -> float:
        """Logarithms: what the figure becomes, the worst rise of a percentile, the rise of the price."""
        changes = [one.change(metric, self.figures) for metric in ("ttft", "tpot", "e2e")]
        worst = max((math.log1p(change) for change in changes if math.isfinite(change)), default=0.0)
        price = one.usd_per_hour / self.usd_per_hour if one.usd_per_hour and self.usd_per_hour else 1.0
        return math.log1p(one.change(self.metric, self.figures)) + max(worst, 0.0) + math.log(price)


def explain_scenario(
    loaded: LoadedScenario, metric: str, trials: Trials, prices: Mapping[str, float] | None = None
) -> Explanation:
    """Explain the 99th percentile of ``metric``; ``trials`` runs run_trial on tasks, in their order.

    ``prices``: dollars per hour by GPU, instead of those in the GPUs' files.
    """
    prepared, prices = prepare(loaded), prices or {}
    run, attributed = watched_run(prepared)
    of, figures = attributed(), figures_of(run)
    tail, typical = slow_and_usual(of, metric)
    if not len(tail):
        step = "let requests complete; TPOT needs outputs of two tokens or more"
        raise StudyError(Problem(f"no completed request has a {metric.upper()}", next_step=step))
    relaxed = [one for one in relaxations_of(prepared) if metric in one.metrics]
    tasks = [TrialTask(loaded, relaxation=one.key) for one in relaxed]
    tasks += [TrialTask(loaded, remedy=one, prices=prices) for one in remedies_of(prepared)]
    tried = tuple(trials(tasks))
    of_resources, of_remedies = tried[: len(relaxed)], tried[len(relaxed) :]
    saved = {one.cause: -one.change(metric, figures) for one in of_resources if one.figures is not None}
    parts, variation = of.parts_of(metric), gap_variation(prepared)
    static = run.scenario.engine.batching == "static"
    apart = run.log.fleet is not None and len(run.log.fleet.transfers) > 0
    found = Explanation(
        loaded=loaded,
        metric=metric,
        attribution=of,
        tail=tail,
        typical=typical,
        figures=figures,
        variation=variation,
        replicas=tuple(replica_tails(of, metric)) if run.scenario.num_replicas > 1 else (),
        outages=tuple(outages(run.log)),
        usd_per_hour=usd_per_hour(run, prices),
        relaxations=of_resources,
        remedies=of_remedies,
        cause=cause_of(
            metric, static, apart, parts[tail].mean(axis=0), parts[typical].mean(axis=0), saved, variation
        ),
        checked={},
    )
    return replace(found, checked=_check(found, remedies_of(prepared), trials))


def _check(found: Explanation, remedies: Sequence[Remedy], trials: Trials) -> dict[str, float]:
    """Try the candidates on other requests, too."""
    wanted = [one.key for one in found.candidates]
    if not wanted:
        return {}
    loaded = with_seed(found.loaded, found.loaded.scenario.seed + 1)
    by_text = {one.text: one for one in remedies}
    tasks = [TrialTask(loaded, remedy=by_text[key], fresh=True) for key in wanted]
    base, *others = trials([TrialTask(loaded, fresh=True), *tasks])
    if base.figures is None or np.array_equal(base.figures, found.figures, equal_nan=True):
        return {}  # nothing is drawn at random: there are no other requests
    return {one.key: one.change(found.metric, base.figures) for one in others}
