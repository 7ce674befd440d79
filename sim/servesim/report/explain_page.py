"""An explanation as one offline page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from servesim.analysis.explain import Explanation
from servesim.analysis.explain_trials import Figures, Trial
from servesim.report.explain import (
    about,
    advised,
    by_change,
    caveats,
    facts,
    label_of,
    moving,
    not_tried,
    part_rows,
    percent,
    price_text,
    shown_parts,
    unadvised,
)
from servesim.report.explain_words import CAUSE_WORDS
from servesim.report.html import figure_page
from servesim.report.latency_parts import part_bars
from servesim.report.sections import Table
from servesim.units import format_seconds

__all__ = ["explanation_html"]

_SHORT_S = 2.0  # below, bars are in milliseconds


def explanation_html(of: Explanation) -> str:
    """The explanation as one offline page."""
    matter, meaning, advice = CAUSE_WORDS[of.cause]
    head = ("", "P99 TTFT", "P99 TPOT", "P99 E2E", "Change")
    rows = {"Tail": of.means(of.tail), "Mean": of.means(), "Typical": of.means(of.typical)}
    in_ms = max(sum(means.values()) for means in rows.values()) < _SHORT_S
    factor, unit = (1e3, "ms") if in_ms else (1.0, "s")
    bars = {label: {name: value * factor for name, value in means.items()} for label, means in rows.items()}
    return figure_page(
        "explain.html.j2",
        {"parts": part_bars(bars, shown_parts(of), of.metric.upper(), unit)},
        title=f"Why P99 {of.metric.upper()} is {format_seconds(of.value_s)}",
        subtitle=about(of),
        matter=matter,
        meaning=meaning,
        advice=advice,
        recommended=tuple(advised(of)),
        unadvised=unadvised(of),
        facts=tuple(facts(of)),
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
