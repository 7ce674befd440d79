"""How much load keeps a limit: a bracket around the capacity, found by bisection on common random numbers.

Every rate serves the same requests on another clock, so that what is attained rises with the rate in each
replication. A rate is decided by its interval: surely kept, surely missed, or undecided for all replications
that may be spent; so the answer is a bracket, and it is as wide as the noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from servesim.analysis.bisection import Verdict, turning_rate
from servesim.analysis.intervals import LEVEL, Interval, t_interval
from servesim.config.load import LoadedScenario
from servesim.config.workload import ClosedLoopArrivals, TimedTrace
from servesim.errors import Problem, StudyError

__all__ = [
    "Attained",
    "Bracket",
    "Decision",
    "at_load",
    "capacity_bracket",
    "refuse_limitless",
    "refuse_pools",
]


class Attained(Protocol):
    """What one replication attained at one rate."""

    @property
    def attained(self) -> float:
        """To be compared with the limit."""
        ...

    @property
    def is_stable(self) -> bool:
        """The queue does not grow to the end: otherwise a longer run would attain more."""
        ...


class Decision(NamedTuple):
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
    attained: Callable[[float, Sequence[int]], Sequence[Attained]],
    limit: float,
    start: float,
    *,
    replications: Sequence[int] = (10, 20, 40),
    width: float = 0.02,
    step: float = 2.0,
) -> Bracket:
    """The bracket of the rate up to which ``attained`` stays within ``limit`` on average.

    ``attained(rate, numbers)`` simulates replications by number; ``start`` is any rate to begin from, and
    ``step`` the factor by which to leave it. ``replications``: how many are tried before looking again; all
    looks hold at once with 95 % (Bonferroni). Ends at a bracket of ``width``, or where neither side can be
    decided closer.
    """
    level = 1 - (1 - LEVEL) / len(replications)
    decisions: list[Decision] = []

    def verdict(rate: float) -> Verdict:
        trials: list[Attained] = []
        found: Verdict = "undecided"
        for look in replications:
            trials += attained(rate, range(len(trials), look))
            interval = t_interval([trial.attained for trial in trials], level)
            unstable = sum(not trial.is_stable for trial in trials)
            if 2 * unstable > len(trials) or interval.low > limit:
                found = "missed"
            elif interval.high <= limit and not unstable:
                found = "kept"
            if found != "undecided":
                break
        decisions.append(Decision(rate, interval, found))
        return found

    low, high = turning_rate(verdict, start, width, step=step)
    return Bracket(low, high, tuple(decisions))


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


def refuse_limitless(loaded: LoadedScenario, what: str) -> None:
    """Raise StudyError for a scenario without SLO, under which ``what`` means nothing."""
    if loaded.scenario.slo == type(loaded.scenario.slo)():
        step = "give --slo ttft_p99_s=0.5, or slo in the scenario"
        raise StudyError(Problem(f"{what} needs a limit to keep", path="slo", next_step=step))


def refuse_pools(loaded: LoadedScenario, what: str) -> None:
    """Raise StudyError for a fleet whose replicas differ, fail or come and go."""
    if loaded.scenario.fleet is not None:
        step = "add --set fleet=null, then try what is found with `servesim run`"
        raise StudyError(
            Problem(f"{what} is of equal replicas that always serve", path="fleet", next_step=step)
        )
