"""From a scenario and what varies to the question and the configurations of a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from servesim.analysis.capacity import at_load
from servesim.analysis.grid import Axis, grid_points
from servesim.analysis.plan import Candidate, PlanQuestion
from servesim.analysis.plan_bounds import Analytic, Traffic, traffic_of
from servesim.config.load import LoadedScenario, load_scenario
from servesim.engine.router import BLIND
from servesim.errors import Problem, StudyError
from servesim.workload.build import build_workload

__all__ = ["candidates_of", "question_of"]


def question_of(
    loaded: LoadedScenario, rate_per_s: float, budget: float | None, prices: Mapping[str, float]
) -> PlanQuestion:
    """The question; raises StudyError for a scenario without SLO, and for a burst and a closed loop.

    A router that looks at the replicas is replaced by round robin: only then one replica can be simulated
    without all the others.
    """
    scenario = loaded.scenario
    if scenario.slo == type(scenario.slo)():
        step = "give --slo ttft_p99_s=0.5, or slo in the scenario"
        raise StudyError(Problem("a plan needs a limit to keep", path="slo", next_step=step))
    if scenario.fleet is not None:
        step = "add --set fleet=null, then try the winner with `servesim run`"
        raise StudyError(
            Problem("a plan is of equal replicas that always serve", path="fleet", next_step=step)
        )
    at_load(loaded, 1.0)
    router = scenario.hardware.router if scenario.hardware.router in BLIND else "round-robin"
    find = partial(loaded.find, "traces")
    traffic = traffic_of(build_workload(scenario.workload, scenario.seed, find))
    return PlanQuestion(rate_per_s, router, budget, dict(prices), traffic)


def candidates_of(
    scenario: str | Path, overrides: Sequence[str], axes: Sequence[Axis], traffic: Traffic
) -> list[Candidate]:
    """Every combination of the axes' values; raises ConfigError for a value that no scenario may have."""
    found = []
    for point in grid_points(axes):
        values = dict(zip((axis.path for axis in axes), point, strict=True))
        changes = [*overrides, *(f"{path}={value}" for path, value in values.items())]
        loaded = load_scenario(scenario, changes)
        found.append(Candidate(values, Analytic(loaded, traffic, loaded.scenario.slo)))
    return found
