"""The rate at which something turns from kept to missed, by bisection on verdicts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

__all__ = ["Verdict", "turning_rate"]

Verdict = Literal["kept", "missed", "undecided"]

_MOST_STEPS = 12  # away from the start, in either direction


def turning_rate(
    verdict: Callable[[float], Verdict], start: float, width: float, *, step: float = 2.0, most: int = 1000
) -> tuple[float, float]:
    """The highest rate that is surely kept and the lowest that is surely missed, as close as ``width``.

    0 and infinity where none was found; what is kept beyond a rate that is missed was luck. ``start`` is any
    rate to begin from, ``step`` the factor by which to leave it, ``most`` how many rates are asked about.
    Where a rate cannot be decided, each side is narrowed alone against the nearest of such.
    """
    known: dict[float, Verdict] = {}

    def ask(rate: float) -> Verdict:
        if rate not in known:
            known[rate] = verdict(rate)
        return known[rate]

    def ends() -> tuple[float, float]:
        high = min((rate for rate, of in known.items() if of == "missed"), default=math.inf)
        kept = (rate for rate, of in known.items() if of == "kept" and rate < high)
        return max(kept, default=0.0), high

    def nearest(wanted: Verdict, decided: float, undecided: float) -> None:
        while abs(math.log(undecided / decided)) > math.log1p(width / 2) and len(known) < most:
            middle = math.sqrt(decided * undecided)
            decided, undecided = (middle, undecided) if ask(middle) == wanted else (decided, middle)

    for factor, wanted in ((step, "missed"), (1 / step, "kept")):
        rate = start
        for _ in range(_MOST_STEPS):
            # What kept already is not looked for again.
            if (wanted == "kept" and ends()[0]) or len(known) >= most or ask(rate) == wanted:
                break
            rate *= factor
    low, high = ends()
    while 0 < low * (1 + width) < high < math.inf and len(known) < most:
        middle = math.sqrt(low * high)
        if ask(middle) == "undecided":
            nearest("kept", low, middle)
            nearest("missed", high, middle)
            return ends()
        low, high = ends()
    return low, high
