"""An explanation as one offline page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from servesim.analysis.explain import Explanation
from servesim.analysis.explain_trials import Figures, Trial
from servesim.report.charts import Figure
from servesim.report.explain import (
    about,
    by_change,
    caveats,
    effect,
    label_of,
    moving,
    not_tried,
    part_rows,
    percent,
    price_text,
    shown_parts,
    slowest_replica,
)
from servesim.report.explain_words import CAUSE_WORDS, PART_COLOURS, PART_LABELS
from servesim.report.html import figure_page
from servesim.report.sections import Table
from servesim.units import format_seconds

__all__ = ["explanation_html", "part_bars"]

_SHORT_S = 2.0  # below, bars are in milliseconds


def explanation_html(of: Explanation) -> str:
    """The explanation as one offline page."""
    matter, meaning, advice = CAUSE_WORDS[of.cause]
    head = ("", "P99 TTFT", "P99 TPOT", "P99 E2E", "Change")
    bars = {"Tail": of.means(of.tail), "Mean": of.means(), "Typical": of.means(of.typical)}
    return figure_page(
        "explain.html.j2",
        {"parts": part_bars(bars, shown_parts(of), of.metric.upper())},
        title=f"Why P99 {of.metric.upper()} is {format_seconds(of.value_s)}",
        subtitle=about(of),
        matter=matter,
        meaning=meaning,
        advice=advice,
        recommended=tuple((one.kind, one.label, effect(of, one)) for one in of.recommended),
        replica=next(slowest_replica(of), ""),
        parts=Table("Parts", ("Mean per request", "All", "Tail", "Of the tail"), tuple(part_rows(of))),
        relaxations=Table("Relaxed", head, tuple(_table(of, by_change(of)))),
        remedies=Table("Remedies", (*head, "$/h"), tuple(_priced(of, moving(of)))),
        notes=(*not_tried(of), *caveats(of)),
    )


def _table(of: Explanation, trials: Sequence[Trial]) -> Iterator[tuple[str, ...]]:
    yield ("as it is", *_cells(of.figures), "")
    for one in trials:
        assert one.figures is not None
        yield (label_of(one), *_cells(one.figures), percent(one.change(of.metric, of.figures)))


def _priced(of: Explanation, trials: Sequence[Trial]) -> Iterator[tuple[str, ...]]:
    prices = [of.usd_per_hour, *(one.usd_per_hour for one in trials)]
    for row, usd_per_hour in zip(_table(of, trials), prices, strict=True):
        yield (*row, price_text(usd_per_hour))


def _cells(of: Figures) -> tuple[str, str, str]:
    return format_seconds(of.ttft), format_seconds(of.tpot), format_seconds(of.e2e)


def part_bars(rows: Mapping[str, Mapping[str, float]], names: Sequence[str], latency: str) -> Figure:
    """Stacked bars of seconds by part, the last row on top; ``names``: the parts to show."""
    in_ms = max(sum(means.values()) for means in rows.values()) < _SHORT_S
    factor, unit = (1e3, "ms") if in_ms else (1.0, "s")
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "name": PART_LABELS[name],
            "y": list(rows),
            "x": [float(f"{max(means[name], 0.0) * factor:.4g}") for means in rows.values()],
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
