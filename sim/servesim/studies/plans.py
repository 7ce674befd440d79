"""Which GPUs, and how many, serve a rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from servesim.analysis.grid import read_axis
from servesim.analysis.plan import Plan, make_plan
from servesim.analysis.plan_trials import run_trial
from servesim.analysis.sweep import OnDone, Workers, ignore, in_order
from servesim.config.load import load_scenario

__all__ = ["FleetPlan", "plan"]


@dataclass(frozen=True)
class FleetPlan:
    """Which GPUs, and how many, serve a rate within an SLO."""

    plan: Plan

    def __str__(self) -> str:
        from servesim.report.plan import plan_text

        return plan_text(self.plan)

    def to_json(self) -> str:
        """Every configuration, with what was found of it."""
        from servesim.report.plan import plan_json

        return plan_json(self.plan)

    def to_html(self) -> str:
        """The ranking and the prices against the latencies as one offline page."""
        from servesim.report.plan_page import plan_html

        return plan_html(self.plan)

    def files(self) -> dict[str, str]:
        """Everything that ``servesim plan --out`` writes, by file name."""
        return {"plan.html": self.to_html(), "plan.json": self.to_json()}


def plan(
    scenario: str | Path,
    rate_per_s: float,
    vary: Sequence[str],
    *,
    overrides: Sequence[str] = (),
    budget_usd_per_hour: float | None = None,
    prices_usd_per_hour: Mapping[str, float] | None = None,
    jobs: int | None = None,
    on_trial: OnDone = ignore,
) -> FleetPlan:
    """The cheapest fleets that serve ``rate_per_s`` requests per second within the scenario's SLO.

    ``vary``: texts like ``"hardware.gpu=h100-sxm,b200"``; every combination is one configuration of a
    replica. ``on_trial(done, total)`` is called after each simulation of a round.
    """
    from servesim.analysis.plan_setup import candidates_of, question_of

    axes = [read_axis(text) for text in vary]
    loaded = load_scenario(scenario, overrides)
    question = question_of(loaded, rate_per_s, budget_usd_per_hour, prices_usd_per_hour or {})
    candidates = candidates_of(scenario, overrides, axes, question.traffic)
    workers = Workers(jobs=jobs)
    return FleetPlan(
        make_plan(loaded, question, candidates, lambda tasks: in_order(run_trial, tasks, workers, on_trial))
    )
