"""The pictures of the fragmentation report, as Plotly figures in plain data (see charts.py)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from servesim.analysis.fragmentation import Fragmentation
from servesim.analysis.lab import BlockSize, Entry
from servesim.analysis.memory_map import Holes
from servesim.analysis.shares import FRAGMENT_CLASSES
from servesim.report.charts import BLUE, KV_COLOURS, ORANGE, PURPLE, SKY, VERMILLION, Figure
from servesim.report.words import FRAGMENT_LABELS

__all__ = ["bars", "batch", "block_sizes", "holes", "waste_histogram", "waste_scatter"]

_ALLOCATOR_COLOURS = (BLUE, VERMILLION, "#009E73", PURPLE, ORANGE, SKY, "#7F3C00", "#5C6B73")
_WASTE_TICKS = (0, 1, 3, 10, 30, 100, 300, 1000, 3000, 10_000, 30_000, 100_000, 300_000, 1_000_000)
_SYMBOLS = ("circle", "square", "diamond", "cross", "triangle-up", "x", "star", "pentagon")


def bars(accounts: Sequence[Fragmentation]) -> Figure:
    """Where the pool goes, one stacked bar for each allocator, and beside it what the lengths predict."""
    names, kinds = [], []
    highest = max(sum((account.predicted_shares() or {}).values()) for account in accounts)
    for account in accounts:
        bars_of = ["simulated", "closed form"] if account.predicted else ["simulated"]
        names += [account.name] * len(bars_of)
        kinds += bars_of
    data = []
    for part in FRAGMENT_CLASSES:
        values, errors, texts = list[float | None](), list[float | None](), []
        for account in accounts:
            share, predicted = account.pressed.of[part], account.predicted_shares()
            pairs = [(share.mean, share.half_width)]
            if predicted is not None:
                pairs.append((predicted.get(part, 0.0), math.nan))
            for value, half in pairs:
                values.append(_round(value * 100))
                errors.append(None if math.isnan(half) or part != "tokens" else _round(half * 100))
                texts.append(f"{value:.1%}" if value >= 0.05 else "")
        if any(values):
            data.append(_stack(part, names, kinds, values, errors, texts))
    layout = {
        "barmode": "stack",
        "bargap": 0.25,
        "xaxis": {"automargin": True},
        "yaxis": {"title": {"text": "Share of the KV pool (%)"}, "range": [0, 103 * max(1, highest)]},
        "hovermode": "closest",
        "legend": {"traceorder": "normal"},
    }
    return {"data": data, "layout": layout}


def _stack(
    part: str,
    names: list[str],
    kinds: list[str],
    values: list[float | None],
    errors: list[float | None],
    texts: list[str],
) -> dict[str, Any]:
    label = FRAGMENT_LABELS[part]
    return {
        "type": "bar",
        "name": label,
        "x": [names, kinds],
        "y": values,
        "text": texts,
        "textposition": "inside",
        "insidetextanchor": "middle",
        "textangle": 0,
        "marker": {
            "color": KV_COLOURS[part],
            "pattern": {
                "shape": ["/" if kind == "closed form" else "" for kind in kinds],
                "fgcolor": "rgba(255,255,255,0.4)",
                "bgcolor": KV_COLOURS[part],
                "size": 7,
            },
        },
        "error_y": {"type": "data", "array": errors, "thickness": 1.5, "width": 5, "visible": any(errors)},
        "hovertemplate": f"{label}: %{{y:.2f}} %<extra></extra>",
    }


def batch(entries: Sequence[Entry]) -> Figure:
    """The batch that each allocator attains, beside the batch that fits by closed form."""
    accounts = [entry.account for entry in entries]
    names = [account.name for account in accounts]
    fits = [account.predicted.requests_that_fit if account.predicted else math.nan for account in accounts]
    attained = [account.pressed_running for account in accounts]
    data = [
        {
            "type": "bar",
            "name": name,
            "x": names,
            "y": [_round(value) for value in values],
            "text": ["" if math.isnan(value) else f"{value:.1f}" for value in values],
            "textposition": "outside",
            "cliponaxis": False,
            "marker": {"color": colour},
            "hovertemplate": f"{name}: %{{y:.2f}} requests<extra></extra>",
        }
        for name, values, colour in (
            ("Attained", attained, BLUE),
            ("Fits, by closed form", fits, "rgba(140,148,158,0.55)"),
        )
    ]
    highest = max(value for value in (*attained, *fits, 1.0) if not math.isnan(value))
    layout = {
        "barmode": "group",
        "bargap": 0.35,
        "yaxis": {"title": {"text": "Running requests"}, "range": [0, 1.18 * highest]},
        "hovermode": "closest",
    }
    return {"data": data, "layout": layout}


def waste_scatter(accounts: Sequence[Fragmentation]) -> Figure:
    """Slots that a request was given and never filled, against its output length.

    Plotly has no axis that is logarithmic and holds 0: log(slots + 1) is drawn, labelled with the slots.
    """
    most = max((slots for account in accounts for slots in account.waste.wasted), default=1)
    data = [
        {
            "type": "scatter",
            "mode": "markers",
            "name": account.name,
            "x": list(account.waste.output_tokens),
            "y": [_round(math.log10(slots + 1)) for slots in account.waste.wasted],
            "customdata": list(account.waste.wasted),
            "marker": {
                "color": _colour(i),
                "symbol": _SYMBOLS[i % len(_SYMBOLS)],
                "size": 4.5,
                "opacity": 0.55,
            },
            "hovertemplate": "%{x:,} output tokens: %{customdata:,} slots never filled",
        }
        for i, account in enumerate(accounts)
    ]
    layout = {
        "xaxis": {"title": {"text": "Output length (tokens)"}, "type": "log", "dtick": 1},
        "yaxis": {
            "title": {"text": "Slots never filled"},
            "tickvals": [math.log10(tick + 1) for tick in _WASTE_TICKS],
            "ticktext": [f"{tick:,}" for tick in _WASTE_TICKS],
            "range": [-0.1, math.log10(most + 1) * 1.05 + 0.1],
        },
        "hovermode": "closest",
    }
    return {"data": data, "layout": layout}


def waste_histogram(accounts: Sequence[Fragmentation]) -> Figure:
    """Requests by the share of their slots that stayed empty."""
    data = []
    for i, account in enumerate(accounts):
        edges, counts = account.waste.edges, account.waste.counts
        total = max(sum(counts), 1)
        data.append(
            {
                "type": "bar",
                "name": account.name,
                "x": [f"{_percent(low)}–{_percent(high)} %" for low, high in pairwise(edges)],
                "y": [_round(count / total * 100) for count in counts],
                "marker": {"color": _colour(i)},
                "hovertemplate": "%{x} of its slots never filled: %{y:.1f} % of the requests",
            }
        )
    layout = {
        "barmode": "group",
        "xaxis": {"title": {"text": "Share of a request's slots that it never filled"}, "tickangle": -35},
        "yaxis": {"title": {"text": "Requests (%)"}, "rangemode": "tozero"},
        "hovermode": "closest",
    }
    return {"data": data, "layout": layout}


def holes(named: dict[str, Holes], names: Sequence[str]) -> Figure:
    """How many free pieces of which size lie between the allocations, on average over time.

    ``names`` are all allocators of the page, so that each keeps its colour.
    """
    biggest = max(max((k for k, count in enumerate(of.counts) if count), default=0) for of in named.values())
    smallest = min(
        min((k for k, count in enumerate(of.counts) if count), default=biggest) for of in named.values()
    )
    data = [
        {
            "type": "bar",
            "name": name,
            "x": [f"{of.sizes[k]:,}+" for k in range(smallest, biggest + 1)],
            "y": [_round(of.counts[k]) for k in range(smallest, biggest + 1)],
            "marker": {"color": _colour(names.index(name))},
            "hovertemplate": "%{x} slots: %{y:.2f} holes on average",
        }
        for name, of in named.items()
    ]
    layout = {
        "barmode": "group",
        "xaxis": {"title": {"text": "Size of a hole (slots, up to twice as many)"}, "type": "category"},
        "yaxis": {"title": {"text": "Holes at a time, on average"}, "rangemode": "tozero"},
        "hovermode": "closest",
        "showlegend": True,
    }
    return {"data": data, "layout": layout}


def block_sizes(points: Sequence[BlockSize]) -> Figure:
    """Empty slots of a running request against the block size: simulated, and by closed form."""
    sizes = [point.block_size for point in points]
    data: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "mode": "markers",
            "name": "Simulated",
            "x": sizes,
            "y": [_round(point.empty_slots) for point in points],
            "marker": {"color": BLUE, "size": 10},
            "hovertemplate": "%{y:.1f} slots",
        },
        {
            "type": "scatter",
            "mode": "lines",
            "name": "Closed form, from the lengths",
            "x": sizes,
            "y": [_round(point.predicted_empty_slots) for point in points],
            "line": {"color": VERMILLION, "width": 2},
            "hovertemplate": "%{y:.1f} slots",
        },
        {
            "type": "scatter",
            "mode": "lines",
            "name": "Ends anywhere in a block",
            "x": sizes,
            "y": [point.uniform_empty_slots for point in points],
            "line": {"color": "#8c949e", "width": 1.5, "dash": "dot"},
            "hovertemplate": "%{y:.1f} slots",
        },
    ]
    layout = {
        "xaxis": {
            "title": {"text": "Block size (tokens)"},
            "type": "log",
            "tickvals": sizes,
            "ticktext": [str(size) for size in sizes],
        },
        "yaxis": {"title": {"text": "Empty slots per running request"}, "rangemode": "tozero"},
        "hovermode": "x unified",
    }
    return {"data": data, "layout": layout}


def _colour(place: int) -> str:
    return _ALLOCATOR_COLOURS[place % len(_ALLOCATOR_COLOURS)]


def _percent(share: float) -> str:
    return f"{share * 100:g}"


def _round(value: float) -> float | None:
    """Five significant digits; None, a gap, for what does not exist."""
    return None if math.isnan(value) else float(f"{value:.5g}")
