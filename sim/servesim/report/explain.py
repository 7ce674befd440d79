"""An explanation as text, JSON and page: where the tail's time goes, the cause, what was tried against it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

from servesim.analysis.attribution import PARTS
from servesim.analysis.caveats import RELIABLE_COMPLETIONS
from servesim.analysis.explain import Explanation, Figures, Trial
from servesim.report.charts import BLUE, ORANGE, PALE_GREY, PURPLE, SKY, VERMILLION, Figure
from servesim.report.html import figure_page
from servesim.report.sections import Table
from servesim.units import format_seconds, format_share

__all__ = ["CAUSE_WORDS", "PART_LABELS", "explanation_html", "explanation_json", "explanation_text"]

_WIDTH = 105
_LABEL = 60
_NOTHING = 0.01  # a change below this share is not listed

PART_LABELS = {
    "joining": "Waiting: the steps in flight at arrival",
    "slot": "Waiting for a slot",
    "kv_blocks": "Waiting for KV blocks",
    "tokens": "Waiting for tokens (budget of a step)",
    "prefill": "Prefill of the own prompt",
    "interference": "Interference by others' prompts",
    "weights": "Decode: weights",
    "kv_reads": "Decode: KV reads",
    "compute": "Decode: compute",
    "communication": "Decode: communication",
    "host": "Host",
    "transfer": "Copying KV blocks",
    "preemption": "Preemption and recomputing",
    "batch": "Waiting for the end of the batch",
}
_COLOURS = {
    "joining": "#8c949e",
    "slot": "#b8a9d9",
    "kv_blocks": PURPLE,
    "tokens": SKY,
    "prefill": BLUE,
    "interference": VERMILLION,
    "weights": "#009E73",
    "kv_reads": "#6cc5a6",
    "compute": "#c2b21d",
    "communication": "#7a4e1d",
    "host": "#444b52",
    "transfer": "#a0522d",
    "preemption": ORANGE,
    "batch": PALE_GREY,
}

CAUSE_WORDS: dict[str, tuple[str, str, str]] = {
    "kv": (
        "the KV cache is too small",
        "requests wait until others give blocks back, or are preempted and computed anew",
        "hold more tokens (fp8 KV cache, smaller weights, more of the memory, more GPUs), or admit fewer",
    ),
    "slots": (
        "too few slots",
        "requests wait for one of max_num_seqs places though memory would hold them",
        "raise engine.max_num_seqs",
    ),
    "interference": (
        "prompts interfere with decodes",
        "a step that computes others' prompts is long, and every request that decodes in it waits",
        "make the chunks smaller, or compute prompts elsewhere",
    ),
    "host": (
        "the host is the bottleneck",
        "the GPU waits for the scheduler, for inputs to be prepared and for kernels to be launched",
        "let the host work beside the GPU (async scheduling, a newer version, CUDA graphs)",
    ),
    "bandwidth": (
        "memory bandwidth",
        "every step reads all weights and the KV cache of its requests, and that takes its time",
        "read fewer bytes (fp8 weights or KV cache), or from more or faster memory",
    ),
    "link": (
        "the link between the GPUs",
        "every layer's partial sums travel between the tensor-parallel GPUs",
        "use fewer GPUs per replica, or GPUs with a faster link",
    ),
    "cold_cache": (
        "a cold prefix cache",
        "prompts that begin alike are computed again and again",
        "switch prefix caching on, and keep prompts that begin alike on one replica",
    ),
    "bursty": (
        "bursty arrivals",
        "requests come in bunches; the queue forms though the mean load is served with ease",
        "keep headroom for the bunches (faster GPUs, more replicas), or smooth them before they arrive",
    ),
    "oversize": (
        "oversize prompts",
        "a few prompts are far longer than the rest, and the others wait beside them or behind them",
        "smaller chunks, or replicas of their own for long prompts",
    ),
    "compute": (
        "computing takes the time",
        "prompts take as long as the GPU needs for them, alone and in the steps of others",
        "compute less (prefix caching, fp8), or on more or faster GPUs",
    ),
    "batch": (
        "static batching",
        "a batch ends with its longest request, and the next one begins only then",
        "batch continuously",
    ),
}
"""The matter, what it means, what to do."""


def explanation_text(of: Explanation) -> str:
    """The parts, the cause and the remedies."""
    lines = [f"{f' Why P99 {of.metric.upper()} is {format_seconds(of.value_s)} ':=^{_WIDTH}}", _about(of)]
    lines += _parts(of)
    lines += _cause(of)
    lines += _trials(of, "One resource relaxed at a time", _by_change(of))
    lines += _trials(of, "Remedies, tried on the same requests, best first", _moving(of))
    lines += [*_not_tried(of), *_caveats(of), "=" * _WIDTH]
    return "\n".join(lines) + "\n"


def _about(of: Explanation) -> str:
    tail = of.attribution.metric_s(of.metric)[of.tail]
    return (
        f"{of.loaded.scenario.name}: {of.figures.completed:,} requests. The tail: {len(of.tail):,} of them, "
        f"{format_seconds(tail.min())} to {format_seconds(tail.max())}"
    )


def _shown(of: Explanation) -> list[str]:
    means = of.means(), of.means(of.tail)
    return [name for name in PARTS if any(one[name] > 1e-3 * sum(one.values()) for one in means)]


def _rows(of: Explanation) -> Iterator[tuple[str, str, str, str]]:
    mean, tail = of.means(), of.means(of.tail)
    total = sum(tail.values())
    for name in _shown(of):
        share = format_share(tail[name] / total)
        yield PART_LABELS[name], format_seconds(mean[name]), format_seconds(tail[name]), share
    yield "Sum", format_seconds(sum(mean.values())), format_seconds(total), format_share(1.0)


def _parts(of: Explanation) -> Iterator[str]:
    yield f"{'Mean per request':<{_LABEL}}{'all':>12}{'tail':>12}{'of the tail':>12}"
    for label, mean, tail, share in _rows(of):
        yield f"{label:<{_LABEL}}{mean:>12}{tail:>12}{share:>12}"


def _cause(of: Explanation) -> Iterator[str]:
    matter, meaning, advice = CAUSE_WORDS[of.cause]
    yield f"{f' Cause: {matter} ':-^{_WIDTH}}"
    yield f"What it means: {meaning}."
    yield f"What to do: {advice}."
    yield from _recommendations(of)


def _recommendations(of: Explanation) -> Iterator[str]:
    if not of.recommended:
        yield "Nothing that was tried helps by 5 % or more."
    for one in of.recommended:
        yield f"{'Buy' if one.kind == 'purchase' else 'Set'}: {one.label}: {_effect(of, one)}."


def _effect(of: Explanation, one: Trial) -> str:
    assert one.figures is not None
    value = getattr(one.figures, of.metric)
    text = f"P99 {of.metric.upper()} {format_seconds(value)} ({_percent(one.change(of.metric, of.figures))}"
    again = of.checked.get(one.key, math.nan)
    text += f"; on other requests {_percent(again)})" if math.isfinite(again) else ")"
    return text + (". It rounds: check the quality of the answers" if "=fp8" in one.label else "")


def _by_change(of: Explanation) -> list[Trial]:
    tried = [one for one in of.relaxations if one.figures is not None]
    return sorted(tried, key=lambda one: one.change(of.metric, of.figures))


def _trials(of: Explanation, title: str, trials: list[Trial]) -> Iterator[str]:
    yield f"{f' {title} ':-^{_WIDTH}}"
    yield f"{'':<{_LABEL}}{'P99 TTFT':>12}{'P99 TPOT':>12}{'P99 E2E':>12}{'change':>9}"
    yield f"{'as it is':<{_LABEL}}{_figures(of.figures)}"
    for one in trials:
        assert one.figures is not None
        label = one.label + (" (purchase)" if one.kind == "purchase" else "")
        yield f"{label:<{_LABEL}}{_figures(one.figures)}{_percent(one.change(of.metric, of.figures)):>9}"


def _moving(of: Explanation) -> list[Trial]:
    return [one for one in of.ranked if abs(one.change(of.metric, of.figures)) >= _NOTHING]


def _not_tried(of: Explanation) -> Iterator[str]:
    still = [one.label for one in of.ranked if abs(one.change(of.metric, of.figures)) < _NOTHING]
    if still:
        yield f"Moves nothing: {'; '.join(still)}"
    for one in of.remedies:
        if one.figures is None:
            yield f"Not possible: {one.label}: {one.refused}"
        elif one not in of.ranked:
            yield f"Left out: {one.label}: only {one.figures.completed:,} requests are served"


def _caveats(of: Explanation) -> Iterator[str]:
    completed = of.figures.completed
    if completed < RELIABLE_COMPLETIONS:
        yield (
            f"Warning: P99 of {completed:,} requests rests on {len(of.tail):,} of them and is not reliable "
            f"below {RELIABLE_COMPLETIONS:,} -> run more requests"
        )


def _figures(of: Figures) -> str:
    return "".join(f"{format_seconds(value):>12}" for value in (of.ttft, of.tpot, of.e2e))


def _percent(share: float) -> str:
    return f"{round(100 * share, 1) + 0.0:+.1f} %"


def explanation_json(of: Explanation) -> str:
    """The same, every part and every trial."""
    left_out = [one for one in of.remedies if one not in of.ranked]
    return json.dumps(_finite({
        "label": of.loaded.scenario.name,
        "metric": f"{of.metric}_p99",
        "value_s": of.value_s,
        "completed": of.figures.completed,
        "tail_requests": of.attribution.index[of.tail].tolist(),
        "parts_s": {"mean": of.means(), "typical": of.means(of.typical), "tail": of.means(of.tail)},
        "cause": of.cause,
        "warnings": list(_caveats(of)),
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
    return {"key": one.key, "label": one.label, "kind": one.kind, **known, "refused": one.refused}


def explanation_html(of: Explanation) -> str:
    """The explanation as one offline page."""
    matter, meaning, advice = CAUSE_WORDS[of.cause]
    head = ("", "P99 TTFT", "P99 TPOT", "P99 E2E", "Change")
    return figure_page(
        "explain.html.j2",
        {"parts": _bars(of)},
        title=f"Why P99 {of.metric.upper()} is {format_seconds(of.value_s)}",
        subtitle=_about(of),
        matter=matter,
        meaning=meaning,
        advice=advice,
        recommended=tuple((one.kind, one.label, _effect(of, one)) for one in of.recommended),
        parts=Table("Parts", ("Mean per request", "All", "Tail", "Of the tail"), tuple(_rows(of))),
        relaxations=Table("Relaxed", head, tuple(_table(of, _by_change(of)))),
        remedies=Table("Remedies", head, tuple(_table(of, _moving(of)))),
        notes=(*_not_tried(of), *_caveats(of)),
    )


def _table(of: Explanation, trials: list[Trial]) -> Iterator[tuple[str, ...]]:
    yield ("as it is", *_cells(of.figures), "")
    for one in trials:
        assert one.figures is not None
        label = one.label + (" (purchase)" if one.kind == "purchase" else "")
        yield (label, *_cells(one.figures), _percent(one.change(of.metric, of.figures)))


def _cells(of: Figures) -> tuple[str, str, str]:
    return format_seconds(of.ttft), format_seconds(of.tpot), format_seconds(of.e2e)


def _bars(of: Explanation) -> Figure:
    """Stacked bars: the typical request, the mean, the tail."""
    rows = {"Tail": of.means(of.tail), "Mean": of.means(), "Typical": of.means(of.typical)}
    in_ms = sum(rows["Tail"].values()) < 2
    factor, unit = (1e3, "ms") if in_ms else (1.0, "s")
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "name": PART_LABELS[name],
            "y": list(rows),
            "x": [float(f"{max(means[name], 0.0) * factor:.4g}") for means in rows.values()],
            "marker": {"color": _COLOURS[name]},
            "hovertemplate": f"%{{y}}: %{{x:,.4~g}} {unit}<extra>{PART_LABELS[name]}</extra>",
        }
        for name in _shown(of)
    ]
    layout = {
        "barmode": "stack",
        "bargap": 0.4,
        "xaxis": {"title": {"text": f"{of.metric.upper()} ({unit})"}, "zeroline": True},
        "yaxis": {"showgrid": False},
        "hovermode": "closest",
        "legend": {"traceorder": "normal"},
    }
    return {"data": data, "layout": layout}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
