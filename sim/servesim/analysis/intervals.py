"""How sure a figure is: intervals for means, quantiles and shares, and how many samples they need."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "LEVEL",
    "WIDE",
    "Interval",
    "needed_samples",
    "paired_interval",
    "quantile_interval",
    "share_interval",
    "student_t",
    "t_interval",
]

Floats = NDArray[np.float64]

LEVEL = 0.95
"""Share of the intervals that hold the truth."""
WIDE = 0.05
"""Relative half-width from which on a figure is called uncertain."""
_BEYOND = 10  # samples that must lie beyond a quantile before it is printed
_ALMOST_NORMAL = 10_000  # degrees of freedom from which on Student's t is the normal law


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate and where the truth lies; ``count`` independent samples led to it."""

    value: float
    low: float
    high: float
    count: int

    @property
    def half_width(self) -> float:
        """Half of the interval's width."""
        return (self.high - self.low) / 2

    @property
    def relative(self) -> float:
        """Half-width over the size of the estimate; 0 when both are 0."""
        return self.half_width / abs(self.value) if self.value else 0.0 if not self.half_width else math.inf

    @property
    def is_wide(self) -> bool:
        """Too uncertain to be relied on without a second look."""
        return not self.relative <= WIDE

    @property
    def is_zero_inside(self) -> bool:
        """The truth may be zero: a difference of this kind ranks nobody."""
        return not (self.low > 0 or self.high < 0)


def t_interval(values: Sequence[float] | Floats, level: float = LEVEL) -> Interval:
    """Student's interval for the mean of independent values; without end for fewer than two."""
    sample = np.asarray(values, dtype=np.float64)
    mean = float(sample.mean())
    if len(sample) < 2:
        return Interval(mean, -math.inf, math.inf, len(sample))
    half = student_t(level, len(sample) - 1) * float(sample.std(ddof=1)) / math.sqrt(len(sample))
    return Interval(mean, mean - half, mean + half, len(sample))


def paired_interval(
    a: Sequence[float] | Floats, b: Sequence[float] | Floats, comparisons: int = 1, level: float = LEVEL
) -> Interval:
    """Interval of the mean of b - a, pair by pair; both served the same random numbers in each pair.

    With several ``comparisons`` all their intervals hold at once with probability ``level`` (Bonferroni).
    """
    difference = np.asarray(b, dtype=np.float64) - np.asarray(a, dtype=np.float64)
    return t_interval(difference, 1 - (1 - level) / comparisons)


def quantile_interval(sample: Sequence[float] | Floats, quantile: float, level: float = LEVEL) -> Interval:
    """Interval of a quantile from independent samples: the order statistics that the binomial law picks.

    The number of samples below the true quantile is binomial, whatever the samples' law. Ends are infinite
    where so few samples lie beyond the quantile that no order statistic will do.
    """
    ordered = np.sort(np.asarray(sample, dtype=np.float64))
    count = len(ordered)
    below = np.cumsum(_binomial(count, quantile))  # P(at most k samples lie below)
    tail = (1 - level) / 2 * (1 + 1e-12)
    low = int(np.searchsorted(below, tail, side="right"))  # P(fewer than `low` below) <= tail
    high = int(np.searchsorted(below, 1 - tail, side="left")) + 1  # P(`high` or more below) <= tail
    return Interval(
        float(np.quantile(ordered, quantile)),
        float(ordered[low - 1]) if low > 0 else -math.inf,
        float(ordered[high - 1]) if high <= count else math.inf,
        count,
    )


def share_interval(hits: float, count: int, level: float = LEVEL) -> Interval:
    """Interval of a probability from ``hits`` of ``count`` independent trials (Wilson 1927)."""
    z = NormalDist().inv_cdf((1 + level) / 2)
    share = hits / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    spread = share * (1 - share) / count + z * z / (4 * count * count)
    half = z * math.sqrt(spread) / (1 + z * z / count)
    return Interval(share, max(0.0, centre - half), min(1.0, centre + half), count)


def needed_samples(quantile: float) -> int:
    """Fewest samples from which a quantile is printed: ten beyond it (1,000 for P99, 10,000 for P99.9)."""
    return math.ceil(round(_BEYOND / (1 - quantile), 6))


def student_t(level: float, degrees: int) -> float:
    """The t that |T| stays below with probability ``level``, T having ``degrees`` of freedom.

    The probability is a finite sum in the angle arctan(t / sqrt(degrees)) (Abramowitz & Stegun 26.7.3-4).
    """
    if degrees >= _ALMOST_NORMAL:
        return NormalDist().inv_cdf((1 + level) / 2)
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, degrees) < level else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def _within(angle: float, degrees: int) -> float:
    """P(|T| <= sqrt(degrees) * tan(angle))."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term = total = 0.0 if degrees == 1 else (cosine if odd else 1.0)
    for k in range(3 if odd else 2, degrees, 2):
        term *= cosine * cosine * (k - 1) / k
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def _binomial(count: int, share: float) -> Floats:
    """P(k successes) for k = 0 .. count."""
    k = np.arange(count, dtype=np.float64)
    steps = np.log((count - k) / (k + 1)) + math.log(share / (1 - share))
    logs = np.concatenate(([0.0], np.cumsum(steps))) + count * math.log1p(-share)
    law: Floats = np.exp(logs)
    return law
