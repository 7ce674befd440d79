"""How much traffic a scenario takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from servesim.analysis.plan_trials import run_trial
from servesim.analysis.sweep import OnDone, Workers, ignore, in_order
from servesim.config.load import loaded_scenario
from servesim.studies.source import Source

if TYPE_CHECKING:
    from servesim.analysis.capacity_study import CapacityStudy

__all__ = ["Capacity", "capacity"]


@dataclass(frozen=True)
class Capacity:
    """How much traffic a scenario takes within its SLO."""

    study: CapacityStudy

    @property
    def bracket_per_s(self) -> tuple[float, float]:
        """The highest rate that surely keeps the SLO, and the lowest that surely misses it."""
        return self.study.bracket.low * self.study.rate_per_s, self.study.bracket.high * self.study.rate_per_s

    def __str__(self) -> str:
        from servesim.report.capacity import capacity_text

        return capacity_text(self.study)

    def to_json(self) -> str:
        """The bracket and every rate tried."""
        from servesim.report.capacity import capacity_json

        return capacity_json(self.study)

    def to_html(self) -> str:
        """The rates tried as one offline page."""
        from servesim.report.capacity import capacity_html

        return capacity_html(self.study)

    def files(self) -> dict[str, str]:
        """Everything that ``servesim capacity --out`` writes, by file name."""
        return {"capacity.html": self.to_html(), "capacity.json": self.to_json()}


def capacity(
    scenario: Source,
    *,
    overrides: Sequence[str] = (),
    jobs: int | None = None,
    on_trial: OnDone = ignore,
) -> Capacity:
    """The rate up to which a scenario keeps its SLO: the same requests, faster and faster.

    ``on_trial(done, total)`` is called after each simulation of a rate.
    """
    from servesim.analysis.capacity_study import study_capacity

    workers = Workers(jobs=jobs)
    return Capacity(
        study_capacity(
            loaded_scenario(scenario, overrides),
            lambda tasks: in_order(run_trial, tasks, workers, on_trial),
        )
    )
