"""Why a percentile is what it is, and what would change it: parts of the tail, a cause, remedies tried.

Every run serves the same requests with the same random numbers, so that differences are due to what was
changed. The cause is where the tail's time goes; where relaxing that resource does not help, the one whose
relaxation helps most.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from servesim.analysis.attribution import PARTS, Attribution
from servesim.analysis.distribution import distribution
from servesim.analysis.metrics import request_times
from servesim.analysis.relaxations import gap_variation, relaxations_of
from servesim.analysis.remedies import Remedy, applied, remedies_of
from servesim.analysis.replications import run_replication, with_seed
from servesim.analysis.run import Run
from servesim.analysis.simulation import prepare, run_prepared
from servesim.analysis.watched_run import watched_run
from servesim.config.load import LoadedScenario
from servesim.errors import Problem, ServesimError, StudyError

__all__ = [
    "CAUSES", "HELPS", "Explanation", "Figures", "Trial", "TrialTask", "explain_scenario", "run_trial",
]  # fmt: skip

Floats = NDArray[np.float64]

CAUSES = (
    "kv", "slots", "interference", "host", "bandwidth", "link", "cold_cache", "bursty", "oversize", "compute",
    "batch",
)  # fmt: skip
"""What can be the matter; report/explain.py has the words."""

_CAUSE_OF_PART = {
    "slot": "slots",
    "kv_blocks": "kv",
    "preemption": "kv",
    "transfer": "kv",
    "host": "host",
    "communication": "link",
    "weights": "bandwidth",
    "kv_reads": "bandwidth",
    "compute": "compute",
    "interference": "interference",
    "batch": "batch",
    "joining": "prompts",
    "tokens": "prompts",
    "prefill": "prompts",
}
_PROMPT_CAUSES = ("cold_cache", "oversize", "compute", "bandwidth", "link", "host")  # of long steps
_TELLS = 0.1  # share of the figure that relaxing a cause must save
_BURSTY = 1.5  # coefficient of variation of the gaps; 1 is Poisson
_TAIL_IS_DIFFERENT = 1.5  # the tail's mean over the typical request's
_CANDIDATES = 3  # settings, and purchases, that are tried on other requests
HELPS = 0.05
"""Share of the figure that a remedy must save to be recommended."""


class Figures(NamedTuple):
    """99th percentiles over the completed requests, and how many they are."""

    ttft: float
    tpot: float
    e2e: float
    completed: int


@dataclass(frozen=True, slots=True)
class TrialTask:
    """One simulation: a relaxation by its key, a remedy, or neither.

    ``fresh``: of other requests of the same kind, drawn under the scenario's seed.
    """

    loaded: LoadedScenario
    relaxation: str | None = None
    remedy: Remedy | None = None
    fresh: bool = False


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

    def change(self, metric: str, base: Figures) -> float:
        """Share by which the figure moves; NaN when it could not be tried."""
        if self.figures is None:
            return float("nan")
        before: float = getattr(base, metric)
        after: float = getattr(self.figures, metric)
        return after / before - 1


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
        parts = self.attribution.parts_of(self.metric)
        if rows is None:
            rows = np.flatnonzero(np.isfinite(self.attribution.metric_s(self.metric)))
        return dict(zip(PARTS, parts[rows].mean(axis=0).tolist(), strict=True))

    @property
    def ranked(self) -> list[Trial]:
        """The remedies that serve every request, best first."""
        tried = [one for one in self.remedies if one.figures is not None]
        served = [one for one in tried if one.figures and one.figures.completed >= self.figures.completed]
        return sorted(served, key=lambda one: one.change(self.metric, self.figures))

    @property
    def candidates(self) -> list[Trial]:
        """The few settings and purchases that help most, less what they cost."""
        helping = [one for one in self.ranked if one.change(self.metric, self.figures) < -HELPS]
        helping.sort(key=self._balance)
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

    def _balance(self, one: Trial) -> float:
        """Logarithms: what the figure becomes, and the worst rise of a percentile."""
        changes = [one.change(metric, self.figures) for metric in ("ttft", "tpot", "e2e")]
        worst = max((math.log1p(change) for change in changes if math.isfinite(change)), default=0.0)
        return math.log1p(one.change(self.metric, self.figures)) + max(worst, 0.0)


def run_trial(task: TrialTask) -> Trial:
    """Simulate one change."""
    try:
        if task.remedy is not None:
            figures = _figures(_simulated(applied(task.loaded, task.remedy), task.fresh))
            text = task.remedy.text
            return Trial(text, text, "", task.remedy.kind, figures)
        if task.relaxation is None:
            return Trial("base", "as it is", "", "base", _figures(_simulated(task.loaded, task.fresh)))
        prepared = prepare(task.loaded)
        [one] = [one for one in relaxations_of(prepared) if one.key == task.relaxation]
        law = one.law
        if law is None:
            run = run_prepared(one.relax(prepared))
        else:
            run = run_prepared(one.relax(prepared), watch=lambda scheduler, step_time: law(step_time))
        return Trial(one.key, one.label, one.cause, "relaxation", _figures(run))
    except ServesimError as error:
        text = task.remedy.text if task.remedy is not None else str(task.relaxation)
        problems = getattr(error, "problems", ())
        why = problems[0].problem if problems else str(error)
        return Trial(text, text, "", "refused", None, why)


def _simulated(loaded: LoadedScenario, fresh: bool) -> Run:
    return run_replication(loaded) if fresh else run_prepared(prepare(loaded))


def explain_scenario(
    loaded: LoadedScenario, metric: str, trials: Callable[[Sequence[TrialTask]], Sequence[Trial]]
) -> Explanation:
    """Explain the 99th percentile of ``metric``; ``trials`` runs run_trial on tasks, in their order."""
    prepared = prepare(loaded)
    run, attributed = watched_run(prepared)
    of = attributed()
    values = of.metric_s(metric)
    known = np.flatnonzero(np.isfinite(values))
    if not len(known):
        step = "let requests complete; TPOT needs outputs of two tokens or more"
        raise StudyError(Problem(f"no completed request has a {metric.upper()}", next_step=step))
    low, high, tail = np.quantile(values[known], (0.25, 0.75, 0.99))
    relaxed = [one for one in relaxations_of(prepared) if metric in one.metrics]
    tasks = [TrialTask(loaded, relaxation=one.key) for one in relaxed]
    tasks += [TrialTask(loaded, remedy=one) for one in remedies_of(prepared)]
    found = list(trials(tasks))
    of_resources, of_remedies = tuple(found[: len(relaxed)]), tuple(found[len(relaxed) :])
    figures, variation = _figures(run), gap_variation(prepared)
    tail_rows = known[values[known] >= tail]
    typical = known[(values[known] >= low) & (values[known] <= high)]
    parts = of.parts_of(metric)
    of_part = dict(_CAUSE_OF_PART)
    if metric == "ttft":
        of_part["interference"] = "prompts"
    if run.scenario.engine.batching == "static":
        of_part["slot"] = "batch"  # a running batch that nobody may join
    saved = {one.cause: -one.change(metric, figures) for one in of_resources if one.figures is not None}
    cause = _cause(of_part, parts[tail_rows].mean(axis=0), parts[typical].mean(axis=0), saved, variation)
    found_so_far = Explanation(
        loaded, metric, of, tail_rows, typical, figures, variation, of_resources, of_remedies, cause, {}
    )
    return replace(found_so_far, checked=_check(found_so_far, remedies_of(prepared), trials))


def _check(
    found: Explanation, remedies: Sequence[Remedy], trials: Callable[[Sequence[TrialTask]], Sequence[Trial]]
) -> dict[str, float]:
    """Try the candidates on other requests, too."""
    wanted = [one.key for one in found.candidates]
    if not wanted:
        return {}
    loaded = with_seed(found.loaded, found.loaded.scenario.seed + 1)
    by_text = {one.text: one for one in remedies}
    tasks = [TrialTask(loaded, remedy=by_text[key], fresh=True) for key in wanted]
    base, *others = trials([TrialTask(loaded, fresh=True), *tasks])
    if base.figures is None or base.figures == found.figures:
        return {}  # nothing is drawn at random: there are no other requests
    return {one.key: one.change(found.metric, base.figures) for one in others}


def _cause(
    of_part: Mapping[str, str], tail: Floats, typical: Floats, saved: Mapping[str, float], variation: float
) -> str:
    """Where the tail's time goes, if relaxing that helps; ``saved``: the share that it saves, by cause."""
    excess = np.maximum(tail - typical, 0.0) if tail.sum() > _TAIL_IS_DIFFERENT * typical.sum() else tail
    weights: dict[str, float] = {}
    for name, seconds in zip(PARTS, excess.tolist(), strict=True):
        cause = of_part[name]
        weights[cause] = weights.get(cause, 0.0) + seconds
    ordered = sorted(weights, key=lambda cause: -weights[cause])
    if variation > _BURSTY and saved.get("bursty", 0.0) >= 0.5 and ordered[0] in ("prompts", "kv", "slots"):
        return "bursty"
    for cause in ordered:
        if weights[cause] < _TELLS * excess.sum():
            break
        if cause == "batch":
            return cause
        if cause == "prompts":
            return max(_PROMPT_CAUSES, key=lambda one: saved.get(one, 0.0))
        if cause == "interference" and saved.get("oversize", 0.0) >= 0.5 * saved.get(cause, 0.0) > 0:
            return "oversize"
        if saved.get(cause, 0.0) >= _TELLS:
            return cause
    return max(saved, key=lambda cause: saved[cause]) if saved else "compute"


def _figures(run: Run) -> Figures:
    times = request_times(run.log)
    done = times.completed
    tpot_s = times.tpot_s[done]
    return Figures(
        distribution(times.ttft_s[done]).p99_s,
        distribution(tpot_s[np.isfinite(tpot_s)]).p99_s,
        distribution(times.e2e_s[done]).p99_s,
        int(done.sum()),
    )
