"""A scenario, or two, under several seeds: every figure with its interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from servesim.analysis.replications import (
    PairedEstimate,
    Replications,
    differences,
    replicate_pair,
)
from servesim.analysis.replications import replicate as replicate_scenario
from servesim.analysis.sweep import OnDone, Workers, ignore, in_order
from servesim.config.load import loaded_scenario
from servesim.studies.source import Source, refuse_single

if TYPE_CHECKING:
    import pandas as pd


__all__ = ["PairedReplications", "Replicated", "replicate", "replicate_compared"]


@dataclass(frozen=True)
class Replicated:
    """A scenario's figures over independent replications."""

    replications: Replications

    def __str__(self) -> str:
        from servesim.report.replicated import replicated_text

        return replicated_text(self.replications)

    def to_json(self) -> str:
        """vLLM's keys with means, and the intervals."""
        from servesim.report.replicated import replicated_json

        return replicated_json(self.replications)

    def to_html(self) -> str:
        """The figures with their intervals, and the warm-up, as one offline page."""
        from servesim.report.replicated_page import replicated_html

        return replicated_html(self.replications)

    @property
    def frame(self) -> pd.DataFrame:
        """A row per replication."""
        import pandas as pd

        from servesim.report.replicated import replications_rows

        return pd.DataFrame(replications_rows(self.replications))

    def files(self) -> dict[str, str]:
        """Everything that ``servesim run --replications N --out`` writes, by file name."""
        from servesim.analysis.tables import to_csv

        return {
            "replications.html": self.to_html(),
            "result.json": self.to_json(),
            "replications.csv": to_csv(self.frame),
        }


@dataclass(frozen=True)
class PairedReplications:
    """Two scenarios over the same replications."""

    a: Replications
    b: Replications

    @property
    def differences(self) -> list[PairedEstimate]:
        """Every figure, with the interval of b - a."""
        return differences(self.a, self.b)

    def __str__(self) -> str:
        from servesim.report.replicated import paired_text

        return paired_text(self.a, self.b, self.differences)

    def to_html(self) -> str:
        """The differences with their intervals as one offline page."""
        from servesim.report.replicated_page import paired_html

        return paired_html(self.a, self.b, self.differences)

    def to_json(self) -> str:
        """Both, and the differences."""
        from servesim.report.replicated import paired_json

        return paired_json(self.a, self.b, self.differences)

    def files(self) -> dict[str, str]:
        """Everything that ``servesim compare --replications N --out`` writes, by file name."""
        return {"compare.html": self.to_html(), "compare.json": self.to_json()}


def replicate(
    scenario: Source,
    replications: int = 10,
    *,
    overrides: Sequence[str] = (),
    jobs: int | None = None,
    on_run: OnDone = ignore,
) -> Replicated:
    """Simulate a scenario under several seeds, on ``jobs`` cores (None: all); figures without warm-up.

    ``on_run(done, total)`` is called after each replication.
    """
    loaded = loaded_scenario(scenario, overrides)
    refuse_single(replications)
    return Replicated(
        replicate_scenario(
            loaded, replications, lambda run, each: in_order(run, each, Workers(jobs=jobs), on_run)
        )
    )


def replicate_compared(
    a: Source,
    b: Source,
    replications: int = 10,
    *,
    overrides: Sequence[str] = (),
    jobs: int | None = None,
    on_run: OnDone = ignore,
) -> PairedReplications:
    """Simulate two scenarios under the same seeds; differences are taken pair by pair."""
    pair = loaded_scenario(a, overrides), loaded_scenario(b, overrides)
    refuse_single(replications)
    return PairedReplications(
        *replicate_pair(
            *pair, replications, lambda run, each: in_order(run, each, Workers(jobs=jobs), on_run)
        )
    )
