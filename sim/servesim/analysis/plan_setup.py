"""From a scenario and what varies to the question and the configurations of a plan."""

from __future__ import annotations

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
from servesim.errors import blamed_on
from servesim.workload.build import build_workload

__all__ = ["candidates_of", "question_of", "traffic_in"]


def question_of(
    loaded: LoadedScenario, rate_per_s: float, budget: float | None, prices: Mapping[str, float]
) -> PlanQuestion:
    """The question; raises StudyError for a scenario without SLO, and for a burst and a closed loop.

    A router that looks at the replicas is replaced by round robin: only then one replica can be simulated
    without all the others.
    """
    scenario = loaded.scenario
    refuse_limitless(loaded, "a plan")
    refuse_pools(loaded, "a plan")
    at_load(loaded, 1.0)
    router = scenario.hardware.router if scenario.hardware.router in BLIND else "round-robin"
    return PlanQuestion(rate_per_s, router, budget, dict(prices), traffic_in(loaded))


def traffic_in(loaded: LoadedScenario) -> Traffic:
    """A scenario's traffic in numbers; a trace is kept for the trials of this process."""
    if is_resampled(loaded):
        return traffic_of(recorded(loaded))
    find = partial(loaded.find, "traces")
    return traffic_of(build_workload(loaded.scenario.workload, loaded.scenario.seed, find))


def candidates_of(
    scenario: str | Path, overrides: Sequence[str], axes: Sequence[Axis], traffic: Traffic
) -> list[Candidate]:
    """Every combination of the axes' values; raises ConfigError for a value that no scenario may have."""
    found = []
    for point in grid_points(axes):
        values = dict(zip((axis.path for axis in axes), point, strict=True))
        changes = [*overrides, *(f"{path}={value}" for path, value in values.items())]
        with blamed_on(dict.fromkeys(values, "--vary")):
            loaded = load_scenario(scenario, changes)
        found.append(Candidate(values, Analytic(loaded, traffic, loaded.scenario.slo)))
    return found
