"""The words of the reports, in one place: what every part of the memory is called and what it means."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from servesim.analysis.comparison import Difference
from servesim.analysis.summary import SloCheck

if TYPE_CHECKING:
    from collections.abc import Iterator

    from servesim.config.scenario import SloConfig
    from servesim.cost.memory import MemoryBudget

__all__ = [
    "FRAGMENT_LABELS",
    "KV_LABELS",
    "KV_MEANINGS",
    "LATENCY_NAMES",
    "LATENCY_TITLES",
    "MOVES",
    "MemoryPart",
    "change",
    "figure_text",
    "memory_parts",
    "percent",
    "slo_words",
    "verdict",
]

MOVES = {
    "swapped_out_blocks": "Blocks swapped out:",
    "swapped_in_blocks": "Blocks swapped in:",
    "preemptions_recomputed": "Preemptions that recomputed:",
    "copied_blocks": "Blocks copied on write:",
}
"""Labels of Load.blocks_moved."""

KV_LABELS = {
    "tokens": "Token states",
    "reserved": "Reserved",
    "internal": "Internal waste",
    "round_up": "Round-up",
    "holes": "Holes",
    "cached": "Cached prefixes",
    "free": "Free",
}

KV_MEANINGS = {
    "tokens": "holds keys and values that a live request still needs",
    "reserved": "allocated to a live request, empty now, will be filled",
    "internal": "allocated to a live request, will never be filled",
    "round_up": "allocated beyond what was asked for, such as to a power of two",
    "holes": "free, but in pieces too small to be used",
    "cached": "prefix cache that no live request uses; given up on demand",
    "free": "never used, or given back",
}

FRAGMENT_LABELS = {**KV_LABELS, "watermark": "Watermark"}

LATENCY_TITLES = {
    "ttft": "Time to First Token",
    "tpot": "Time per Output Token (excl. 1st token)",
    "itl": "Inter-token Latency",
    "e2el": "End-to-end Latency",
}
"""As vLLM's benchmark writes them."""

LATENCY_NAMES = {
    "ttft": "Time to first token",
    "tpot": "Time per output token",
    "itl": "Inter-token latency",
    "e2el": "End-to-end latency",
}


def verdict(check: SloCheck) -> str:
    """Whether a limit was kept, in a word."""
    if math.isnan(check.p99_s):
        return "unknown"
    return "met" if check.met else "missed"


def slo_words(slo: SloConfig) -> Iterator[str]:
    """The limits that are set, as "P99 TTFT <= 500 ms"."""
    for latency, limit_s in (("TTFT", slo.ttft_p99_s), ("TPOT", slo.tpot_p99_s), ("E2E", slo.e2e_p99_s)):
        if limit_s is not None:
            yield f"P99 {latency} <= {limit_s * 1e3:g} ms"


def change(row: Difference) -> str:
    """How b compares to a: ``1.430x``, for shares in percentage points ``+3.1 pp``."""
    if row.is_share:
        points = round(row.b - row.a, 1) + 0.0  # no negative zero
        return "n/a" if math.isnan(points) else f"{points:+.1f} pp"
    if math.isnan(row.ratio):
        return "n/a"
    return f"{row.ratio:.3f}x" if row.ratio < 1000 else f"{row.ratio:,.0f}x"


def figure_text(value: float) -> str:
    """A figure of any size in a column: four digits or more of it, and no more than it needs."""
    if not math.isfinite(value):
        return "n/a" if math.isnan(value) else "inf"
    size = abs(value)
    if float(value).is_integer():
        return f"{value:,.0f}"
    decimals = 1 if size >= 1000 else 2 if size >= 1 else 4
    return f"{value:.3g}" if size < 0.01 else f"{value:,.{decimals}f}"


def percent(share: float, decimals: int = 0, sign: str = "") -> str:
    """``95 %``; with ``sign`` "+" always with its sign, and no negative zero."""
    return f"{round(100 * share, decimals) + 0.0:{sign}.{decimals}f} %"


@dataclass(frozen=True, slots=True)
class MemoryPart:
    """One part of a GPU's memory."""

    key: str
    label: str
    size_bytes: int


def memory_parts(memory: MemoryBudget) -> tuple[MemoryPart, ...]:
    """The memory of one GPU, part by part; together they are all of it."""
    parts = (
        MemoryPart("weights", "Weights", memory.weights_bytes),
        MemoryPart("activation_peak", "Activation peak", memory.activation_peak_bytes),
        MemoryPart("cuda_graphs", "CUDA graphs", memory.cuda_graphs_bytes),
        MemoryPart("non_torch", "Outside PyTorch", memory.non_torch_bytes),
        MemoryPart("kv_cache", "KV cache", memory.kv_cache_bytes),
    )
    rest = memory.total_bytes - sum(part.size_bytes for part in parts)
    label = "Left to others" if rest >= 0 else "Not there (KV size overridden)"
    return (*parts, MemoryPart("unused", label, rest))
