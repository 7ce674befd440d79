"""Pictures as Plotly figures in plain data (``{"data": [...], "layout": {...}}``), without importing Plotly.

Colours of text, grid and background are not in them: the page adds them for its light or dark theme.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from servesim.analysis.series import CURVE_QUANTILES, TimeSeries
from servesim.analysis.summary import KvUse, SloCheck
from servesim.analysis.timeline import KV_CLASSES
from servesim.report.words import KV_LABELS, LATENCY_NAMES, MemoryPart
from servesim.units import GIB

__all__ = [
    "KV_COLOURS",
    "Figure",
    "kv_bars",
    "kv_over_time",
    "latency",
    "load",
    "memory_bar",
    "pool_bars",
    "throughput",
]

Figure = dict[str, Any]
Floats = NDArray[np.float64]

# Okabe and Ito's palette, told apart by people of every colour vision.
BLUE, SKY, ORANGE, VERMILLION, PURPLE = "#0072B2", "#56B4E9", "#E69F00", "#D55E00", "#CC79A7"
DARK_GREY = "#5C6B73"
PALE_GREEN, PALE_GREY = "rgba(0,158,115,0.6)", "rgba(140,148,158,0.22)"

KV_COLOURS = {
    "tokens": BLUE,
    "reserved": SKY,
    "internal": ORANGE,
    "round_up": PURPLE,
    "holes": VERMILLION,
    "watermark": DARK_GREY,
    "cached": PALE_GREEN,
    "free": PALE_GREY,
}
_MEMORY_COLOURS = {
    "weights": PURPLE,
    "activation_peak": ORANGE,
    "cuda_graphs": SKY,
    "non_torch": VERMILLION,
    "kv_cache": BLUE,
    "unused": PALE_GREY,
}
_RUN_STYLES = ({"color": BLUE, "width": 2}, {"color": VERMILLION, "width": 2, "dash": "5px,3px"})


def latency(metric: str, curves: Mapping[str, Floats], slo: Sequence[SloCheck] = ()) -> Figure:
    """Cumulative distributions of one latency, one curve for each named run, with the limits of the SLO."""
    longest_s = max(float(curve[-1]) for curve in curves.values())
    in_ms = longest_s < 2
    factor, unit = (1e3, "ms") if in_ms else (1.0, "s")
    shortest_s = min(float(curve[0]) for curve in curves.values())
    data = [
        {
            "type": "scatter",
            "mode": "lines",
            "name": name,
            "x": _numbers(curve * factor),
            "y": _numbers(CURVE_QUANTILES * 100),
            "line": style,
            "hovertemplate": f"%{{y:.4~g}} % within %{{x:,.4~g}} {unit}<extra>{_escape(name)}</extra>",
        }
        for (name, curve), style in zip(curves.items(), _RUN_STYLES, strict=False)
    ]
    wide = shortest_s > 0 and longest_s / shortest_s > 20
    layout: dict[str, Any] = {
        "xaxis": {
            "title": {"text": f"{LATENCY_NAMES[metric]} ({unit})"},
            "type": "log" if wide else "linear",
        },
        "yaxis": {"title": {"text": "Share within (%)"}, "range": [0, 101]},
        "showlegend": len(data) > 1,
        "hovermode": "closest",
        "shapes": [],
        "annotations": [],
    }
    if wide:
        layout["xaxis"] |= {"dtick": 1, "minor": {"dtick": "D1", "showgrid": True}, "tickformat": "~g"}
    else:
        layout["xaxis"] |= {"rangemode": "tozero"}
    for check in slo:
        if check.metric == metric:
            _add_limit(layout, check.limit_s * factor, f"SLO {check.limit_s * factor:g} {unit}", wide)
    return {"data": data, "layout": layout}


def throughput(series: TimeSeries) -> Figure:
    """Tokens per second over time: those generated, and prompt tokens computed."""
    lines = (
        ("Prompt tokens computed", series.prompt_tokens_per_s, {"color": SKY, "width": 1.5}),
        ("Tokens generated", series.output_tokens_per_s, {"color": BLUE, "width": 2}),
    )
    data = [_line(name, series, values, style, "tok/s") for name, values, style in lines]
    return _over_time(data, "Tokens per second")


def load(named: Mapping[str, TimeSeries]) -> Figure:
    """Running and waiting requests over time; of two runs, the running ones overlaid."""
    if len(named) == 1:
        [series] = named.values()
        data = [
            _line("Running", series, series.running, {"color": BLUE, "width": 2}, "requests"),
            _line("Waiting", series, series.waiting, {"color": VERMILLION, "width": 1.5}, "requests"),
        ]
        return _over_time(data, "Requests")
    data = [
        _line(name, series, series.running, style, "running")
        for (name, series), style in zip(named.items(), _RUN_STYLES, strict=True)
    ]
    return _over_time(data, "Running requests")


def kv_over_time(series: TimeSeries, kv: KvUse, pool_bytes: float) -> Figure:
    """The KV pool of one GPU by class over time, stacked, in GiB; preemptions as marks on its upper edge."""
    gib_per_token = pool_bytes / GIB / kv.pool_tokens
    data: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "mode": "lines",
            "stackgroup": "pool",
            "name": KV_LABELS[name],
            "x": _numbers(series.time_s),
            "y": _numbers(series.kv_tokens[name] * gib_per_token),
            "line": {"width": 0},
            "fillcolor": KV_COLOURS[name],
            "hovertemplate": "%{y:.2f} GiB",
        }
        for name in KV_CLASSES
    ]
    preempted = series.preemptions > 0
    if preempted.any():
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": "Preemptions",
                "x": _numbers(series.time_s[preempted]),
                "y": [pool_bytes / GIB] * int(preempted.sum()),
                "marker": {"symbol": "triangle-down", "size": 7, "color": PURPLE},
                "customdata": series.preemptions[preempted].tolist(),
                "hovertemplate": "%{customdata} preempted",
            }
        )
    figure = _over_time(data, "KV pool of one GPU (GiB)")
    figure["layout"]["yaxis"]["range"] = [0, pool_bytes / GIB * 1.02]
    figure["layout"]["xaxis"]["range"] = [0, series.bin_s * len(series.time_s)]
    return figure


def memory_bar(parts: Sequence[MemoryPart]) -> Figure:
    """The memory of one GPU as one bar of parts, in GiB."""
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "name": part.label,
            "x": [round(part.size_bytes / GIB, 3)],
            "y": ["One GPU"],
            "marker": {"color": _MEMORY_COLOURS[part.key]},
            "hovertemplate": f"{part.label}: %{{x:.2f}} GiB<extra></extra>",
        }
        for part in parts
        if part.size_bytes > 0
    ]
    layout = {
        "barmode": "stack",
        "xaxis": {"title": {"text": "Memory (GiB)"}},
        "yaxis": {"showticklabels": False},
        "hovermode": "closest",
        "legend": {"traceorder": "normal"},
    }
    return {"data": data, "layout": layout}


def kv_bars(named: Mapping[str, KvUse]) -> Figure:
    """Where each run's pool goes, as stacked bars: over the whole run, and while requests wait."""
    return pool_bars({name: (kv.mean, kv.in_queue) for name, kv in named.items()})


def pool_bars(named: Mapping[str, tuple[Mapping[str, float], Mapping[str, float]]]) -> Figure:
    """The same from the two means themselves; NaN where there is none."""
    columns = [
        (f"{name}<br>{when}", shares[place])
        for place, when in enumerate(("whole run", "while requests wait"))
        for name, shares in named.items()
        if not np.isnan(shares[place]["tokens"])
    ]
    data = [
        {
            "type": "bar",
            "name": KV_LABELS[part],
            "x": [_escape(label, keep_breaks=True) for label, _ in columns],
            "y": _numbers(np.array([shares[part] for _, shares in columns]) * 100),
            "text": [f"{shares[part]:.1%}" if shares[part] >= 0.06 else "" for _, shares in columns],
            "textposition": "inside",
            "insidetextanchor": "middle",
            "textangle": 0,
            "marker": {"color": KV_COLOURS[part]},
            "hovertemplate": f"{KV_LABELS[part]}: %{{y:.2f}} %<extra></extra>",
        }
        for part in KV_CLASSES
    ]
    layout = {
        "barmode": "stack",
        "bargap": 0.45,
        "yaxis": {"title": {"text": "Share of the KV pool (%)"}, "range": [0, 100.5]},
        "hovermode": "closest",
        "legend": {"traceorder": "normal"},
    }
    return {"data": data, "layout": layout}


def _line(name: str, series: TimeSeries, values: Floats, style: dict[str, Any], unit: str) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines",
        "name": name,
        "x": _numbers(series.time_s),
        "y": _numbers(values),
        "line": style,
        "hovertemplate": f"%{{y:,.4~g}} {unit}",
    }


def _over_time(data: list[dict[str, Any]], title: str) -> Figure:
    return {
        "data": data,
        "layout": {
            "xaxis": {"title": {"text": "Simulated time (s)"}, "rangemode": "tozero"},
            "yaxis": {"title": {"text": title}, "rangemode": "tozero"},
            "hovermode": "x unified",
            "legend": {"traceorder": "normal"},
        },
    }


def _add_limit(layout: dict[str, Any], x: float, text: str, log: bool) -> None:
    line = {"color": VERMILLION, "width": 1.5, "dash": "dot"}
    layout["shapes"].append(
        {"type": "line", "x0": x, "x1": x, "y0": 0, "y1": 1, "yref": "paper", "line": line}
    )
    layout["annotations"].append(
        {
            # An annotation's place on a logarithmic axis is the logarithm, a shape's is not.
            "x": float(np.log10(x)) if log else x,
            "y": 0.04,
            "yref": "paper",
            "xanchor": "left",
            "xshift": 4,
            "text": text,
            "showarrow": False,
            "font": {"color": VERMILLION},
        }
    )


def _numbers(values: Floats) -> list[float]:
    """Five significant digits: enough for any screen, and a small file."""
    return [float(f"{value:.5g}") for value in values.tolist()]


def _escape(text: str, keep_breaks: bool = False) -> str:
    """Plotly reads a little HTML in its texts; a name must not be taken for it."""
    escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return escaped.replace("&lt;br&gt;", "<br>") if keep_breaks else escaped
