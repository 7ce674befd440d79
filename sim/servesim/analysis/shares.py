"""Shares of the KV pool over time: means with intervals, quantiles, peaks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from servesim.analysis.batch_means import batch_means
from servesim.analysis.distribution import quantiles
from servesim.analysis.intervals import Interval, t_interval
from servesim.analysis.timeline import KV_CLASSES, Timeline

__all__ = ["FRAGMENT_CLASSES", "LOST_CLASSES", "Share", "Shares", "pooled", "shares_of"]

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Pair = tuple[Integers, Integers]

FRAGMENT_CLASSES = (
    *(name for name in KV_CLASSES if name not in ("cached", "free")),
    "watermark",
    "cached",
    "free",
)
"""As KV_CLASSES, with the slots that the watermark keeps from being handed out taken out of the free ones."""
LOST_CLASSES = tuple(name for name in FRAGMENT_CLASSES if name not in ("tokens", "cached", "free"))
"""Neither holding what is needed nor there for the next request."""

_BINS = 480
_INSTANTS = 2000


@dataclass(frozen=True, slots=True)
class Share:
    """One class as a share of the pool, over time."""

    mean: float
    half_width: float
    """Half of the mean's 95 % interval; NaN when the run is too short to tell."""
    p5: float
    median: float
    p95: float
    peak: float


@dataclass(frozen=True, slots=True)
class Shares:
    """All classes over one part of a run."""

    time_s: float
    """How long that part lasted."""
    of: Mapping[str, Share]
    interval: str
    """What the intervals are made of: batch means over time, or replications."""

    @property
    def lost(self) -> float:
        """Share of the pool that holds nothing needed and cannot be handed out."""
        return sum(self.of[name].mean for name in LOST_CLASSES)


def class_slots(line: Timeline, watermark_slots: int) -> dict[str, Pair]:
    """Slots of every fragment class in the first and in the last step of each row."""
    slots = {name: line.kv(name) for name in KV_CLASSES}
    first, last = slots["free"]
    kept = (np.minimum(first, watermark_slots), np.minimum(last, watermark_slots))
    slots |= {"watermark": kept, "free": (first - kept[0], last - kept[1])}
    return {name: slots[name] for name in FRAGMENT_CLASSES}


def shares_of(line: Timeline, pool_slots: int, watermark_slots: int, *, queued_only: bool) -> Shares | None:
    """The classes over the whole line, or over its rows in which a request waits; None when there are none.

    The rows that count, of one replica after another, are put end to end; means, batches and quantiles are
    those of that clock.
    """
    slots, replicas = class_slots(line, watermark_slots), max(1, len(line.parts))
    if queued_only or line.parts:
        rows = line.columns["waiting"] > 0 if queued_only else np.ones(len(line), dtype=np.bool_)
        line = _end_to_end(line, rows)
        slots = {name: (first[rows], last[rows]) for name, (first, last) in slots.items()}
    horizon_s = line.horizon_s
    if not horizon_s > 0 or not pool_slots:
        return None
    begin_s = float(line.start_s[0])
    edges_s = np.linspace(begin_s, begin_s + horizon_s, min(_BINS, 20 * max(len(line), 1)) + 1)
    found = {}
    for name, (first, last) in slots.items():
        interval = batch_means(line.bin_means(edges_s, first, last))
        instants = _sampled(line, first, last) / pool_slots
        low, middle, high = quantiles(instants, (0.05, 0.5, 0.95))
        found[name] = Share(
            mean=line.mean(first, last) / pool_slots,
            half_width=interval.half_width / pool_slots if interval else math.nan,
            p5=float(low),
            median=float(middle),
            p95=float(high),
            peak=float(max(first.max(), last.max())) / pool_slots,
        )
    return Shares(horizon_s / replicas, found, "batch means over time")


def pooled(replications: list[Shares]) -> Shares:
    """The same part of several runs as one: means over the runs, intervals from how they differ."""
    found = {}
    for name in FRAGMENT_CLASSES:
        ones = [shares.of[name] for shares in replications]
        interval: Interval = t_interval([one.mean for one in ones])
        average = {
            key: float(np.mean([getattr(one, key) for one in ones])) for key in ("p5", "median", "p95")
        }
        peak = max(one.peak for one in ones)
        found[name] = Share(interval.value, interval.half_width, **average, peak=peak)
    time_s = float(np.mean([shares.time_s for shares in replications]))
    return Shares(time_s, found, f"{len(replications)} replications")


def _end_to_end(line: Timeline, rows: NDArray[np.bool_]) -> Timeline:
    duration_s = line.duration_s[rows]
    return replace(
        line,
        start_s=np.concatenate(([0.0], np.cumsum(duration_s)))[: len(duration_s)],
        duration_s=duration_s,
        first_s=line.first_s[rows],
        growth_s=line.growth_s[rows],
        columns={name: column[rows] for name, column in line.columns.items()},
        parts=(),
    )


def _sampled(line: Timeline, first: Integers, last: Integers) -> Floats:
    """The quantity at evenly spaced instants."""
    begin_s, horizon_s = float(line.start_s[0]), line.horizon_s
    instants_s = begin_s + (np.arange(_INSTANTS) + 0.5) / _INSTANTS * horizon_s
    row = np.clip(np.searchsorted(line.start_s, instants_s, side="right") - 1, 0, len(line) - 1)
    inside = (instants_s - line.start_s[row]) / np.where(line.duration_s[row] > 0, line.duration_s[row], 1)
    sampled: Floats = first[row] + (last[row] - first[row]) * np.clip(inside, 0, 1)
    return sampled
