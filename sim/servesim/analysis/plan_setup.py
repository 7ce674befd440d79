"""From a scenario and what varies to the question and the configurations of a plan."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from servesim.analysis.capacity import at_load, refuse_limitless, refuse_pools
from servesim.analysis.grid import Axis, grid_points
from servesim.analysis.plan_bounds import Analytic, Traffic, traffic_of
from servesim.analysis.plan_fleet import Candidate, PlanQuestion
from servesim.analysis.plan_trials import recorded
from servesim.analysis.replications import is_resampled
from servesim.config.load import LoadedScenario, load_scenario
from servesim.engine.router import BLIND
from servesim.errors import ConfigError, Problem, StudyError, blamed_on
from servesim.workload.build import build_workload

__all__ = ["candidates_of", "question_of", "traffic_in"]

_VARIES = ("hardware.gpu", "model")
"""What makes a replica, beside the settings of its engine."""


def question_of(
    loaded: LoadedScenario, rate_per_s: float, budget: float | None, prices: Mapping[str, float]
) -> PlanQuestion:
    """The question; raises StudyError for numbers and scenarios that a plan cannot be made of.

    A router that looks at the replicas is replaced by round robin: only then one replica can be simulated
    without all the others.
    """
    scenario = loaded.scenario
    numbers = {"rate_per_s": rate_per_s, **{f"price of {gpu}": usd for gpu, usd in prices.items()}}
    for name, value in numbers.items():
        if not 0 < value < math.inf:
            step = "give a finite number above 0"
            raise StudyError(Problem("cannot be planned with", path=name, got=f"{value:g}", next_step=step))
    refuse_limitless(loaded, "a plan")
    refuse_pools(loaded, "a plan")
    at_load(loaded, 1.0)
    router = scenario.hardware.router if scenario.hardware.router in BLIND else "round-robin"
    return PlanQuestion(rate_per_s, router, budget, dict(prices), traffic_in(loaded))


def traffic_in(loaded: LoadedScenario) -> Traffic:
    """A scenario's traffic in numbers; a trace is kept for the trials of this process.

    Raises StudyError where all requests come at one instant, or are one session.
    """
    find, scenario = partial(loaded.find, "traces"), loaded.scenario
    is_read = is_resampled(loaded)
    traffic = traffic_of(
        recorded(loaded) if is_read else build_workload(scenario.workload, scenario.seed, find)
    )
    if math.isinf(traffic.rate_per_s):
        step = "raise num_requests, or take more of the trace"
        got = f"{traffic.num_requests:,} requests that begin at one instant"
        raise StudyError(Problem("requests without a rate", path="workload", got=got, next_step=step))
    return traffic


def candidates_of(
    scenario: str | Path, overrides: Sequence[str], axes: Sequence[Axis], traffic: Traffic
) -> list[Candidate]:
    """Every combination of the axes' values.

    Raises ConfigError for a value that no scenario may have, and for what no replica is made of.
    """
    for axis in axes:
        if axis.path not in _VARIES and not axis.path.startswith("engine."):
            step = "vary hardware.gpu, model and engine.*; ask one plan for each value of anything else"
            problem = "changes the question, not a replica"
            raise ConfigError(Problem(problem, "--vary", path=axis.path, next_step=step))
    found = []
    for point in grid_points(axes):
        values = dict(zip((axis.path for axis in axes), point, strict=True))
        changes = [*overrides, *(f"{path}={value}" for path, value in values.items())]
        with blamed_on(dict.fromkeys(values, "--vary")):
            loaded = load_scenario(scenario, changes)
        found.append(Candidate(values, Analytic(loaded, traffic, loaded.scenario.slo)))
    return found
