"""An interval from one long run: the means of its batches, made long enough to be nearly independent."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from servesim.analysis.intervals import LEVEL, Interval, t_interval

__all__ = ["batch_means"]

Floats = NDArray[np.float64]


def batch_means(values: Sequence[float] | Floats, batches: int = 20, level: float = LEVEL) -> Interval | None:
    """Interval of the mean of one long run from the means of its batches.

    Batches are doubled in length until neighbours are nearly independent (lag-1 autocorrelation below 0.2).
    None when that leaves fewer than ten: the run is too short to tell.
    """
    series = np.asarray(values, dtype=np.float64)
    size = len(series) // batches
    while size and len(series) // size >= 10:
        count = len(series) // size
        means = series[len(series) - count * size :].reshape(count, size).mean(axis=1)
        if _lag_1(means) < 0.2:
            return t_interval(means, level)
        size *= 2
    return None


def _lag_1(means: Floats) -> float:
    centred = means - means.mean()
    variance = float(centred @ centred)
    return float(centred[1:] @ centred[:-1]) / variance if variance else 0.0
