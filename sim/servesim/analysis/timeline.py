"""The step log as a function of time: rows without holes, time-weighted means, means in time bins."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from servesim.engine.events import StepLog

__all__ = ["KV_CLASSES", "ExpandedSteps", "Timeline", "expand_steps", "timeline"]

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

KV_CLASSES = ("tokens", "reserved", "internal", "round_up", "holes", "cached", "free")
"""Where a token slot of the KV pool can be; the seven add up to the pool at every step."""
_LIVE = ("tokens", "reserved", "internal", "round_up")


@dataclass(frozen=True, slots=True)
class ExpandedSteps:
    """One entry per step: the row it belongs to, how long it took and when it ended."""

    row: Integers
    duration_s: Floats
    end_s: Floats


@dataclass(frozen=True, slots=True)
class Timeline:
    """Rows that touch: runs of identical steps, and idle rows (``steps`` 0) where no step ran.

    ``columns`` are the integer columns of StepLog. A quantity that changes inside a row is taken to
    change by the same amount from step to step. While idle nothing runs. Where the log has no row without
    steps, nothing waits or is held either; it does not say how much of the prefix cache is left then, so an
    idle row takes what the next step finds cached.
    """

    start_s: Floats
    duration_s: Floats
    first_s: Floats
    growth_s: Floats
    columns: Mapping[str, Integers]
    parts: tuple[slice, ...] = ()
    """Rows of each replica of a fleet, all over the same time; means are then means per replica."""

    @property
    def horizon_s(self) -> float:
        """Time from the first arrival to the end of the last step."""
        return self.total_s / max(1, len(self.parts))

    @property
    def total_s(self) -> float:
        """The horizons of all replicas together."""
        return float(self.duration_s.sum())

    def __len__(self) -> int:
        return len(self.start_s)

    def kv(self, name: str) -> tuple[Integers, Integers]:
        """Slots of a KV class (or ``logical``) in the first and in the last step of every row."""
        return self.columns[f"kv_{name}"], self.columns[f"end_kv_{name}"]

    def live(self) -> tuple[Integers, Integers]:
        """Slots allocated to live requests, as ``kv`` gives them."""
        ends = zip(*map(self.kv, _LIVE), strict=True)
        first, last = (np.sum(end, axis=0) for end in ends)
        return first, last

    def integral(self, first: Integers, last: Integers) -> Floats:
        """Integral over each row's time of what goes evenly from ``first`` to ``last`` in its steps.

        Sum over j < n of (first + j d)(first_s + j growth_s), with d = (last - first) / (n - 1): the first
        value for the whole row, and the change for n (first_s / 2 + (2 n - 1) growth_s / 6).
        """
        steps = self.columns["steps"]
        changed_s = steps * (self.first_s / 2 + (2 * steps - 1) * (self.growth_s / 6))
        return np.asarray(first * self.duration_s + (last - first) * changed_s)

    def mean(self, first: Integers, last: Integers, where: NDArray[np.bool_] | None = None) -> float:
        """Time-weighted mean over the rows of ``where`` (default all); NaN when they last no time."""
        integral, duration_s = self.integral(first, last), self.duration_s
        if where is not None:
            integral, duration_s = integral[where], duration_s[where]
        total_s = float(duration_s.sum())
        return float(integral.sum()) / total_s if total_s > 0 else float("nan")

    def _part(self, rows: slice) -> Timeline:
        return Timeline(
            self.start_s[rows],
            self.duration_s[rows],
            self.first_s[rows],
            self.growth_s[rows],
            {name: values[rows] for name, values in self.columns.items()},
        )

    def bin_means(self, edges_s: Floats, first: Integers, last: Integers) -> Floats:
        """Time-weighted means between edges; inside a row the quantity is a straight line in time."""
        if self.parts:
            each = [self._part(rows).bin_means(edges_s, first[rows], last[rows]) for rows in self.parts]
            return np.asarray(np.mean(each, axis=0))
        begin, duration_s = self.start_s, self.duration_s
        change = last - first
        cumulated = np.concatenate(([0.0], np.cumsum((first + change / 2) * duration_s)))
        row = np.clip(np.searchsorted(begin, edges_s, side="right") - 1, 0, len(begin) - 1)
        inside_s = np.clip(edges_s - begin[row], 0.0, duration_s[row])
        slope = np.divide(change, duration_s, out=np.zeros(len(begin)), where=duration_s > 0)
        at_edge = cumulated[row] + first[row] * inside_s + slope[row] * inside_s**2 / 2
        return np.asarray(np.diff(at_edge) / np.diff(edges_s))


def timeline(steps: StepLog, begin_s: float) -> Timeline:
    """The log's rows from ``begin_s`` (the first arrival) on, with idle rows put into the holes."""
    columns = steps.columns
    floats = {name: columns[name] for name in StepLog.floats}
    integers = {name: columns[name] for name in StepLog.integers}
    if not steps.parts:
        return _one_engine(floats, integers, begin_s)
    ends = np.cumsum((0, *steps.parts))
    rows = [slice(a, b) for a, b in itertools.pairwise(ends.tolist())]
    lines = [
        _one_engine(
            {name: of[part] for name, of in floats.items()},
            {name: of[part] for name, of in integers.items()},
            begin_s,
        )
        for part in rows
    ]
    return _side_by_side(lines, begin_s)


def _side_by_side(lines: Sequence[Timeline], begin_s: float) -> Timeline:
    """The replicas' rows one after another, each replica idle from its last step to the last one of all."""
    longest = max(lines, key=lambda line: line.horizon_s)
    if not len(longest):
        return longest
    end_s = begin_s + longest.horizon_s
    lines = [_until(line, begin_s, end_s, _pool(line if len(line) else longest)) for line in lines]
    ends = np.cumsum([0, *map(len, lines)]).tolist()

    def joined(name: str) -> Floats:
        return np.concatenate([getattr(line, name) for line in lines])

    return Timeline(
        joined("start_s"),
        joined("duration_s"),
        joined("first_s"),
        joined("growth_s"),
        {name: np.concatenate([line.columns[name] for line in lines]) for name in StepLog.integers},
        tuple(slice(a, b) for a, b in itertools.pairwise(ends)),
    )


def _pool(line: Timeline) -> int:
    return sum(int(line.columns[f"kv_{name}"][0]) for name in KV_CLASSES)


def _until(line: Timeline, begin_s: float, end_s: float, pool: int) -> Timeline:
    """The line with an idle row at its end."""
    last_s = begin_s + line.horizon_s
    if not last_s < end_s:
        return line
    last = {name: values[-1] for name, values in line.columns.items()} if len(line) else {}
    idle = _idle(last.get("end_kv_cached", 0), pool) if last.get("steps", 1) else last
    return Timeline(
        np.append(line.start_s, last_s),
        np.append(line.duration_s, end_s - last_s),
        np.append(line.first_s, 0.0),
        np.append(line.growth_s, 0.0),
        {name: np.append(values, idle[name]) for name, values in line.columns.items()},
    )


def _idle(cached: Any, pool: Any) -> dict[str, Any]:
    """The columns of rows in which nothing runs and nobody waits."""
    kv = {"kv_cached": cached, "kv_free": pool - cached}
    return dict.fromkeys(StepLog.integers, 0 * cached) | kv | {f"end_{name}": kv[name] for name in kv}


def _one_engine(floats: Mapping[str, Floats], integers: Mapping[str, Integers], begin_s: float) -> Timeline:
    start_s = floats["start_s"]
    duration_s = _row_duration_s(integers["steps"], floats["first_s"], floats["growth_s"])
    follows_s = np.append(start_s[1:], start_s[-1:])
    duration_s = np.where(integers["steps"] > 0, duration_s, follows_s - start_s)
    before_s = np.concatenate(([begin_s], start_s + duration_s))[: len(start_s)]
    hole_s = start_s - before_s
    # Clock readings that differ only by rounding are not a hole.
    holes = np.flatnonzero(hole_s > 1e-9 * np.maximum(1.0, np.abs(start_s)))
    if not len(holes):
        return Timeline(start_s, duration_s, floats["first_s"], floats["growth_s"], integers)
    pool = sum(integers[f"kv_{name}"][holes] for name in KV_CLASSES)
    idle = _idle(integers["kv_cached"][holes], pool)
    return Timeline(
        start_s=np.insert(start_s, holes, before_s[holes]),
        duration_s=np.insert(duration_s, holes, hole_s[holes]),
        first_s=np.insert(floats["first_s"], holes, 0.0),
        growth_s=np.insert(floats["growth_s"], holes, 0.0),
        columns={name: np.insert(integers[name], holes, idle[name]) for name in StepLog.integers},
    )


def expand_steps(line: Timeline) -> ExpandedSteps:
    """Every step of every row with its own duration: step j takes ``first_s + j * growth_s``.

    In place, since all these arrays are far longer than the log.
    """
    steps = line.columns["steps"]
    row = np.repeat(np.arange(len(steps)), steps)
    j = np.arange(len(row))
    j -= np.repeat(np.cumsum(steps) - steps, steps)
    grown_s = line.growth_s[row]
    grown_s *= j
    duration_s = line.first_s[row]
    end_s = grown_s / 2
    end_s += duration_s
    end_s *= np.add(j, 1, out=j)
    end_s += line.start_s[row]
    duration_s += grown_s
    return ExpandedSteps(row, duration_s, end_s)


def _row_duration_s(steps: Integers, first_s: Floats, growth_s: Floats) -> Floats:
    return steps * (first_s + (steps - 1) * growth_s / 2)
