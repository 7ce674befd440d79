"""Means and percentiles, of plain and of weighted samples, as numpy gives them on the expanded sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "PERCENTILES",
    "Distribution",
    "distribution",
    "quantiles",
    "weighted_distribution",
    "weighted_quantiles",
]

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True, slots=True)
class Distribution:
    """A latency, in seconds, over ``count`` samples; every figure is NaN when there are none."""

    count: int
    mean_s: float
    std_s: float
    """Of the population (divided by count), as numpy.std and vLLM's client have it."""
    p50_s: float
    p90_s: float
    p95_s: float
    p99_s: float

    @property
    def median_s(self) -> float:
        """The median is the 50th percentile by linear interpolation."""
        return self.p50_s


def distribution(values_s: Floats) -> Distribution:
    """Mean, population standard deviation and linearly interpolated percentiles of ``values_s``."""
    if not len(values_s):
        return Distribution(0, *[float("nan")] * (2 + len(PERCENTILES)))
    percentiles = quantiles(values_s, np.array(PERCENTILES) / 100)
    return Distribution(
        len(values_s), float(values_s.mean()), float(values_s.std()), *(float(value) for value in percentiles)
    )


def quantiles(values: Floats, shares: Sequence[float] | Floats) -> Floats:
    """As numpy.quantile, which loads all of numpy.ma for it: linear between the ordered values."""
    places = np.asarray(shares) * (len(values) - 1)
    return np.asarray(np.interp(places, np.arange(len(values)), np.sort(values)))


def weighted_distribution(values_s: Floats, weights: Integers) -> Distribution:
    """``distribution`` of the sample that holds ``values_s[i]`` ``weights[i]`` times, never built."""
    count = int(weights.sum())
    if not count:
        return distribution(np.empty(0))
    values_s, weights = _sorted(values_s, weights)
    mean_s = float(values_s @ weights) / count
    std_s = float(np.sqrt(np.square(values_s - mean_s) @ weights / count))
    percentiles = _quantiles_of_sorted(values_s, weights, np.array(PERCENTILES) / 100)
    return Distribution(count, mean_s, std_s, *(float(value) for value in percentiles))


def weighted_quantiles(values: Floats, weights: Integers, quantiles: Floats) -> Floats:
    """Quantiles (0 to 1) of the sample that holds ``values[i]`` ``weights[i]`` times; NaN when empty."""
    return _quantiles_of_sorted(*_sorted(values, weights), quantiles)


def _sorted(values: Floats, weights: Integers) -> tuple[Floats, Integers]:
    """By value, without what has no weight; samples are large, so nothing is copied twice."""
    order = np.argsort(values)
    order = order[weights[order] > 0]
    return values[order], weights[order]


def _quantiles_of_sorted(values: Floats, weights: Integers, quantiles: Floats) -> Floats:
    if not len(values):
        return np.full(len(quantiles), np.nan)
    ends = np.cumsum(weights)  # value i fills the places ends[i - 1] <= place < ends[i] of the sorted sample
    place = quantiles * (ends[-1] - 1)
    low = np.floor(place)
    below = values[np.searchsorted(ends, low, side="right")]
    above = values[np.searchsorted(ends, np.ceil(place), side="right")]
    return np.asarray(below + (place - low) * (above - below))
