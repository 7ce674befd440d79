"""Where the warm-up of a simulation ends: MSER-5 on the queue and on the KV use, never on latencies.

Latencies of completed requests would hide the begin: the slow ones have not ended yet. The waiting queue and
the KV pool are known at every instant.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from servesim.analysis.run import Run
from servesim.analysis.timeline import timeline

__all__ = ["BINS", "Load", "arrival_span_s", "cross_cuts", "cuts_of", "load_of", "mean_load", "mser5"]

Floats = NDArray[np.float64]

BINS = 500
_BATCH = 5


@dataclass(frozen=True, slots=True)
class Load:
    """How busy the engine was in ``BINS`` equal parts of the time between first and last arrival."""

    begin_s: float
    end_s: float
    waiting: Floats
    """Mean waiting requests."""
    kv_tokens: Floats
    """Mean token slots allocated to live requests."""


def mser5(series: Sequence[float] | Floats) -> int | None:
    """Values to leave out at the begin of ``series``; None when it never settles.

    In batches of five, the cut d minimises sum_{i > d} (Y_i - mean_d)^2 / (n - d)^2 over the first half, and
    a cut at that half's end means that none was found (White 1997; Hoad, Robinson & Davies 2008).
    """
    values = np.asarray(series, dtype=np.float64)
    count = len(values) // _BATCH
    if count < 2:
        return None
    batches = values[: count * _BATCH].reshape(count, _BATCH).mean(axis=1)
    batches = batches - batches.mean()  # keeps the sums of squares small
    left = np.arange(count, 0, -1)
    sums, squares = (np.cumsum(each[::-1])[::-1] for each in (batches, batches**2))
    scores = (np.maximum(squares - sums**2 / left, 0.0) / left**2)[: count // 2 + 1]
    best = int(np.argmin(scores))
    return None if best == count // 2 and best > 0 else best * _BATCH


def arrival_span_s(run: Run) -> tuple[float, float]:
    """First and last arrival; of sessions the last one's first turn, since no new ones fill up after it."""
    column = run.log.requests.columns
    arrival_s, sessions = np.array(column["arrival_s"]), run.scenario.workload.sessions
    starts_s = arrival_s if sessions is None else arrival_s[np.array(column["index"]) % sessions.turns == 0]
    return float(arrival_s.min()), float(starts_s.max(initial=arrival_s.min()))


def load_of(run: Run) -> Load:
    """The queue and the KV use of a run while requests arrive; empty series when they come at one instant."""
    begin_s, end_s = arrival_span_s(run)
    line = timeline(run.log.steps, begin_s)
    if not end_s > begin_s or not len(line):
        return Load(begin_s, end_s, np.zeros(0), np.zeros(0))
    edges_s = np.linspace(begin_s, end_s, BINS + 1)
    waiting = line.columns["waiting"]
    return Load(
        begin_s,
        end_s,
        line.bin_means(edges_s, waiting, waiting),
        line.bin_means(edges_s, *line.live()),
    )


def mean_load(loads: Sequence[Load]) -> Load | None:
    """The mean of the replications, bin by bin, as Welch's plot shows it; None when they have no bins."""
    if not all(len(load.waiting) for load in loads):
        return None
    waiting, kv_tokens = (
        np.mean([getattr(one, name) for one in loads], axis=0) for name in ("waiting", "kv_tokens")
    )
    span_s = float(np.mean([one.end_s - one.begin_s for one in loads]))
    return Load(0.0, span_s, waiting, kv_tokens)


def cuts_of(loads: Sequence[Load]) -> list[float] | None:
    """Share of the arrivals' time to leave out in each replication; None: there is no steady state.

    The later of the cuts in the queue and in the KV use.
    """
    if not all(len(load.waiting) for load in loads):
        return None
    found = [cross_cuts([getattr(load, name) for load in loads]) for name in ("waiting", "kv_tokens")]
    if any(cuts is None for cuts in found):
        return None
    return [max(pair) / BINS for pair in zip(*(cuts for cuts in found if cuts is not None), strict=True)]


def cross_cuts(series: Sequence[Floats] | Floats) -> list[int] | None:
    """MSER-5 for each replication in the mean of the others; None when most means never settle.

    A cut made in the very numbers whose mean is asked for leaves out what happens to be large, and the mean
    comes out too small (by a quarter of its standard error in an M/M/1 queue at load .9).
    """
    rows = np.asarray(series, dtype=np.float64)
    if len(rows) == 1:
        cuts = [mser5(rows[0])]
    else:
        total = rows.sum(axis=0)
        cuts = [mser5((total - row) / (len(rows) - 1)) for row in rows]
    if 2 * cuts.count(None) > len(cuts):
        return None
    return [rows.shape[1] // 2 if cut is None else cut for cut in cuts]
