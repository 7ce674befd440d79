"""Hit rate of the prefix cache against its size, as text, JSON and a page."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any

from servesim.analysis.prefix_cache import CachePoint, CacheStudy
from servesim.report.as_json import plain
from servesim.report.charts import BLUE, VERMILLION, Figure
from servesim.report.html import figure_page
from servesim.report.sections import Table
from servesim.units import GIB

__all__ = ["cache_html", "cache_json", "cache_text"]


def cache_text(study: CacheStudy) -> str:
    """A row for each size."""
    table = _table(study)
    widths = [max(len(row[i]) for row in (table.head, *table.rows)) for i in range(len(table.head))]
    lines = [_subject(study)]
    lines += [
        "  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True))
        for row in (table.head, *table.rows)
    ]
    return "\n".join(lines) + "\n"


def cache_json(study: CacheStudy) -> str:
    """All figures; an unbounded size is "inf"."""
    return json.dumps(plain(asdict(study)), indent=2, allow_nan=False) + "\n"


def cache_html(study: CacheStudy) -> str:
    """Curve and table as one offline page."""
    return figure_page(
        "prefix_cache.html.j2",
        {"hit-rate": _curve(study)},
        title=study.name,
        subtitle=_subject(study),
        table_of_sizes=_table(study),
    )


def _subject(study: CacheStudy) -> str:
    return (
        f"{study.name}: {study.num_requests:,} requests, {study.prompt_tokens:,} prompt tokens, "
        f"blocks of {study.block_size}"
    )


def _table(study: CacheStudy) -> Table:
    most = study.points[-1].hit_rate
    rows = tuple(
        (
            _size(point, study),
            "" if math.isinf(point.size_bytes) else f"{point.size_bytes / GIB:,.1f}",
            f"{point.hit_rate * 100:.2f}",
            f"{point.hit_rate / most * 100:.0f}" if most else "n/a",
            f"{point.evicted_blocks:,}",
            f"{point.independent * 100:.2f}",
        )
        for point in study.points
    )
    head = ("Cache (tokens)", "GiB", "Hit rate %", "% of the most", "Evicted blocks", "If independent %")
    return Table("Hit rate against the size of the cache", head, rows)


def _size(point: CachePoint, study: CacheStudy) -> str:
    if math.isinf(point.size_tokens):
        return "unbounded"
    own = "own pool " if point.size_tokens == study.pool_tokens else ""
    return f"{own}{point.size_tokens:,.0f}"


def _curve(study: CacheStudy) -> Figure:
    bounded = study.points[:-1]
    sizes = [point.size_tokens for point in bounded]
    most = study.points[-1].hit_rate * 100
    named = (
        ("Replayed, least recently used first", [p.hit_rate for p in bounded], {"color": BLUE, "width": 2}),
        (
            "If blocks were asked for independently (Che)",
            [p.independent for p in bounded],
            {"color": VERMILLION, "width": 1.5, "dash": "5px,3px"},
        ),
    )
    data: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": name,
            "x": sizes,
            "y": [round(value * 100, 3) for value in values],
            "line": line,
            "hovertemplate": "%{y:.1f} %",
        }
        for name, values, line in named
    ]
    line = {"color": "#8c949e", "width": 1.5, "dash": "dot"}
    layout = {
        "xaxis": {
            "title": {"text": "Size of the cache (tokens)"},
            "type": "log",
            "tickformat": "~s",
            "dtick": "D2",
        },
        "yaxis": {"title": {"text": "Prompt tokens found (%)"}, "rangemode": "tozero"},
        "hovermode": "x unified",
        "shapes": [{"type": "line", "x0": 0, "x1": 1, "xref": "paper", "y0": most, "y1": most, "line": line}],
        "annotations": [
            {
                "x": 0.01,
                "xref": "paper",
                "xanchor": "left",
                "y": most,
                "yanchor": "bottom",
                "text": f"nothing forgotten: {most:.1f} %",
                "showarrow": False,
            }
        ],
    }
    return {"data": data, "layout": layout}
