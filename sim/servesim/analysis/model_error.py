"""How wrong the simulation itself may be: the errors found on recorded servers, for a figure at a load."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from servesim.analysis.intervals import Interval, quantile_interval
from servesim.config.files import shipped

__all__ = ["ModelError", "joint_errors", "model_error"]

Floats = NDArray[np.float64]
_FEWEST = 5  # recorded runs from which on a load's own errors are used
_CPU = "cpu-"  # what the names of recorded CPUs begin with: their errors say little of a GPU, and the reverse


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


def model_error(key: str, load: str, *, calibrated: bool, on_cpu: bool = False) -> ModelError | None:
    """The recorded errors of a figure at a load; None where nobody recorded the figure.

    ``calibrated``: of runs with an engine profile, judged on what it was not fitted to; ``on_cpu``: of a CPU
    in place of GPUs.
    """
    joint = joint_errors([key], load, calibrated=calibrated, on_cpu=on_cpu)
    return None if joint is None else ModelError(joint.errors[:, 0], joint.recorded_at)


def joint_errors(
    keys: Sequence[str], load: str, *, calibrated: bool, on_cpu: bool = False
) -> ModelError | None:
    """The same of several figures: a row of errors for each run of which all were recorded."""
    runs: dict[tuple[str, str, str, int], dict[str, float]] = {}
    seen: Counter[tuple[str, ...]] = Counter()
    for row in _table():
        same_kind = row["gpu"].startswith(_CPU) == on_cpu
        if same_kind and row["figure"] in keys and row["calibrated"] == ("yes" if calibrated else "no"):
            run = (row["recording"], row["row"], row["load"])
            number = seen[*run, row["figure"]]  # runs under one name follow one another
            seen[*run, row["figure"]] += 1
            runs.setdefault((*run, number), {})[row["figure"]] = float(row["error"])
    whole = {run: errors for run, errors in runs.items() if len(errors) == len(keys)}
    own = [run for run in whole if run[2] == load]
    at, chosen = (load, own) if len(own) >= _FEWEST else ("any load", list(whole))
    return ModelError(np.array([[whole[run][key] for key in keys] for run in chosen]), at) if chosen else None


@lru_cache(maxsize=1)
def _table() -> list[dict[str, str]]:
    with (shipped("reports/validation") / "residuals.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
