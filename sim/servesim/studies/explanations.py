"""Why a percentile is what it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from servesim.analysis.sweep import OnDone, Workers, ignore, in_order
from servesim.config.load import loaded_scenario
from servesim.errors import ConfigError, Problem
from servesim.studies.source import Source

if TYPE_CHECKING:
    import pandas as pd

    from servesim.analysis.explain import Explanation

__all__ = ["Explained", "explain"]


@dataclass(frozen=True)
class Explained:
    """Why a scenario's percentile is what it is."""

    explanation: Explanation

    def __str__(self) -> str:
        from servesim.report.explain import explanation_text

        return explanation_text(self.explanation)

    def to_json(self) -> str:
        """Parts, cause, and everything that was tried."""
        from servesim.report.explain import explanation_json

        return explanation_json(self.explanation)

    def to_html(self) -> str:
        """The explanation as one offline page."""
        from servesim.report.explain_page import explanation_html

        return explanation_html(self.explanation)

    @property
    def frame(self) -> pd.DataFrame:
        """A row per completed request: its parts in seconds, and what they add up to."""
        import pandas as pd

        from servesim.analysis.attribution import PARTS

        of = self.explanation.attribution
        parts = {f"{name}_s": of.parts_s[:, number] for number, name in enumerate(PARTS)}
        whole = {"index": of.index, "ttft_s": of.ttft_s, "e2e_s": of.e2e_s}
        served_by = {"replica": of.replica} if self.explanation.replicas else {}
        return pd.DataFrame({**served_by, **whole, **parts})

    def files(self) -> dict[str, str]:
        """Everything that ``servesim explain --out`` writes, by file name."""
        from servesim.analysis.tables import to_csv

        return {
            "explain.html": self.to_html(),
            "explain.json": self.to_json(),
            "parts.csv": to_csv(self.frame),
        }


def explain(
    scenario: Source,
    metric: str = "ttft_p99",
    *,
    overrides: Sequence[str] = (),
    prices_usd_per_hour: Mapping[str, float] | None = None,
    jobs: int | None = None,
    on_run: OnDone = ignore,
) -> Explained:
    """Split every latency into parts, name what makes the tail of ``metric``, and try what would help.

    ``metric``: ttft_p99, tpot_p99 or e2e_p99. ``on_run(done, total)`` is called after each simulation.
    """
    from servesim.analysis.explain import explain_scenario
    from servesim.analysis.explain_trials import run_trial as run_change

    name = metric.removesuffix("_p99")
    if name not in ("ttft", "tpot", "e2e"):
        step = "choose ttft_p99, tpot_p99 or e2e_p99"
        raise ConfigError(Problem("unknown metric", got=metric, next_step=step))
    workers = Workers(jobs=jobs)
    return Explained(
        explain_scenario(
            loaded_scenario(scenario, overrides),
            name,
            lambda tasks: in_order(run_change, tasks, workers, on_run),
            prices_usd_per_hour,
        )
    )
