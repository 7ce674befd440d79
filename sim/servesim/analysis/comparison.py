"""Two results side by side: what changed, and by what factor."""

from __future__ import annotations

import math
from dataclasses import dataclass

from servesim.analysis.quantities import QUANTITIES, value_of
from servesim.analysis.summary import Summary

__all__ = ["Difference", "compare_summaries"]


@dataclass(frozen=True, slots=True)
class Difference:
    """One figure of two runs, in the unit of its label."""

    group: str
    label: str
    a: float
    b: float

    @property
    def ratio(self) -> float:
        """b over a; NaN when a is zero or either is missing."""
        return self.b / self.a if self.a else math.nan

    @property
    def is_share(self) -> bool:
        """A percentage: its difference says more than its ratio."""
        return self.label.endswith("(%)")


def compare_summaries(a: Summary, b: Summary) -> tuple[Difference, ...]:
    """The figures that a comparison shows, in its order; a figure that neither run has is left out."""
    rows = (
        Difference(one.group, one.label, value_of(one, a), value_of(one, b)) for one in QUANTITIES.values()
    )
    return tuple(row for row in rows if not (math.isnan(row.a) and math.isnan(row.b)))
