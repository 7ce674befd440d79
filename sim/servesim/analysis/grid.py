"""The points of a sweep: a grid over lists of values, or a Latin hypercube over ranges and lists."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from servesim.errors import ConfigError, Problem
from servesim.workload.streams import Stream

__all__ = ["Axis", "grid_points", "latin_points", "read_axis"]

Point = tuple[str, ...]
"""One text for each axis, as ``--set`` takes it."""
_STEP = "write path=value,value,... or, with --latin, path=low:high or path=low:high:log"


@dataclass(frozen=True, slots=True)
class Axis:
    """A value of the scenario that varies: over a list of texts, or between two numbers."""

    path: str
    values: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 0.0
    is_log: bool = False
    """Spread evenly in the logarithm."""
    is_whole: bool = False

    def at(self, share: float) -> str:
        """The value at ``share`` of the axis, 0 <= share < 1."""
        if self.values:
            return self.values[int(share * len(self.values))]
        low, high = (self.low, self.high + 1) if self.is_whole else (self.low, self.high)
        value = low * (high / low) ** share if self.is_log else low + share * (high - low)
        return str(math.floor(value)) if self.is_whole else f"{value:.6g}"


def read_axis(text: str) -> Axis:
    """An axis as the command line says it: ``engine.block_size=8,16,32`` or ``slo.ttft_p99_s=0.1:2:log``."""
    path, equals, values = (part.strip() for part in text.partition("="))
    if not equals or not path or not values:
        raise ConfigError(Problem("a value to vary must be path=values", "--vary", got=text, next_step=_STEP))
    listed = _listed(values)
    if len(listed) == 1 and (ends := _range(path, values)):
        return ends
    if len(set(listed)) < len(listed) or not all(listed):
        problem = Problem("a value is empty or given twice", "--vary", path=path, got=values, next_step=_STEP)
        raise ConfigError(problem)
    return Axis(path, tuple(listed))


def grid_points(axes: Sequence[Axis]) -> list[Point]:
    """Every combination; the last axis varies fastest. Raises ConfigError for a range."""
    for axis in axes:
        if not axis.values:
            step = "list its values, or add --latin N to draw N points from it"
            raise ConfigError(
                Problem("a grid needs values, not a range", "--vary", path=axis.path, next_step=step)
            )
    return list(itertools.product(*(axis.values for axis in axes)))


def latin_points(axes: Sequence[Axis], count: int, seed: int) -> list[Point]:
    """``count`` points, of which each count-th part of every axis holds exactly one (McKay et al. 1979)."""

    def column(axis: Axis) -> Iterator[str]:
        stream = Stream(seed, f"latin/{axis.path}")
        order = np.argsort(stream.child("order").uniforms(0, count), kind="stable")
        shares = (order + stream.child("place").uniforms(0, count)) / count
        return map(axis.at, shares.tolist())

    return list(zip(*(column(axis) for axis in axes), strict=True))


def _listed(values: str) -> list[str]:
    """The values between commas; commas inside brackets do not count."""
    listed, depth = [""], 0
    for sign in values:
        depth += (sign in "[{") - (sign in "]}")
        if sign == "," and not depth:
            listed.append("")
        else:
            listed[-1] += sign
    return [value.strip() for value in listed]


def _range(path: str, text: str) -> Axis | None:
    """The axis of ``low:high`` or ``low:high:log``; None when the text is no range."""
    parts = text.split(":")
    is_log = parts[-1] == "log" and bool(parts.pop())
    try:
        low, high = map(float, parts)
    except ValueError:
        return None
    if not (math.isfinite(low) and math.isfinite(high) and low < high) or (is_log and low <= 0):
        wrong = Problem("a range must go up, with --latin :log from above 0", "--vary", path=path, got=text)
        raise ConfigError(wrong)
    is_whole = all(part.strip().lstrip("+-").isdigit() for part in parts)
    return Axis(path, (), low, high, is_log, is_whole)
