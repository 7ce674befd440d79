"""Several results side by side, as text, JSON and tables: finished reports and fresh simulations alike."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from string import ascii_uppercase

from servesim.analysis.finished import Finished, Row, compare_finished, fragmentation_rows, other_traffic
from servesim.analysis.timeline import KV_CLASSES
from servesim.report import charts
from servesim.report.as_json import plain, warnings_json
from servesim.report.html import figure_page
from servesim.report.sections import Table

__all__ = ["finished_html", "finished_json", "finished_text", "fragmentation_text", "traffic_text"]

_LABEL, _COLUMN = 34, 15


def finished_text(results: Sequence[Finished]) -> str:
    """One table of all figures, a column for each result."""
    width = _LABEL + _COLUMN * len(results)
    lines = [f"{' Comparison ':=^{width}}"]
    letters = ascii_uppercase[: len(results)]
    lines += [f"{letter}: {one.name}" for letter, one in zip(letters, results, strict=True)]
    lines.append(" " * _LABEL + "".join(f"{letter:>{_COLUMN}}" for letter in letters))
    lines += [*_lines(compare_finished(results), width), "=" * width]
    return "\n".join(lines) + "\n" + traffic_text(results)


def traffic_text(results: Sequence[Finished]) -> str:
    """A line for each result that served other requests than the first one."""
    return "".join(f"Warning: {warned}\n" for warned in other_traffic(results))


def fragmentation_text(results: Sequence[Finished]) -> str:
    """Only what the memory was used for: the part that the comparison of two runs adds."""
    width = _LABEL + _COLUMN * len(results)
    return "\n".join(_lines(fragmentation_rows(results), width)) + "\n"


def finished_json(results: Sequence[Finished]) -> str:
    """The results by letter, and every row of the table."""
    letters = ascii_uppercase[: len(results)]
    value = {
        "results": {letter: dict(one.result) for letter, one in zip(letters, results, strict=True)},
        "rows": [asdict(row) for row in compare_finished(results)],
        "warnings": warnings_json(other_traffic(results)),
    }
    return json.dumps(plain(value), indent=2, allow_nan=False) + "\n"


def finished_html(results: Sequence[Finished]) -> str:
    """The tables and the shares of the pools as one offline page."""
    names = [f"{letter}: {one.name}" for letter, one in zip(ascii_uppercase, results, strict=False)]
    named = list(zip(names, results, strict=True))
    groups: dict[str, list[tuple[str, ...]]] = {}
    for row in compare_finished(results):
        groups.setdefault(row.group, []).append((row.label, *(_number(value) for value in row.values)))
    letters = ascii_uppercase[: len(results)]
    tables = [Table(group, (group, *letters), tuple(rows)) for group, rows in groups.items()]
    pools = {name: (_shares(one, "mean_share"), _shares(one, "mean_share_in_queue")) for name, one in named}
    return figure_page(
        "finished.html.j2",
        {"kv-bars": charts.pool_bars(pools)},
        title=" against ".join(one.name for one in results),
        names=names,
        warnings=other_traffic(results),
        tables=tables,
    )


def _shares(one: Finished, key: str) -> dict[str, float]:
    """Shares by class; a class that an older result does not know is 0."""
    shares = {name: one.figure(f"kv_cache.{key}.{name}") for name in KV_CLASSES}
    if math.isnan(shares["tokens"]):
        return shares
    return {name: 0.0 if math.isnan(share) else share for name, share in shares.items()}


def _lines(rows: Sequence[Row], width: int) -> list[str]:
    lines, group = [], ""
    for row in rows:
        if row.group != group:
            group = row.group
            lines.append(f"{f' {group} ':-^{width}}")
        lines.append(f"{row.label:<{_LABEL}}" + "".join(f"{_number(v):>{_COLUMN}}" for v in row.values))
    return lines


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "n/a" if math.isnan(value) else "inf"
    return f"{value:,.0f}" if value.is_integer() else f"{value:,.2f}" if value >= 0.1 else f"{value:.3f}"
