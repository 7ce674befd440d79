"""The parts of latencies as stacked bars, and as a section of the report of a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from servesim.analysis.attribution import PARTS, Attribution
from servesim.analysis.tails import slow_and_usual
from servesim.report.charts import Figure
from servesim.report.explain_words import PART_COLOURS, PART_LABELS
from servesim.report.sections import Table
from servesim.units import format_seconds

__all__ = ["latency_parts", "part_bars"]

_SHOWN = 1e-3  # share of a latency below which a part is left out
Means = Mapping[str, float]


def part_bars(rows: Mapping[str, Means], names: Sequence[str], latency: str, unit: str) -> Figure:
    """Stacked bars by part, the last row on top; ``names``: the parts to show."""
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "name": PART_LABELS[name],
            "y": list(rows),
            "x": [float(f"{max(means[name], 0.0):.4g}") for means in rows.values()],
            "marker": {"color": PART_COLOURS[name]},
            "hovertemplate": f"%{{y}}: %{{x:,.4~g}} {unit}<extra>{PART_LABELS[name]}</extra>",
        }
        for name in names
    ]
    layout = {
        "barmode": "stack",
        "bargap": 0.4,
        "xaxis": {"title": {"text": f"{latency} ({unit})"}, "zeroline": True},
        "yaxis": {"showgrid": False},
        "hovermode": "closest",
        "legend": {"traceorder": "normal"},
    }
    return {"data": data, "layout": layout}


def latency_parts(of: Attribution) -> tuple[Figure, Table] | None:
    """Where the time of the typical and of the slowest requests goes; None when none completed."""
    if not len(of.index):
        return None
    columns = dict(_columns(of))
    names = [
        name for name in PARTS if any(one[name] > _SHOWN * sum(one.values()) for one in columns.values())
    ]
    shares = {
        label: {name: 100 * value / sum(means.values()) for name, value in means.items()}
        for label, means in reversed(columns.items())
    }
    rows = [(PART_LABELS[name], *(format_seconds(one[name]) for one in columns.values())) for name in names]
    rows.append(("Sum", *(format_seconds(sum(one.values())) for one in columns.values())))
    table = Table("Where the time goes, mean per request", ("Part", *columns), tuple(rows))
    return part_bars(shares, names, "Share of the latency", "%"), table


def _columns(of: Attribution) -> Iterator[tuple[str, Means]]:
    """Means by what is looked at."""
    for metric in ("ttft", "e2e"):
        tail, typical = slow_and_usual(of, metric)
        yield f"{metric.upper()}, typical", of.means(metric, typical)
        yield f"{metric.upper()}, tail", of.means(metric, tail)
