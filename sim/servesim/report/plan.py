"""A plan as text and JSON: the ranking, what breaks first, and why the others lost."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

from servesim.analysis.intervals import Interval
from servesim.analysis.plan import Plan
from servesim.analysis.plan_fleet import CHANCE, Candidate, Fleet
from servesim.analysis.plan_trials import LIMITS
from servesim.report.words import slo_words

__all__ = [
    "HEAD",
    "NOTHING_FOUND",
    "cells",
    "loss",
    "name",
    "notes",
    "per_million",
    "plan_json",
    "plan_text",
    "why",
]

_WIDTH = 118
HEAD = (
    "Replica",
    "Replicas",
    "GPUs",
    "$/h",
    "$/M tokens",
    "P99 TTFT (ms)",
    "P99 TPOT (ms)",
    "Breaks at",
    "On",
)
NOTHING_FOUND = (
    "No configuration keeps the SLO. "
    "Other GPUs, more of them in a replica, a looser limit or a larger budget may help."
)
_WIDTHS = (28, 9, 6, 9, 11, 15, 15, 10, 0)
_SHORT_RUN = 0.1  # longest requests over the time of the arrivals from which on there is a warning
_SHORT = {"hardware.gpu": "", "engine.tensor_parallel_size": "TP "}


def plan_text(plan: Plan) -> str:
    """The ranked table, then the configurations that lost."""
    scenario, question = plan.scenario.scenario, plan.question
    asked = (scenario.model, f"{question.rate_per_s:g} req/s", *slo_words(scenario.slo))
    lines = [
        f"{' Plan ':=^{_WIDTH}}",
        f"{scenario.name}: {', '.join(asked)}",
    ]
    if question.budget_usd_per_hour is not None:
        lines.append(f"Budget: ${question.budget_usd_per_hour:,.0f}/h")
    ranked = [one for one in plan.candidates if one.rank]
    if ranked:
        lines.append("     " + _row(HEAD))
    lines += [f"{one.rank:>3}. " + _row(cells(plan, one)) for one in ranked]
    lines += [f"     {why(one)}" for one in ranked[:1]]
    if not ranked:
        lines.append(NOTHING_FOUND)
    lost = [one for one in plan.candidates if not one.rank]
    if lost:
        lines.append(f"{' Not ranked ':-^{_WIDTH}}")
        lines += [f"{name(one):<28} {loss(one)}" for one in lost]
    lines += ["=" * _WIDTH, *notes(plan)]
    return "\n".join(lines) + "\n"


def name(one: Candidate) -> str:
    """A configuration in short."""
    return ", ".join(_SHORT.get(path, f"{path}=") + value for path, value in one.label.items())


def _row(cells: tuple[str, ...]) -> str:
    aligned = [f"{cells[0]:<{_WIDTHS[0]}}"]
    aligned += [f"{cell:>{width}}" for cell, width in zip(cells[1:-1], _WIDTHS[1:-1], strict=True)]
    return "".join((*aligned, "  ", cells[-1])).rstrip()


def cells(plan: Plan, one: Candidate) -> tuple[str, ...]:
    """A ranked configuration, under HEAD."""
    assert one.fleet is not None
    low, high = one.breaks_at_per_s or (math.nan, math.nan)
    dollars = one.usd_per_hour
    return (
        name(one),
        f"{one.fleet.replicas:,}",
        f"{one.fleet.replicas * one.gpus_per_replica:,}",
        "n/a" if dollars is None else f"{dollars:,.2f}",
        "n/a" if dollars is None else f"{per_million(plan, dollars):.2f}",
        _ms(one.fleet.p99_s("ttft")),
        _ms(one.fleet.p99_s("tpot")),
        f"> {low:.1f}" if math.isinf(high) else f"{(low + high) / 2:.1f} /s",
        one.constraint or "not found",
    )


def per_million(plan: Plan, usd_per_hour: float) -> float:
    """Dollars for a million output tokens at the asked rate."""
    tokens_per_hour = plan.question.rate_per_s * plan.question.traffic.output_tokens * 3600
    return usd_per_hour / tokens_per_hour * 1e6


def _ms(of: Interval) -> str:
    if math.isnan(of.value):
        return "n/a"
    decimals = 0 if of.value >= 0.1 else 1
    half = "" if math.isinf(of.half_width) else f" +- {of.half_width * 1e3:.{decimals}f}"
    return f"{of.value * 1e3:.{decimals}f}{half}"


def why(one: Candidate) -> str:
    """What the trials of a fleet and of one replica fewer say."""
    assert one.fleet is not None
    if one.smaller is None:
        fewer = "1 replica is" if one.fleet.replicas == 1 else f"{one.fleet.replicas:,} replicas are"
        return f"{_kept(one.fleet)}; {fewer} the least that the mean load takes."
    return f"{_kept(one.fleet)}; {_kept(one.smaller)}."


def _kept(fleet: Fleet) -> str:
    kept = fleet.kept
    replicas = "1 replica keeps" if fleet.replicas == 1 else f"{fleet.replicas:,} replicas keep"
    return f"{replicas} the SLO in {kept} of {len(fleet.trials)} trials"


def loss(one: Candidate) -> str:
    """Why a configuration is not ranked, without the sum of the memory's parts."""
    if one.fleet is None:
        return one.lost.split(": weights ")[0]
    about = f"about {one.fleet.replicas:,} replicas"
    dollars = "" if one.usd_per_hour is None else f", ${one.usd_per_hour:,.0f}/h"
    return f"{about}{dollars}: {one.lost}"


def notes(plan: Plan) -> Iterator[str]:
    """How the plan was made, and what to heed."""
    ranks = [one.rank for one in plan.candidates if one.rank]
    yield (
        f"A fleet is ranked when a fresh trial keeps the SLO with a chance of {CHANCE:.0%}. P99s are means "
        "over trials with 95 % intervals."
    )
    if any(one.fleet and one.usd_per_hour is None for one in plan.candidates):
        yield "No prices are known: ranked by the number of GPUs."
    if plan.simulations:
        yield (
            f"{plan.simulations} simulations of some replicas each, which get what the router "
            f"({plan.question.router}) sends them; fleets that were not ranked had one trial."
        )
    question, best = plan.question, plan.candidates[0]
    span_s = question.traffic.num_requests / question.rate_per_s
    if best.fleet and best.fleet.p99_s("e2e").value > _SHORT_RUN * span_s:
        yield (
            f"The requests come within {span_s:.0f} s, and the P99 of their E2E latency is "
            f"{best.fleet.p99_s('e2e').value:.0f} s: "
            "the fleets were not full for long. Take more requests before you rely on this."
        )
    if len(set(ranks)) < len(ranks):
        yield "Equal ranks: the trials do not decide which is cheaper."
    asked = plan.scenario.scenario.hardware.router
    if asked != plan.question.router:
        yield f"The scenario's router, {asked}, needs the whole fleet; try it with `servesim run`."


# ---- JSON ------------------------------------------------------------------------------------------


def plan_json(plan: Plan) -> str:
    """Every configuration, the ranked ones first."""
    question = plan.question
    found = {
        "label": plan.scenario.scenario.name,
        "model": plan.scenario.scenario.model,
        "rate_per_s": question.rate_per_s,
        "router": question.router,
        "budget_usd_per_hour": question.budget_usd_per_hour,
        "slo": plan.scenario.scenario.slo.model_dump(mode="json"),
        "chance": CHANCE,
        "simulations": plan.simulations,
        "configurations": [_object(plan, one) for one in plan.candidates],
        "provenance": {"servesim": version("servesim"), "seed": plan.scenario.scenario.seed},
    }
    return json.dumps(found, indent=2, allow_nan=False) + "\n"


def _object(plan: Plan, one: Candidate) -> dict[str, Any]:
    dollars, ends = one.usd_per_hour, one.breaks_at_per_s
    return {
        "rank": one.rank or None,
        "configuration": one.label,
        "lost": one.lost or None,
        "replicas": one.fleet.replicas if one.fleet else None,
        "num_gpus": one.fleet.replicas * one.gpus_per_replica if one.fleet else None,
        "usd_per_hour": dollars,
        "usd_per_million_output_tokens": None if dollars is None else per_million(plan, dollars),
        "fewest_replicas_by_mean_load": one.least or None,
        "fleet": None if one.fleet is None else _fleet(one.fleet),
        "one_fewer": None if one.smaller is None else _fleet(one.smaller),
        "breaks_at_per_s": None if ends is None else [end if math.isfinite(end) else None for end in ends],
        "first_constraint": one.constraint or None,
    }


def _fleet(fleet: Fleet) -> dict[str, Any]:
    return {
        "replicas": fleet.replicas,
        "verdict": fleet.verdict,
        "trials": len(fleet.trials),
        "trials_that_keep_the_slo": fleet.kept,
        **{f"p99_{latency}_ms": _interval(fleet.p99_s(latency)) for latency in LIMITS},
    }


def _interval(of: Interval) -> dict[str, float | None]:
    values = {"mean": of.value, "low": of.low, "high": of.high}
    return {key: value * 1e3 if math.isfinite(value) else None for key, value in values.items()}
