"""Replications as pages: where the warm-up ends, every figure with its interval, differences of two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from servesim.analysis.replications import Estimate, PairedEstimate, Replications
from servesim.report.charts import BLUE, VERMILLION, Figure
from servesim.report.html import figure_page
from servesim.report.replicated import paired_notes, replications_about, replications_notes
from servesim.report.sections import Table
from servesim.report.words import figure_text, percent

__all__ = ["paired_html", "replicated_html"]

_GREY = "#8c949e"
_STYLES = ({"color": BLUE, "width": 2}, {"color": VERMILLION, "width": 2, "dash": "5px,3px"})


def replicated_html(found: Replications) -> str:
    """One scenario."""
    name = found.scenario.scenario.name
    return figure_page(
        "replicated.html.j2",
        _warm_ups({name: found}),
        over="servesim replications",
        title=name,
        subtitle=". ".join(replications_about(found, "")),
        notes=tuple(replications_notes(found)),
        tables=_tables(found.estimates(), ("Mean", "±", "Relative"), _estimate_cells),
        compared=False,
    )


def paired_html(a: Replications, b: Replications, differences: Sequence[PairedEstimate]) -> str:
    """Two scenarios, the differences b - a."""
    names = [f"{letter}: {one.scenario.scenario.name}" for letter, one in (("A", a), ("B", b))]
    return figure_page(
        "replicated.html.j2",
        {"differences": _forest(differences), **_warm_ups(dict(zip(names, (a, b), strict=True)))},
        over="servesim comparison",
        title=" against ".join(one.scenario.scenario.name for one in (a, b)),
        subtitle=". ".join(replications_about(a, "")),
        notes=paired_notes(a, b),
        tables=_tables(differences, ("A", "B", "B - A", "±", "Verdict"), _difference_cells),
        compared=True,
    )


def _warm_ups(named: Mapping[str, Replications]) -> dict[str, Figure]:
    """Welch's plots: the mean queue and the mean KV use over time, with the cut as a line."""
    figures = {}
    for key, title in (("waiting", "Waiting requests"), ("kv_tokens", "KV slots of live requests")):
        data: list[dict[str, Any]] = []
        shapes = []
        for (name, found), style in zip(named.items(), _STYLES, strict=False):
            if found.load is None:
                continue
            values = getattr(found.load, key)
            step_s = found.load.end_s / len(values)
            data.append(
                {
                    "type": "scatter",
                    "mode": "lines",
                    "name": name,
                    "x": [float(f"{(i + 0.5) * step_s:.5g}") for i in range(len(values))],
                    "y": [float(f"{value:.5g}") for value in values.tolist()],
                    "line": style,
                    "hovertemplate": "%{y:,.4~g}",
                }
            )
            if found.warm_up_s:
                line = {"color": style["color"], "width": 1.5, "dash": "dot"}
                shapes.append(
                    {"type": "line", "x0": found.warm_up_s, "x1": found.warm_up_s, "y0": 0, "y1": 1}
                    | {"yref": "paper", "line": line}
                )
        if data:
            layout = {
                "xaxis": {"title": {"text": "Simulated time (s)"}, "rangemode": "tozero"},
                "yaxis": {"title": {"text": title}, "rangemode": "tozero"},
                "hovermode": "x unified",
                "showlegend": len(data) > 1,
                "shapes": shapes,
            }
            figures[f"warm-up-{key}"] = {"data": data, "layout": layout}
    return figures


def _forest(differences: Sequence[PairedEstimate]) -> Figure:
    """What users feel, in percent of A with its interval; grey where it may be zero."""
    groups = ("Throughput", "Cost", "Latency")
    shown = [
        one
        for one in reversed(differences)
        if one.quantity.group in groups and one.difference and one.a and one.a.value
    ]
    data = [
        _points("May be zero", [one for one in shown if not one.is_told_apart], _GREY),
        _points("Told apart", [one for one in shown if one.is_told_apart], BLUE),
    ]
    layout = {
        "xaxis": {"title": {"text": "B - A, in percent of A"}, "zeroline": True},
        "yaxis": {
            "categoryorder": "array",
            "categoryarray": [one.quantity.label for one in shown],
            "range": [-0.7, len(shown) - 0.3],
            "dtick": 1,
        },
        "hovermode": "closest",
    }
    return {"data": data, "layout": layout}


def _points(name: str, estimates: Sequence[PairedEstimate], colour: str) -> dict[str, Any]:
    x, half = [], []
    for one in estimates:
        assert one.difference is not None
        assert one.a is not None
        x.append(float(f"{100 * one.difference.value / abs(one.a.value):.4g}"))
        half.append(float(f"{100 * one.difference.half_width / abs(one.a.value):.4g}"))
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": x,
        "y": [one.quantity.label for one in estimates],
        "error_x": {"type": "data", "array": half, "thickness": 1.4, "width": 3, "color": colour},
        "marker": {"color": colour, "size": 8},
        "hovertemplate": "%{y}: %{x:+.3~g} %<extra></extra>",
    }


def _tables(estimates: Sequence[Any], head: tuple[str, ...], cells: Any) -> tuple[Table, ...]:
    groups: dict[str, list[tuple[str, ...]]] = {}
    for one in estimates:
        groups.setdefault(one.quantity.group, []).append((one.quantity.label, *cells(one)))
    return tuple(Table(group, (group, *head), tuple(rows)) for group, rows in groups.items())


def _estimate_cells(one: Estimate) -> tuple[str, ...]:
    if one.interval is None:
        return "n/a", "", one.refused
    relative = percent(one.interval.relative, 1) + (" wide" if one.interval.is_wide else "")
    return figure_text(one.interval.value), figure_text(one.interval.half_width), relative


def _difference_cells(one: PairedEstimate) -> tuple[str, ...]:
    a, b = (figure_text(each.value) if each else "n/a" for each in (one.a, one.b))
    if one.difference is None:
        return a, b, "", "", one.refused
    of = one.difference
    verdict = "not told apart" if of.is_zero_inside else "B > A" if of.low > 0 else "B < A"
    if not of.value and not of.half_width:
        verdict = "same"
    return a, b, figure_text(of.value), figure_text(of.half_width), verdict
