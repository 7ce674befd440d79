"""How much traffic a scenario takes: its SLO breaks between a rate that keeps it and one that misses it.

The same requests come faster and faster, as in a plan's trials; a guess without simulation says where to
begin. Both ends are sure of the mean over such traffic, not of every hour of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from servesim.analysis.bisection import Verdict, turning_rate
from servesim.analysis.capacity import Bracket, at_load, capacity_bracket, refuse_limitless, refuse_pools
from servesim.analysis.plan_bounds import Analytic
from servesim.analysis.plan_constraint import first_constraint
from servesim.analysis.plan_fleet import LOOKS
from servesim.analysis.plan_guess import Fluid
from servesim.analysis.plan_setup import traffic_in
from servesim.analysis.plan_trials import Trial, TrialTask, simulated_replicas
from servesim.config.load import LoadedScenario
from servesim.errors import Problem, StudyError

__all__ = ["CapacityStudy", "study_capacity"]

_WIDTH = 0.08
_STEP = 1.3  # by which the guess is left: it is within some ten percent as a rule


class CapacityStudy(NamedTuple):
    """Rates tried, and what broke first."""

    scenario: LoadedScenario
    analytic: Analytic
    rate_per_s: float
    """Of the scenario as it is."""
    bracket: Bracket
    """Of multiples of that rate."""
    trials: dict[float, tuple[Trial, ...]]
    """By multiple."""
    constraint: str
    """What breaks first at the rate that misses; empty when none does."""


def study_capacity(
    loaded: LoadedScenario, run: Callable[[Sequence[TrialTask]], Sequence[Trial]]
) -> CapacityStudy:
    """Bracket the rate; ``run`` simulates trials side by side and keeps their order.

    Raises StudyError for a scenario without SLO, a burst, a closed loop, and too few requests for a P99.
    """
    refuse_limitless(loaded, "a capacity")
    refuse_pools(loaded, "a capacity")
    at_load(loaded, 1.0)
    hardware, first = loaded.scenario.hardware, loaded.scenario.seed
    traffic = traffic_in(loaded)
    analytic = Analytic(loaded, traffic, loaded.scenario.slo)
    if why := analytic.alone():
        step = "raise that limit, or take a faster GPU or more of them per replica"
        raise StudyError(Problem("the SLO is missed at any rate", path="slo", got=why, next_step=step))
    simulated = simulated_replicas(hardware.replicas, traffic.num_requests, hardware.router)
    trials: dict[float, tuple[Trial, ...]] = {}

    def attained(factor: float, numbers: Sequence[int]) -> Sequence[Trial]:
        found = run([
            TrialTask(loaded, factor, hardware.replicas, simulated, hardware.router, first + number)
            for number in numbers
        ])  # fmt: skip
        trials[factor] = (*trials.get(factor, ()), *found)
        return found

    start = _guess(analytic, hardware.replicas)
    bracket = capacity_bracket(attained, 1.0, start, replications=LOOKS, width=_WIDTH, step=_STEP)
    constraint = ""
    if math.isfinite(bracket.high):
        breach = max(trials[bracket.high], key=lambda trial: trial.attained)
        constraint = first_constraint(analytic, breach)
    return CapacityStudy(loaded, analytic, traffic.rate_per_s, bracket, trials, constraint)


def _guess(analytic: Analytic, replicas: int) -> float:
    """A multiple of the load at which the SLO may break, without simulation."""
    fluid, own_per_s = Fluid.of(analytic), analytic.traffic.rate_per_s

    def verdict(factor: float) -> Verdict:
        return "kept" if fluid.attained(replicas, own_per_s * factor) <= 1 else "missed"

    low, high = turning_rate(verdict, 1.0, _WIDTH)
    return math.sqrt(low * high) if low and math.isfinite(high) else 1.0
