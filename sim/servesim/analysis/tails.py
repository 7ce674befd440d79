"""Which requests are slow and which are usual, and the tail of a fleet, replica by replica."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from servesim.analysis.attribution import Attribution
from servesim.analysis.distribution import distribution

__all__ = ["ReplicaTail", "replica_tails", "slow_and_usual"]

Rows = NDArray[np.int64]


class ReplicaTail(NamedTuple):
    """One replica, by its place among those that are simulated, from 0."""

    replica: int
    requests: int
    p99_s: float
    in_tail: int
    """Of the fleet's slowest hundredth, how many it served."""


def replica_tails(of: Attribution, metric: str) -> list[ReplicaTail]:
    """The replicas that served a request with this metric, the slowest first."""
    values = of.metric_s(metric)
    known = np.isfinite(values)
    tail_s = np.quantile(values[known], 0.99) if known.any() else np.inf
    found = []
    for replica in np.unique(of.replica[known]).tolist():
        own = values[known & (of.replica == replica)]
        found.append(ReplicaTail(replica, len(own), distribution(own).p99_s, int((own >= tail_s).sum())))
    return sorted(found, key=lambda one: -one.p99_s)


def slow_and_usual(of: Attribution, metric: str) -> tuple[Rows, Rows]:
    """Rows of the slowest hundredth, and of the half around the median; none where nobody has the metric.

    Of two requests none lies between the quarters: then all are usual.
    """
    values = of.metric_s(metric)
    known = np.flatnonzero(np.isfinite(values))
    if not len(known):
        return known, known
    low, high, tail = np.quantile(values[known], (0.25, 0.75, 0.99))
    usual = known[(values[known] >= low) & (values[known] <= high)]
    return known[values[known] >= tail], usual if len(usual) else known
