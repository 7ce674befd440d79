"""How much load keeps a limit: a bracket around the capacity, found by bisection on common random numbers.

Every rate serves the same requests on another clock, so that what is attained rises with the rate in each
replication. A rate is decided by its interval: surely kept, surely missed, or undecided for all replications
that may be spent; so the answer is a bracket, and it is as wide as the noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from servesim.analysis.caveats import Caveat
from servesim.analysis.intervals import LEVEL, Interval, needed_samples, t_interval
from servesim.analysis.metrics import summarise
from servesim.analysis.replications import run_replication, with_seed
from servesim.analysis.steady import steady_summary
from servesim.analysis.summary import Summary
from servesim.config.load import LoadedScenario
from servesim.config.workload import ClosedLoopArrivals, TimedTrace
from servesim.errors import Problem, StudyError

__all__ = ["Bracket", "Decision", "Trial", "at_load", "capacity_bracket", "slo_trials"]

Verdict = Literal["kept", "missed", "undecided"]
_WARM_UP = 0.1  # share left out of each replication, whose number varies during the search
_MOST_DOUBLINGS = 12


class Trial(NamedTuple):
    """What one replication attained at one rate."""

    attained: float
    is_stable: bool = True
    """The queue does not grow to the end: otherwise a longer run would attain more."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What was found at one rate."""

    rate: float
    interval: Interval
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Bracket:
    """The capacity lies in [low, high]: ``low`` surely keeps the limit, ``high`` surely misses it."""

    low: float
    high: float
    decisions: tuple[Decision, ...]
    """In the order in which they were made."""

    @property
    def width(self) -> float:
        """Of the bracket, over its lower end."""
        return self.high / self.low - 1 if self.low else math.inf


def capacity_bracket(
    attained: Callable[[float, Sequence[int]], Sequence[Trial]],
    limit: float,
    start: float,
    *,
    replications: Sequence[int] = (10, 20, 40),
    width: float = 0.02,
) -> Bracket:
    """The bracket of the rate up to which ``attained`` stays within ``limit`` on average.

    ``attained(rate, numbers)`` simulates replications by number; ``start`` is any rate to begin from.
    ``replications``: how many are tried before looking again; all looks hold at once with 95 % (Bonferroni).
    Ends at a bracket of ``width``, or where neither side can be decided closer.
    """
    search = _Search(attained, limit, tuple(replications))
    low, high = search.ends(start)
    while high > low * (1 + width):
        middle = math.sqrt(low * high)
        verdict = search.verdict(middle)
        if verdict == "undecided":
            # From here on each side is narrowed alone, against the nearest rate that cannot be decided.
            low = search.nearest("kept", low, middle, width / 2)
            high = search.nearest("missed", high, middle, width / 2)
            break
        low, high = (middle, high) if verdict == "kept" else (low, middle)
    return Bracket(low, high, tuple(search.decisions))


class _Search:
    def __init__(
        self,
        attained: Callable[[float, Sequence[int]], Sequence[Trial]],
        limit: float,
        looks: tuple[int, ...],
    ) -> None:
        self._attained, self._limit, self._looks = attained, limit, looks
        self._level = 1 - (1 - LEVEL) / len(looks)
        self.decisions: list[Decision] = []

    def verdict(self, rate: float) -> Verdict:
        trials: list[Trial] = []
        verdict: Verdict = "undecided"
        for look in self._looks:
            trials += self._attained(rate, range(len(trials), look))
            interval = t_interval([trial.attained for trial in trials], self._level)
            unstable = sum(not trial.is_stable for trial in trials)
            if 2 * unstable > len(trials) or interval.low > self._limit:
                verdict = "missed"
            elif interval.high <= self._limit and not unstable:
                verdict = "kept"
            if verdict != "undecided":
                break
        self.decisions.append(Decision(rate, interval, verdict))
        return verdict

    def ends(self, start: float) -> tuple[float, float]:
        """A rate that is surely kept and one that is surely missed, by doubling and halving."""
        found: dict[Verdict, float] = {}
        for factor, wanted in ((2.0, "missed"), (0.5, "kept")):
            rate = start
            for _ in range(_MOST_DOUBLINGS):
                verdict = self.verdict(rate)
                if verdict == "kept":
                    found["kept"] = max(rate, found.get("kept", 0.0))
                if verdict == "missed":
                    found["missed"] = min(rate, found.get("missed", math.inf))
                if verdict == wanted or wanted in found:
                    break
                rate *= factor
        return found.get("kept", 0.0), found.get("missed", math.inf)

    def nearest(self, wanted: Verdict, decided: float, undecided: float, width: float) -> float:
        """The rate nearest to ``undecided`` that gets the verdict ``wanted``, as ``decided`` does."""
        while abs(math.log(undecided / decided)) > math.log1p(width):
            middle = math.sqrt(decided * undecided)
            if self.verdict(middle) == wanted:
                decided = middle
            else:
                undecided = middle
        return decided


def at_load(loaded: LoadedScenario, factor: float) -> LoadedScenario:
    """The scenario under ``factor`` times its load: the same requests on a faster clock.

    Raises StudyError for a burst and for a closed loop, whose users wait instead of overloading it.
    """
    workload = loaded.scenario.workload
    if isinstance(workload.trace, TimedTrace):
        trace = workload.trace.model_copy(update={"rate_scale": workload.trace.rate_scale * factor})
        return loaded.with_workload(workload.model_copy(update={"trace": trace}))
    arrivals = workload.arrivals
    rate_per_s = getattr(arrivals, "rate_per_s", None)
    if arrivals is None or rate_per_s is None:
        closed = isinstance(arrivals, ClosedLoopArrivals)
        problem = "a closed loop cannot be overloaded" if closed else "a burst has no rate"
        step = "describe the arrivals by a rate (poisson, gamma, constant) or a trace with times"
        raise StudyError(Problem(problem, path="workload.arrivals", next_step=step))
    faster = arrivals.model_copy(update={"rate_per_s": rate_per_s * factor})
    return loaded.with_workload(workload.model_copy(update={"arrivals": faster}))


def slo_trials(loaded: LoadedScenario) -> Callable[[float, Sequence[int]], list[Trial]]:
    """For ``capacity_bracket`` with limit 1: the worst P99 over its SLO at multiples of its load."""
    if loaded.scenario.slo == type(loaded.scenario.slo)():
        step = "give slo.ttft_p99_s, slo.tpot_p99_s or slo.e2e_p99_s"
        raise StudyError(Problem("a capacity needs a limit", path="slo", next_step=step))

    def trial(factor: float, number: int) -> Trial:
        run = run_replication(with_seed(at_load(loaded, factor), loaded.scenario.seed + number))
        whole = summarise(run)
        if any(warned.caveat is Caveat.OVERLOAD for warned in whole.warnings):
            return Trial(_worst(whole), is_stable=False)
        summary = steady_summary(run, _WARM_UP)
        needed = needed_samples(0.99)
        if summary.completed < needed:
            problem = Problem(
                "too few requests to judge a P99",
                got=f"{summary.completed:,} after the warm-up",
                next_step=f"let {needed:,} be left: raise num_requests, or take more of the trace",
            )
            raise StudyError(problem)
        return Trial(_worst(summary))

    return lambda factor, numbers: [trial(factor, number) for number in numbers]


def _worst(summary: Summary) -> float:
    return max(check.p99_s / check.limit_s for check in summary.slo)
