"""How wrong the simulation itself may be: the errors found on recorded servers, for a figure at a load."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from servesim.analysis.intervals import Interval, quantile_interval
from servesim.config.files import shipped

__all__ = ["ModelError", "model_error"]

Floats = NDArray[np.float64]
_FEWEST = 5  # recorded runs from which on a load's own errors are used


@dataclass(frozen=True, slots=True)
class ModelError:
    """The errors ln(simulated / real) that stand for a figure."""

    errors: Floats
    recorded_at: str
    """The load they were recorded at; ``any load`` where too few were at the scenario's own."""

    @property
    def ratio(self) -> Interval:
        """Real over simulated, in the median, with its order-statistic interval over the recorded runs."""
        return quantile_interval(np.exp(-self.errors), 0.5)

    def real(self, simulated: float) -> Floats:
        """What the real figure would be, by each of the recorded errors."""
        return np.asarray(simulated * np.exp(-self.errors))


def model_error(key: str, load: str, calibrated: bool) -> ModelError | None:
    """The recorded errors of a figure at a load; None where nobody recorded the figure.

    ``calibrated``: of runs with an engine profile, judged on what it was not fitted to.
    """
    own = [error for at, error in _rows(key, calibrated) if at == load]
    if len(own) >= _FEWEST:
        return ModelError(np.array(own), load)
    every = [error for _, error in _rows(key, calibrated)]
    return ModelError(np.array(every), "any load") if every else None


def _rows(key: str, calibrated: bool) -> Iterable[tuple[str, float]]:
    wanted = "yes" if calibrated else "no"
    return (
        (row["load"], float(row["error"]))
        for row in _table()
        if row["figure"] == key and row["calibrated"] == wanted
    )


@lru_cache(maxsize=1)
def _table() -> list[dict[str, str]]:
    with (shipped("reports/validation") / "residuals.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
