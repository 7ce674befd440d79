"""A scenario over a grid of values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from servesim.analysis.grid import read_axis
from servesim.analysis.run_folder import RunFolder
from servesim.analysis.sweep import OnDone, Workers, ignore, plan_sweep, run_sweep
from servesim.errors import ConfigError, Problem

if TYPE_CHECKING:
    import pandas as pd


__all__ = ["Sweep", "sweep"]


@dataclass(frozen=True)
class Sweep:
    """The points of a sweep, in order, with their figures."""

    manifest: dict[str, Any]
    points: list[dict[str, Any]]

    @property
    def frame(self) -> pd.DataFrame:
        """A row per point: what varies, then every figure."""
        import pandas as pd

        from servesim.report.sweep import sweep_rows

        return pd.DataFrame(sweep_rows(self.manifest, self.points))

    def __str__(self) -> str:
        return self.text()

    def text(self, figures: Sequence[str] = ()) -> str:
        """The table of the points with some figures, by key; a usual choice when none is given."""
        from servesim.report.sweep import sweep_text

        return sweep_text(self.manifest, self.points, figures)

    def to_json(self) -> str:
        """The manifest and every point."""
        from servesim.report.sweep import sweep_json

        return sweep_json(self.manifest, self.points)

    def to_html(self) -> str:
        """The grid as one offline page with sliders."""
        from servesim.report.sweep import sweep_html

        return sweep_html(self.manifest, self.points)

    def files(self) -> dict[str, str]:
        """What stands in the run folder besides the manifest and the points, by file name."""
        from servesim.analysis.tables import to_csv

        return {"sweep.html": self.to_html(), "sweep.json": self.to_json(), "sweep.csv": to_csv(self.frame)}


def sweep(
    scenario: str | Path,
    vary: Sequence[str],
    *,
    out: str | Path,
    overrides: Sequence[str] = (),
    latin: int | None = None,
    replications: int = 1,
    jobs: int | None = None,
    backend: str = "local",
    scheduler: str | None = None,
    on_point: OnDone = ignore,
) -> Sweep:
    """Simulate a scenario over a grid of values, or over ``latin`` points of a Latin hypercube.

    ``vary``: texts like ``"engine.block_size=8,16"`` or ``"slo.ttft_p99_s=0.1:2"`` (a range, with ``latin``).
    Finished points are kept in the folder ``out``, and a sweep that was interrupted goes on from them.
    """
    if backend not in ("local", "dask"):
        raise ConfigError(Problem("unknown backend", "--backend", got=backend, hint="allowed: local, dask"))
    workers = Workers("dask" if backend == "dask" else "local", jobs, scheduler)
    plan = plan_sweep(scenario, overrides, [read_axis(text) for text in vary], latin, replications)
    folder = RunFolder(Path(out), plan.manifest)
    return Sweep(plan.manifest, run_sweep(plan, folder, workers, on_point))
