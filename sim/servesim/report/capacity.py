"""How much traffic a scenario takes, as text, JSON and page."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

from servesim.analysis.capacity import Decision
from servesim.analysis.capacity_study import CapacityStudy
from servesim.report.charts import BLUE, ORANGE, VERMILLION, Figure
from servesim.report.html import figure_page
from servesim.report.sections import Card, Table
from servesim.report.words import slo_words

__all__ = ["capacity_html", "capacity_json", "capacity_text"]

_WIDTH = 86
_HEAD = ("Rate (req/s)", "of the scenario's", "Trials", "Worst P99 / limit", "Verdict")
_WIDTHS = (14, 20, 9, 24)
_COLOURS = {"kept": BLUE, "undecided": ORANGE, "missed": VERMILLION}
_TICKS = [ones * 10**power for power in range(7) for ones in (1, 2, 5)]
_MEANING = (
    "Kept, missed: the mean of the worst P99 over its limit is surely (95 %) below, surely above 100 %.",
    "A queue that grows to the end is a miss, too. Undecided: all trials together do not tell.",
)


def capacity_text(of: CapacityStudy) -> str:
    """The answer, then the rates that were tried."""
    lines = [f"{' Capacity ':=^{_WIDTH}}", f"{of.scenario.scenario.name}: {_about(of)}", *_answer(of)]
    lines.append(f"{_HEAD[0]:<14}" + _row(_HEAD[1:]))
    lines += [f"{row[0]:<14}" + _row(row[1:]) for row in _rows(of)]
    lines += ["=" * _WIDTH, *_MEANING]
    return "\n".join(lines) + "\n"


def _row(cells: tuple[str, ...]) -> str:
    aligned = [f"{cell:>{width}}" for cell, width in zip(cells[:-1], _WIDTHS[1:], strict=True)]
    return "".join((*aligned, "  ", cells[-1]))


def _about(of: CapacityStudy) -> str:
    scenario, gpu = of.scenario.scenario, of.analytic.prepared.gpu
    engine, replicas = of.analytic.prepared.engine, scenario.hardware.replicas
    num_gpus = engine.tensor_parallel_size * engine.pipeline_parallel_size * replicas
    fleet = "" if replicas == 1 else f" in {replicas:,} replicas"
    return f"{scenario.model} on {num_gpus:,} x {gpu.name}{fleet}, {', '.join(slo_words(scenario.slo))}"


def _answer(of: CapacityStudy) -> Iterator[str]:
    low, high = (end * of.rate_per_s for end in (of.bracket.low, of.bracket.high))
    if low and math.isfinite(high):
        times = f"{of.bracket.low:.3g} times this traffic"
        yield f"It takes {low:.3g} req/s, {times}; at {high:.3g} req/s the SLO is missed."
    else:
        rates = [one.rate * of.rate_per_s for one in of.bracket.decisions]
        tried = f"{min(rates):.3g} to {max(rates):.3g} req/s were tried"
        kept = f"kept up to {low:.3g} req/s" if low else "surely kept at no rate"
        missed = "surely missed at no rate" if math.isinf(high) else f"missed from {high:.3g} req/s on"
        yield f"The SLO is {kept}, and {missed}; {tried}."
    if of.constraint:
        yield f"What breaks first: {of.constraint}."


def _rows(of: CapacityStudy) -> Iterator[tuple[str, ...]]:
    for one in sorted(of.bracket.decisions, key=lambda one: one.rate):
        worst = f"{one.interval.value:.0%} +- {one.interval.half_width:.0%}"
        rate = f"{one.rate * of.rate_per_s:.3g}"
        yield rate, f"x {one.rate:.2f}", str(one.interval.count), worst, one.verdict


def capacity_json(of: CapacityStudy) -> str:
    """The bracket and every rate tried."""
    scenario = of.scenario.scenario
    found = {
        "label": scenario.name,
        "model": scenario.model,
        "slo": scenario.slo.model_dump(mode="json"),
        "rate_per_s": of.rate_per_s,
        "kept_up_to_per_s": _finite(of.bracket.low * of.rate_per_s) or None,
        "missed_from_per_s": _finite(of.bracket.high * of.rate_per_s),
        "first_constraint": of.constraint or None,
        "rates": [_rate(of, one) for one in sorted(of.bracket.decisions, key=lambda one: one.rate)],
        "provenance": {"servesim": version("servesim"), "seed": scenario.seed},
    }
    return json.dumps(found, indent=2, allow_nan=False) + "\n"


def _rate(of: CapacityStudy, one: Decision) -> dict[str, Any]:
    return {
        "rate_per_s": one.rate * of.rate_per_s,
        "factor": one.rate,
        "trials": one.interval.count,
        "attained": {"mean": one.interval.value, "low": one.interval.low, "high": one.interval.high},
        "verdict": one.verdict,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


# ---- the page --------------------------------------------------------------------------------------


def capacity_html(of: CapacityStudy) -> str:
    """The study as one offline page."""
    rows = tuple(tuple(cell.replace("+-", "±") for cell in row) for row in _rows(of))
    return figure_page(
        "capacity.html.j2",
        {"rates": _chart(of)},
        title=f"{of.scenario.scenario.name}: capacity",
        subtitle=_about(of).replace("<=", "≤").replace(" x ", " × "),
        cards=tuple(_cards(of)),
        answer=tuple(_answer(of)),
        rates=Table("Rates tried", _HEAD, rows),
        meaning=" ".join(_MEANING),
    )


def _cards(of: CapacityStudy) -> Iterator[Card]:
    low, high = of.bracket.low, of.bracket.high
    if not low or math.isinf(high):
        return
    missed = f"the SLO is missed at {high * of.rate_per_s:.3g}"
    yield Card("It takes", f"{low * of.rate_per_s:.3g}", "req/s", missed)
    yield Card("Of this traffic", f"{low:.3g}", "times", f"the scenario brings {of.rate_per_s:.3g} req/s")
    if of.constraint:
        latency, _, cause = of.constraint.partition(": ")
        yield Card("Breaks first", cause, "", f"it makes the P99 of {latency}")


def _chart(of: CapacityStudy) -> Figure:
    """The worst P99 over its limit against the rate, with intervals."""
    data, decisions = list[dict[str, Any]](), of.bracket.decisions
    bottom = 50 * min(1.0, *(one.interval.value for one in decisions))
    top = 130 * max(1.0, *(one.interval.high for one in decisions))
    for verdict, colour in _COLOURS.items():
        found = [one for one in decisions if one.verdict == verdict]
        if not found:
            continue
        below = [one.interval.value * 100 - max(bottom, one.interval.low * 100) for one in found]
        above = [one.interval.half_width * 100 for one in found]
        data.append({
            "type": "scatter", "mode": "markers", "name": verdict.capitalize(),
            "x": [one.rate * of.rate_per_s for one in found],
            "y": [one.interval.value * 100 for one in found],
            "error_y": {"symmetric": False, "array": above, "arrayminus": below, "thickness": 1.2},
            "marker": {"color": colour, "size": 10},
            "hovertemplate": "%{x:.3g} req/s: %{y:.0f} %<extra></extra>",
        })  # fmt: skip
    line = {"color": VERMILLION, "width": 1.5, "dash": "dot"}
    limit = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": 100, "y1": 100, "line": line}
    layout = {
        "xaxis": {"title": {"text": "Requests per second"}},
        "yaxis": {
            "title": {"text": "Worst P99 over its limit (%)"},
            "type": "log",
            "range": [math.log10(bottom), math.log10(top)],
            "tickvals": _TICKS,
            "tickformat": ",",
        },
        "hovermode": "closest",
        "shapes": [limit],
    }
    return {"data": data, "layout": layout}
