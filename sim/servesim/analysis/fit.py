"""Least squares on a simulation, and which of its parameters the data can tell at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Fit", "fit_identified"]

Floats = NDArray[np.float64]
Values = dict[str, float]
Residuals = Callable[[Values], Floats]
Limits = dict[str, tuple[float, float]]

_STEP = 0.05  # of a parameter, for its slope: well above the steps that a schedule makes
_ITERATIONS = 8
_SMALLEST_NOISE = 0.01  # no recording repeats itself closer than one percent
_LEAST_EFFECT = 0.01  # change of the residuals, root mean square, when a parameter is halved or doubled
_WORTH_ADDING = 10.0  # fall of the squared residuals over their noise, as for a parameter 3 errors off 0
_AS_GOOD = 1.5  # squared residuals by which a preferred parameter may be worse than another
_WIDEST = 0.15  # standard error that still counts as told: 15 percent
_CLEAR = 3.0  # a single parameter is also told, up to 30 percent, this many standard errors away from 0
_ALIKE = 0.9  # cosine between the effects of two parameters


@dataclass(frozen=True, slots=True)
class Fit:
    """Parameters in units in which 0.1 is about ten percent, 0 where nothing was changed."""

    values: Values
    standard_errors: Values
    """Of the parameters that were fitted."""
    untold: dict[str, tuple[str, str]]
    """The others: why (``still``, ``alike``, ``needless`` or ``vague``), and the one it is alike to."""
    residuals: Floats


@dataclass(frozen=True, slots=True)
class _Point:
    values: Values
    residuals: Floats
    jacobian: Floats

    @property
    def loss(self) -> float:
        return float(self.residuals @ self.residuals)


def fit_identified(residuals: Residuals, names: Sequence[str], limits: Limits) -> Fit:
    """The least-squares values of those of ``names`` that the residuals can tell, the first ones preferred.

    ``residuals`` takes a value for every name and returns one number per observation. Parameters join one by
    one, the one that explains most first, as long as each explains clearly more than noise. One stays at 0
    when moving it moves nothing (``still``), when what it would explain is explained by another that moves
    the same observations (``alike``) or already (``needless``), or when its standard error is too wide
    (``vague``).
    """
    start = dict.fromkeys(names, 0.0)
    at_start = residuals(start)
    slopes = dict(zip(names, _jacobian(residuals, names, start, at_start, limits).T, strict=True))
    untold = {
        name: ("still", "")
        for name in names
        if all(_size(residuals(far) - at_start) < _LEAST_EFFECT for far in _far(start, name, limits))
    }
    chosen: list[str] = []
    best = _Point(start, at_start, np.empty((len(at_start), 0)))
    while rest := [name for name in names if name not in chosen and name not in untold]:
        tried = {}
        for (
            name
        ) in rest:  # a schedule makes the way rugged: from the best of a few points, and from the begin
            scanned = [best.values, *_far(best.values, name, limits)]
            near = min(scanned, key=lambda values: float(np.sum(residuals(values) ** 2)))
            begins = [near] if near == start else [near, start]
            ways = [_least_squares(residuals, begin, [*chosen, name], limits) for begin in begins]
            tried[name] = min(ways, key=lambda point: point.loss)
        least = min(point.loss for point in tried.values())
        name = next(each for each in rest if tried[each].loss <= _AS_GOOD * least)
        if not _is_worth(best, tried[name]):
            untold.update({each: _why(each, chosen, slopes) for each in rest})
            break
        chosen.append(name)
        best = tried[name]
    while chosen:
        errors = _standard_errors(best)
        vague = _vague(chosen, errors, best.values, limits)
        if vague is None:
            return Fit(best.values, dict(zip(chosen, errors, strict=True)), untold, best.residuals)
        untold[vague] = ("vague", "")
        chosen.remove(vague)
        best = _least_squares(residuals, start, chosen, limits) if chosen else best
    return Fit(start, {}, untold, at_start)


def _far(values: Values, name: str, limits: Limits) -> list[Values]:
    """The same point with one parameter halved, quartered and doubled, as far as its limits go."""
    moved = (float(np.clip(values[name] + change, *limits[name])) for change in (-0.7, -1.4, 0.7))
    return [{**values, name: value} for value in moved]


def _size(residuals: Floats) -> float:
    return float(np.sqrt(np.mean(residuals**2)))


def _is_worth(before: _Point, after: _Point) -> bool:
    freedom = max(len(after.residuals) - after.jacobian.shape[1], 1)
    noise = max(after.loss / freedom, _SMALLEST_NOISE**2)
    return bool((before.loss - after.loss) / noise > _WORTH_ADDING)


def _why(name: str, chosen: Sequence[str], slopes: dict[str, Floats]) -> tuple[str, str]:
    """Why a parameter did not join: another of the chosen ones does the same, or nothing is left for it."""
    likeness = {other: abs(_cosine(slopes[name], slopes[other])) for other in chosen}
    other = max(likeness, key=lambda each: likeness[each], default="")
    return ("alike", other) if other and likeness[other] > _ALIKE else ("needless", "")


def _cosine(a: Floats, b: Floats) -> float:
    return float(a @ b) / max(float(np.linalg.norm(a) * np.linalg.norm(b)), 1e-12)


def _least_squares(residuals: Residuals, start: Values, active: Sequence[str], limits: Limits) -> _Point:
    """Levenberg's method over the ``active`` parameters."""
    values, damping = dict(start), 0.01
    now = residuals(values)
    jacobian = _jacobian(residuals, active, values, now, limits)
    for _ in range(_ITERATIONS):
        normal = jacobian.T @ jacobian
        step = np.linalg.solve(normal + damping * np.diag(np.diag(normal) + 1e-9), -jacobian.T @ now)
        tried = dict(values)
        for name, change in zip(active, step.tolist(), strict=True):
            tried[name] = float(np.clip(values[name] + change, *limits[name]))
        new = residuals(tried)
        if float(new @ new) >= float(now @ now):
            damping *= 8
            if damping > 10:
                break
            continue
        gained = float(now @ now) - float(new @ new)
        values, now, damping = tried, new, damping / 4
        jacobian = _jacobian(residuals, active, values, now, limits)
        if gained < 1e-3 * float(now @ now) or float(now @ now) < 1e-12:
            break
    return _Point(values, now, jacobian)


def _jacobian(
    residuals: Residuals, active: Sequence[str], values: Values, now: Floats, limits: Limits
) -> Floats:
    columns = []
    for name in active:
        step = _STEP if values[name] + _STEP <= limits[name][1] else -_STEP
        columns.append((residuals({**values, name: values[name] + step}) - now) / step)
    return np.stack(columns, axis=1)


def _standard_errors(point: _Point) -> list[float]:
    jacobian = point.jacobian
    freedom = max(len(point.residuals) - jacobian.shape[1], 1)
    noise = max(float(np.sqrt(point.loss / freedom)), _SMALLEST_NOISE)
    normal = jacobian.T @ jacobian
    normal += 1e-9 * np.trace(normal) * np.eye(len(normal))  # exactly alike ones get a huge error
    errors: list[float] = (noise * np.sqrt(np.diag(np.linalg.inv(normal)))).tolist()
    return errors


def _vague(chosen: Sequence[str], errors: Sequence[float], values: Values, limits: Limits) -> str | None:
    """The parameter whose error is the widest beyond what is allowed, or that ran into a limit."""
    widest = _WIDEST
    if len(chosen) == 1:
        widest = max(_WIDEST, min(2 * _WIDEST, abs(values[chosen[0]]) / _CLEAR))
    wide = {
        name: error
        for name, error in zip(chosen, errors, strict=True)
        if error > widest or values[name] in limits[name]
    }
    return max(wide, key=lambda name: wide[name]) if wide else None
