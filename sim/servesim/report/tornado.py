"""The tornado: what moving each input down and up does to one figure, the largest effect on top."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from servesim.analysis.intervals import Interval
from servesim.analysis.sensitivity import Effect
from servesim.report.charts import BLUE, ORANGE, Figure
from servesim.report.words import percent

__all__ = ["tornado"]


def tornado(effects: Sequence[Effect], change: float) -> Figure:
    """Two bars per input with the intervals of the paired changes, in percent of the figure."""
    ordered = [one for one in reversed(effects) if one.swing > 0]
    names = [one.input.label for one in ordered]
    data = [
        _bars(f"Input -{percent(change)}", names, [one.down for one in ordered], ORANGE),
        _bars(f"Input +{percent(change)}", names, [one.up for one in ordered], BLUE),
    ]
    layout = {
        "barmode": "overlay",
        "bargap": 0.35,
        "xaxis": {"title": {"text": "Change of the figure (%)"}, "zeroline": True, "ticksuffix": ""},
        "yaxis": {"showgrid": False},
        "hovermode": "closest",
    }
    return {"data": data, "layout": layout}


def _bars(name: str, names: Sequence[str], changes: Sequence[Interval | None], colour: str) -> dict[str, Any]:
    known = [(label, one) for label, one in zip(names, changes, strict=True) if one is not None]
    return {
        "type": "bar",
        "orientation": "h",
        "name": name,
        "y": [label for label, _ in known],
        "x": [_points(one.value) for _, one in known],
        "error_x": {
            "type": "data",
            "array": [_points(one.half_width) for _, one in known],
            "color": "#7b858e",
            "thickness": 1.2,
            "width": 3,
        },
        "marker": {"color": colour, "opacity": 0.85},
        "hovertemplate": "%{y}: %{x:+.2f} %<extra></extra>",
    }


def _points(share: float) -> float:
    return float(f"{share * 100:.4g}")
