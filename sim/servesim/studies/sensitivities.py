"""What the figures of a scenario depend on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from servesim.analysis.replications import run_replication
from servesim.analysis.sensitivity import Sensitivity, run_task, sensitivity_of
from servesim.analysis.sweep import OnDone, Workers, ignore, in_order
from servesim.config.load import loaded_scenario
from servesim.errors import ConfigError, Problem
from servesim.studies.source import Source, refuse_single

__all__ = ["SensitivityStudy", "sensitivity"]


@dataclass(frozen=True)
class SensitivityStudy:
    """What a scenario's figures depend on, and how sure they are."""

    sensitivity: Sensitivity

    def __str__(self) -> str:
        return self.text()

    def text(self, figures: Sequence[str] = ()) -> str:
        """The tornado of some figures, by key, the sources of uncertainty and the odds of the SLO."""
        from servesim.report.sensitivity import sensitivity_text

        return sensitivity_text(self.sensitivity, figures)

    def to_json(self) -> str:
        """Everything, for every figure."""
        from servesim.report.sensitivity import sensitivity_json

        return sensitivity_json(self.sensitivity)

    def to_html(self, figures: Sequence[str] = ()) -> str:
        """The study as one offline page."""
        from servesim.report.sensitivity import sensitivity_html

        return sensitivity_html(self.sensitivity, figures)

    def files(self) -> dict[str, str]:
        """Everything that ``servesim sensitivity --out`` writes, by file name."""
        return {"sensitivity.html": self.to_html(), "sensitivity.json": self.to_json()}


def sensitivity(
    scenario: Source,
    replications: int = 5,
    *,
    change: float = 0.1,
    overrides: Sequence[str] = (),
    jobs: int | None = None,
    on_run: OnDone = ignore,
) -> SensitivityStudy:
    """Move every input of a scenario down and up by ``change`` (0.1: ten percent) and see what follows.

    ``on_run(done, total)`` is called after each simulation of the variants.
    """
    if not 0 < change < 1:
        step = "give a share such as 0.1"
        raise ConfigError(Problem("a change must be between 0 and 1", got=str(change), next_step=step))
    refuse_single(replications)
    workers = Workers(jobs=jobs)
    return SensitivityStudy(
        sensitivity_of(
            loaded_scenario(scenario, overrides),
            replications,
            change,
            lambda scenarios: in_order(run_replication, scenarios, workers),
            lambda tasks: in_order(run_task, tasks, workers, on_run),
        )
    )
