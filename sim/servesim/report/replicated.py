"""Figures with their intervals: of one scenario, and of the differences of two, as text and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from typing import Any

from servesim.analysis.caveats import Caveat, Warned
from servesim.analysis.intervals import LEVEL, WIDE, Interval
from servesim.analysis.quantities import QUANTITIES
from servesim.analysis.replications import Estimate, PairedEstimate, Replications
from servesim.report.as_json import warnings_json
from servesim.report.words import figure_text, percent

__all__ = [
    "interval_json",
    "paired_json",
    "paired_notes",
    "paired_text",
    "replicated_json",
    "replicated_text",
    "replications_about",
    "replications_notes",
    "replications_rows",
]

_LABEL = 36
_WIDTH = 84


def replicated_text(found: Replications) -> str:
    """The table of one scenario: mean, half-width of the interval, and what is wide or refused."""
    lines = [*replications_about(found), f"{'':<{_LABEL}}{'mean':>14}{'+-':>12}{'relative':>11}"]
    for group, estimates in _groups(found.estimates()):
        lines.append(_head(f" {group} "))
        lines += map(_estimate, estimates)
    lines += ["=" * _WIDTH, *replications_notes(found)]
    return "\n".join(lines) + "\n"


def paired_text(a: Replications, b: Replications, differences: Sequence[PairedEstimate]) -> str:
    """The table of two scenarios: both means, and the difference B - A with its interval."""
    names = [f"{letter}: {one.scenario.scenario.name}" for letter, one in (("A", a), ("B", b))]
    lines = [*replications_about(a, " Comparison "), *names]
    lines.append(f"{'':<{_LABEL}}{'A':>12}{'B':>12}{'B - A':>12}{'+-':>10}  ")
    for group, of in _groups(differences):
        lines.append(_head(f" {group} "))
        lines += map(_difference, of)
    lines += ["=" * _WIDTH]
    apart = sum(one.is_told_apart for one in differences)
    lines.append(
        f"{apart} of {len(differences)} figures differ for sure (marked B > A or B < A); each interval alone "
        f"holds the truth in {percent(LEVEL)}."
    )
    lines += paired_notes(a, b)
    return "\n".join(lines) + "\n"


def replicated_json(found: Replications) -> str:
    """vLLM's keys with means over the replications, then the intervals under the same keys."""
    return _text(_object(found))


def paired_json(a: Replications, b: Replications, differences: Sequence[PairedEstimate]) -> str:
    """Both objects, and the differences b - a with their intervals."""
    rows = [
        {
            "key": one.quantity.key,
            "label": one.quantity.label,
            **({"refused": one.refused} if one.difference is None else interval_json(one.difference)),
            "told_apart": one.is_told_apart,
        }
        for one in differences
    ]
    warnings = warnings_json(_other_traffic(a, b))
    return _text({"a": _object(a), "b": _object(b), "differences": rows, "warnings": warnings})


def replications_rows(found: Replications) -> list[dict[str, float]]:
    """A row per replication: its seed and every figure."""
    columns = {key: found.values(one) for key, one in QUANTITIES.items()}
    kept = {key: values for key, values in columns.items() if not all(map(math.isnan, values))}
    return [
        {"seed": seed, **{key: float(values[number]) for key, values in kept.items()}}
        for number, seed in enumerate(found.seeds)
    ]


def interval_json(interval: Interval) -> dict[str, float]:
    """An interval as a JSON object."""
    return {
        "mean": interval.value,
        "low": interval.low,
        "high": interval.high,
        "half_width": interval.half_width,
    }


def _object(found: Replications) -> dict[str, Any]:
    first, estimates = found.summaries[0], found.estimates()
    known = {one.quantity.key: one.interval for one in estimates if one.interval is not None}
    return {
        "backend": "servesim",
        "label": first.name,
        "model_id": first.model,
        **{key: interval.value for key, interval in known.items()},
        "replications": len(found.seeds),
        "level": LEVEL,
        "intervals": {key: interval_json(interval) for key, interval in known.items()},
        "refused": {one.quantity.key: one.refused for one in estimates if one.interval is None},
        "steady": found.steady,
        "warm_up_s": found.warm_up_s,
        "resampled": found.resampled,
        "provenance": {"servesim": version("servesim"), "seeds": list(found.seeds), "gpu": first.gpu},
    }


def replications_about(
    found: Replications, title: str = " Replications ", width: int = _WIDTH
) -> Iterator[str]:
    """How the replications were made, below a title if there is one."""
    seeds = f"seeds {found.seeds[0]} to {found.seeds[-1]}"
    if title:
        yield f"{title:=^{width}}"
    yield f"{len(found.seeds)} replications ({seeds}); means with {percent(LEVEL)} intervals"
    if found.resampled:
        yield "Each draws the trace's requests again, in blocks, with replacement"
    if found.warm_up_s is not None:
        yield f"Left out as warm-up (MSER-5): {found.warm_up_s:.1f} s"


def replications_notes(found: Replications) -> Iterator[str]:
    """What to know before reading on: no steady state, no chance, wide intervals."""
    yield from _doubts(found)
    name = found.scenario.scenario.name
    wide = [one.quantity.label for one in found.estimates() if one.interval and one.interval.is_wide]
    if wide:
        yield (
            f"Wide ({name}): {len(wide)} figures are uncertain by more than {percent(WIDE)} "
            "-> ask for more replications or more requests"
        )


def paired_notes(a: Replications, b: Replications) -> tuple[str, ...]:
    """What to know before reading on, of each, and whether they serve the same requests."""
    doubts = dict.fromkeys(note for one in (a, b) for note in _doubts(one))
    return (*(f"Warning: {warned}" for warned in _other_traffic(a, b)), *doubts)


def _other_traffic(a: Replications, b: Replications) -> tuple[Warned, ...]:
    one, other = a.scenario.scenario, b.scenario.scenario
    if one.workload == other.workload:
        return ()
    return (Caveat.OTHER_TRAFFIC.say(a=one.name, b=other.name, what="their workloads differ"),)


def _doubts(found: Replications) -> Iterator[str]:
    name = found.scenario.scenario.name
    if not any(summary.completed for summary in found.summaries):
        yield f"Warning ({name}): no request was completed -> `servesim run` says why"
    if not found.steady:
        yield (
            f"Warning ({name}): no steady state was found: the queue or the KV use changes to the end, "
            "and the figures are of whole runs -> run more requests, or lower the load"
        )
    if not found.varies:
        yield (
            f"Warning ({name}): all replications are the same: nothing in the workload is random "
            "-> describe random arrivals or lengths"
        )


def _groups(
    estimates: Iterable[Estimate | PairedEstimate],
) -> Iterator[tuple[str, list[Any]]]:
    groups: dict[str, list[Any]] = {}
    for one in estimates:
        groups.setdefault(one.quantity.group, []).append(one)
    yield from groups.items()


def _estimate(one: Estimate) -> str:
    label = f"{one.quantity.label:<{_LABEL}}"
    if one.interval is None:
        return f"{label}{'n/a':>14}  {one.refused}"
    mean, half = figure_text(one.interval.value), figure_text(one.interval.half_width)
    if not one.interval.half_width:
        return f"{label}{mean:>14}{'0':>12}"
    flag = "  wide" if one.interval.is_wide else ""
    return f"{label}{mean:>14}{half:>12}{percent(one.interval.relative, 1):>11}{flag}".rstrip()


def _difference(one: PairedEstimate) -> str:
    label = f"{one.quantity.label:<{_LABEL}}"
    a, b = (figure_text(each.value) if each else "n/a" for each in (one.a, one.b))
    if one.difference is None:
        return f"{label}{a:>12}{b:>12}  {one.refused}"
    of = one.difference
    word = "  not told apart" if of.is_zero_inside else "  B > A" if of.low > 0 else "  B < A"
    if not of.value and not of.half_width:
        word = "  same"
    return f"{label}{a:>12}{b:>12}{figure_text(of.value):>12}{figure_text(of.half_width):>10}{word}"


def _head(title: str) -> str:
    return f"{title:-^{_WIDTH}}"


def _text(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2, allow_nan=False) + "\n"
