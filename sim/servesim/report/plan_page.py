"""A plan as a page: the answer, prices against latencies, and why the others lost."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from servesim.analysis.plan import Plan
from servesim.analysis.plan_fleet import Candidate
from servesim.report.charts import BLUE, ORANGE, VERMILLION, Figure
from servesim.report.html import figure_page
from servesim.report.plan import HEAD, NOTHING_FOUND, cells, loss, name, notes, per_million, why
from servesim.report.sections import Card, Table
from servesim.report.words import slo_words

__all__ = ["plan_html"]

_GREY = "#7b858e"
_WIDE_ONLY = "wide"  # charts.js leaves such traces out on a narrow screen


def plan_html(plan: Plan) -> str:
    """The plan as one offline page."""
    scenario, question = plan.scenario.scenario, plan.question
    ranked = [one for one in plan.candidates if one.rank]
    lost = [one for one in plan.candidates if not one.rank]
    asked = [scenario.model, f"{question.rate_per_s:g} req/s", *slo_words(scenario.slo)]
    if question.budget_usd_per_hour is not None:
        asked.append(f"at most ${question.budget_usd_per_hour:,.0f}/h")
    rows = ((f"{one.rank}. {_unbroken(one)}", *cells(plan, one)[1:]) for one in ranked)
    return figure_page(
        "plan.html.j2",
        {"pareto": _pareto(plan)} if any(one.fleet for one in plan.candidates) else {},
        title=f"{scenario.name}: plan",
        subtitle=", ".join(asked).replace("<=", "≤"),
        answer=f"{why(ranked[0])}" if ranked else NOTHING_FOUND,
        cards=tuple(_cards(plan, ranked[0])) if ranked else (),
        ranking=Table("Ranking", HEAD, tuple(tuple(cell.replace("+-", "±") for cell in row) for row in rows)),
        lost=Table(
            "Not ranked", ("Replica", "Why"), tuple((_unbroken(one), loss(one)) for one in lost), "words"
        ),
        notes=tuple(notes(plan)),
    )


def _cards(plan: Plan, best: Candidate) -> Iterator[Card]:
    assert best.fleet is not None
    count, rate = best.fleet.replicas, plan.question.rate_per_s
    replicas = "1 replica" if count == 1 else f"{count:,} replicas"
    yield Card(
        "Buy", f"{count * best.gpus_per_replica:,}", "GPUs", f"{best.gpu}, {replicas} of {_unbroken(best)}"
    )
    if best.usd_per_hour is not None:
        million = per_million(plan, best.usd_per_hour)
        yield Card("Price", f"{best.usd_per_hour:,.2f}", "$/h", f"${million:.2f} per million output tokens")
    low, high = best.breaks_at_per_s or (math.nan, math.nan)
    if math.isfinite(high):
        percent = ((low + high) / 2 / rate - 1) * 100
        yield Card("Headroom", f"{percent:.0f}", "%", f"the SLO breaks at {(low + high) / 2:.1f} req/s")
    if best.constraint:
        latency, _, cause = best.constraint.partition(": ")
        yield Card("Breaks first", cause, "", f"it makes the P99 of {latency}")


def _pareto(plan: Plan) -> Figure:
    """Price against the worst P99, as a share of its limit: of every smallest fleet that keeps the SLO."""
    found = sorted((one for one in plan.candidates if one.fleet), key=lambda one: one.weight)
    ranked, others = [one for one in found if one.rank], [one for one in found if not one.rank]
    front = [one for place, one in enumerate(found) if all(_worst(one) < _worst(o) for o in found[:place])]
    data: list[dict[str, Any]] = []
    if len(front) > 1:
        line = {"color": _GREY, "width": 1.5, "shape": "hv", "dash": "4px,3px"}
        data.append({**_points(front), "name": "Nothing cheaper is faster", "mode": "lines", "line": line})
        data[0]["hoverinfo"] = "skip"
    if ranked:
        data.append({
            **_points(ranked), "name": "Ranked", "mode": "markers+text", "text": [one.rank for one in ranked],
            "marker": {"color": BLUE, "size": 22}, "textfont": {"color": "#fff"},
        })  # fmt: skip
    if others:
        data.append({
            **_points(others), "name": "One trial only", "mode": "markers",
            "marker": {"color": ORANGE, "size": 12},
        })  # fmt: skip
    # The line comes to its points from above; labels of the others do not meet.
    beside = (one for one in found if one not in front)
    above = {id(one): place % 2 == 0 for place, one in enumerate(beside)}
    data.append({
        **_points(found), "meta": _WIDE_ONLY, "showlegend": False, "mode": "markers+text",
        "text": [_label(one) for one in found], "marker": {"opacity": 0, "size": 22}, "hoverinfo": "skip",
        "textposition": ["top center" if above.get(id(one)) else "bottom center" for one in found],
    })  # fmt: skip
    return {"data": data, "layout": _layout(found)}


def _layout(found: list[Candidate]) -> dict[str, Any]:
    weights = [one.weight for one in found]
    room = 0.12 * (max(weights) - min(weights)) or 0.1 * weights[0]
    priced = all(one.usd_per_replica_hour is not None for one in found)
    line = {"color": VERMILLION, "width": 1.5, "dash": "dot"}
    limit = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": 100, "y1": 100, "line": line}
    return {
        "xaxis": {
            "title": {"text": "Price of the fleet ($/h)" if priced else "GPUs"},
            "range": [min(weights) - room, max(weights) + room],
        },
        "yaxis": {"title": {"text": "Worst P99 over its limit (%)"}, "range": [0, 112]},
        "hovermode": "closest",
        "shapes": [limit],
        "annotations": [{
            "xref": "paper", "x": 0, "y": 100, "xanchor": "left", "yanchor": "bottom", "text": "SLO",
            "showarrow": False, "font": {"color": VERMILLION},
        }],
    }  # fmt: skip


def _points(of: list[Candidate]) -> dict[str, Any]:
    return {
        "type": "scatter",
        "x": [one.weight for one in of],
        "y": [_worst(one) * 100 for one in of],
        "customdata": [_label(one) for one in of],
        "cliponaxis": False,
        "hovertemplate": "%{customdata}: %{x:,.2f}, %{y:.0f} %<extra></extra>",
    }


def _unbroken(one: Candidate) -> str:
    return name(one).replace("TP ", "TP\N{NO-BREAK SPACE}")


def _label(one: Candidate) -> str:
    assert one.fleet is not None
    return f"{one.fleet.replicas} × {name(one)}"


def _worst(one: Candidate) -> float:
    assert one.fleet is not None
    return one.fleet.attained
