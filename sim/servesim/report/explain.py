"""An explanation as text and JSON: where the tail's time goes, the cause, what was tried against it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

from servesim.analysis.attribution import PARTS
from servesim.analysis.caveats import RELIABLE_COMPLETIONS
from servesim.analysis.explain import HELPS, Explanation
from servesim.analysis.explain_trials import Figures, Trial
from servesim.report.explain_words import CAUSE_WORDS, PART_LABELS
from servesim.units import format_seconds, format_share

__all__ = [
    "about", "advised", "by_change", "caveats", "explanation_json", "explanation_text", "facts", "label_of",
    "moving", "not_tried", "part_rows", "percent", "price_text", "shown_parts", "unadvised",
]  # fmt: skip

_WIDTH = 105
_LABEL = 50
_TENFOLD = 10.0
_OUTAGES = 3  # that are listed
_NOTHING = 0.01  # a change below this share is not listed


def explanation_text(of: Explanation) -> str:
    """The parts, the cause and the remedies."""
    lines = [f"{f' Why P99 {of.metric.upper()} is {format_seconds(of.value_s)} ':=^{_WIDTH}}", about(of)]
    lines += [*_parts(of), *facts(of), *_cause(of)]
    lines += _trials(of, "One resource relaxed at a time", by_change(of), priced=False)
    lines += _trials(of, "Remedies, tried on the same requests, best first", moving(of))
    lines += [*not_tried(of), *caveats(of), "=" * _WIDTH]
    return "\n".join(lines) + "\n"


def about(of: Explanation) -> str:
    """Whose tail it is."""
    tail = of.attribution.metric_s(of.metric)[of.tail]
    scenario = of.loaded.scenario
    count = scenario.hardware.num_simulated if scenario.fleet is None else scenario.num_replicas
    up_to = "up to " if scenario.fleet is not None and scenario.fleet.autoscaler is not None else ""
    by = f" by {up_to}{count:,} replicas" if count > 1 else ""
    return (
        f"{scenario.name}: {of.figures.completed:,} requests{by}. The tail: {len(of.tail):,} of "
        f"them, {format_seconds(tail.min())} to {format_seconds(tail.max())}"
    )


def shown_parts(of: Explanation) -> list[str]:
    """The parts that are not next to nothing."""
    means = of.means(), of.means(of.tail)
    return [name for name in PARTS if any(one[name] > 1e-3 * sum(one.values()) for one in means)]


def part_rows(of: Explanation) -> Iterator[tuple[str, str, str, str]]:
    """The table of the parts: all requests, the tail, its shares."""
    mean, tail = of.means(), of.means(of.tail)
    total = sum(tail.values())
    for name in shown_parts(of):
        share = format_share(tail[name] / total)
        yield PART_LABELS[name], format_seconds(mean[name]), format_seconds(tail[name]), share
    yield "Sum", format_seconds(sum(mean.values())), format_seconds(total), format_share(1.0)


def _parts(of: Explanation) -> Iterator[str]:
    yield f"{'Mean per request':<60}{'all':>12}{'tail':>12}{'of the tail':>12}"
    for label, mean, tail, share in part_rows(of):
        yield f"{label:<60}{mean:>12}{tail:>12}{share:>12}"


def facts(of: Explanation) -> Iterator[str]:
    """The SLO, which replica is the slowest, which ones failed."""
    if of.limit_s is not None:
        verdict = "is kept" if of.value_s <= of.limit_s else "is missed"
        yield f"SLO: P99 {of.metric.upper()} <= {format_seconds(of.limit_s)} {verdict}"
    if len(of.replicas) > 1:
        worst, *others = of.replicas
        least, most = (format_seconds(one.p99_s) for one in (others[-1], others[0]))
        theirs = least if least == most else f"{least} to {most}"
        yield (
            f"Slowest replica: number {worst.replica}, counted from 0: P99 {of.metric.upper()} "
            f"{format_seconds(worst.p99_s)}, {worst.in_tail:,} of the {len(of.tail):,} slowest requests; "
            f"the others {theirs}"
        )
    for outage in of.outages[:_OUTAGES]:
        back = "never back" if outage.back_s is None else f"back at {format_seconds(outage.back_s)}"
        yield (
            f"Replica {outage.replica} failed at {format_seconds(outage.failed_s)} with {outage.aborted:,} "
            f"requests in flight, {back}"
        )
    if len(of.outages) > _OUTAGES:
        yield f"{len(of.outages) - _OUTAGES:,} more failures"


def _cause(of: Explanation) -> Iterator[str]:
    matter, meaning, advice = CAUSE_WORDS[of.cause]
    yield f"{f' Cause: {matter} ':-^{_WIDTH}}"
    yield f"What it means: {meaning}."
    yield f"What to do: {advice}."
    if not of.recommended:
        yield f"{unadvised(of)}."
    for verb, label, result in advised(of):
        yield f"{verb}: {label}: {result}."


def unadvised(of: Explanation) -> str:
    """Why nothing is recommended."""
    least = f"{100 * HELPS:g} %"
    if not of.candidates:
        return f"Nothing that was tried helps by {least} or more"
    return (
        f"What helps most on these requests does not save {least} on others of their kind, "
        "so it may be chance -> run more requests"
    )


def advised(of: Explanation) -> Iterator[tuple[str, str, str]]:
    """What to do, with which setting, and what that does."""
    for place, one in enumerate(of.recommended):
        buy = "Or buy" if place else "Buy"
        yield buy if one.kind == "purchase" else "Set", one.label, _effect(of, one)


def _effect(of: Explanation, one: Trial) -> str:
    """What a recommended remedy does, and what it costs."""
    assert one.figures is not None
    value = getattr(one.figures, of.metric)
    text = f"P99 {of.metric.upper()} {format_seconds(value)} ({percent(one.change(of.metric, of.figures))}"
    again = of.checked.get(one.key, math.nan)
    text += f"; on other requests {percent(again)})" if math.isfinite(again) else ")"
    text += _cost(of, one)
    return text + (". It rounds: check the quality of the answers" if one.rounds else "")


def _cost(of: Explanation, one: Trial) -> str:
    extra = of.extra_usd_per_hour(one)
    if extra is None:
        return ", at a price that is not known" if one.kind == "purchase" else ""
    if abs(extra) < 0.005:
        return ", at no cost"
    more = "more" if extra > 0 else "less"
    return f", ${abs(extra):,.2f}/h {more} (${one.usd_per_hour:,.2f} instead of ${of.usd_per_hour:,.2f})"


def by_change(of: Explanation) -> list[Trial]:
    """The relaxations, best first."""
    tried = [one for one in of.relaxations if one.figures is not None]
    return sorted(tried, key=lambda one: one.change(of.metric, of.figures))


def moving(of: Explanation) -> list[Trial]:
    """The remedies that move the figure, best first."""
    return [one for one in of.ranked if abs(one.change(of.metric, of.figures)) >= _NOTHING]


def label_of(one: Trial) -> str:
    """As a table names it."""
    return one.label + (" (purchase)" if one.kind == "purchase" else "")


def price_text(usd_per_hour: float | None) -> str:
    """Dollars per hour."""
    return "n/a" if usd_per_hour is None else f"{usd_per_hour:,.2f}"


def _trials(of: Explanation, title: str, trials: list[Trial], *, priced: bool = True) -> Iterator[str]:
    yield f"{f' {title} ':-^{_WIDTH}}"
    yield f"{'':<{_LABEL}}{'P99 TTFT':>12}{'P99 TPOT':>12}{'P99 E2E':>12}{'change':>9}" + (
        f"{'$/h':>10}" if priced else ""
    )
    price = f"{price_text(of.usd_per_hour):>19}" if priced else ""
    yield f"{'as it is':<{_LABEL}}{_figures(of.figures)}{price}"
    for one in trials:
        assert one.figures is not None
        label = label_of(one)
        if len(label) >= _LABEL:
            yield label
            label = ""
        price = f"{price_text(one.usd_per_hour):>10}" if priced else ""
        change = percent(one.change(of.metric, of.figures))
        yield f"{label:<{_LABEL}}{_figures(one.figures)}{change:>9}{price}"


def not_tried(of: Explanation) -> Iterator[str]:
    """The remedies that are not in the table, each with its reason."""
    still = [one.label for one in of.ranked if abs(one.change(of.metric, of.figures)) < _NOTHING]
    if still:
        yield f"Moves nothing: {'; '.join(still)}"
    for one in of.remedies:
        if one.figures is None:
            yield f"Not possible: {one.label}: {one.refused}"
        elif one not in of.ranked:
            yield f"Left out: {one.label}: {one.figures.unserved:,} requests are not served"


def caveats(of: Explanation) -> Iterator[str]:
    """What the reader must know first."""
    completed = of.figures.completed
    if completed < RELIABLE_COMPLETIONS:
        yield (
            f"Warning: P99 of {completed:,} requests rests on {len(of.tail):,} of them and is not reliable "
            f"below {RELIABLE_COMPLETIONS:,} -> run more requests"
        )


def _figures(of: Figures) -> str:
    return "".join(f"{format_seconds(value):>12}" for value in (of.ttft, of.tpot, of.e2e))


def percent(share: float) -> str:
    """A change, with its sign; as a factor where it is tenfold or more."""
    if share >= _TENFOLD - 1:
        return f"x {1 + share:,.0f}"
    return f"{round(100 * share, 1) + 0.0:+.1f} %"


def explanation_json(of: Explanation) -> str:
    """The same, every part and every trial."""
    left_out = [one for one in of.remedies if one not in of.ranked]
    return json.dumps(_finite({
        "label": of.loaded.scenario.name,
        "metric": f"{of.metric}_p99",
        "value_s": of.value_s,
        "completed": of.figures.completed,
        "slo_s": of.limit_s,
        "usd_per_hour": of.usd_per_hour,
        "tail_requests": of.attribution.index[of.tail].tolist(),
        "parts_s": {"mean": of.means(), "typical": of.means(of.typical), "tail": of.means(of.tail)},
        "replicas": [one._asdict() for one in of.replicas],
        "failures": [one._asdict() for one in of.outages],
        "cause": of.cause,
        "warnings": list(caveats(of)),
        "burstiness_cv": of.variation,
        "recommended": [one.key for one in of.recommended],
        "on_other_requests": dict(of.checked),
        "relaxations": [_trial(of, one) for one in of.relaxations],
        "remedies": [_trial(of, one) for one in (*of.ranked, *left_out)],
        "provenance": {"servesim": version("servesim"), "seed": of.loaded.scenario.seed},
    }), indent=2, allow_nan=False) + "\n"  # fmt: skip


def _trial(of: Explanation, one: Trial) -> dict[str, Any]:
    figures = one.figures
    known = {} if figures is None else {
        "ttft_p99_s": figures.ttft, "tpot_p99_s": figures.tpot, "e2e_p99_s": figures.e2e,
        "completed": figures.completed, "change": one.change(of.metric, of.figures),
    }  # fmt: skip
    price = {} if one.kind == "relaxation" else {"usd_per_hour": one.usd_per_hour}
    return {"key": one.key, "label": one.label, "kind": one.kind, **known, **price, "refused": one.refused}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
