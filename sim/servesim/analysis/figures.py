"""The figures by which a simulation is compared to a recording, under the names of `vllm bench serve`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from servesim.analysis.measured import Latencies
from servesim.analysis.summary import Summary
from servesim.cost.memory import MemoryBudget

__all__ = ["METRICS", "OF_RESULTS", "Metric", "figures_of", "memory_figures", "request_figures", "sample_of"]

Floats = NDArray[np.float64]
_GIB = 2**30


@dataclass(frozen=True, slots=True)
class Metric:
    """One figure: how it reads, and how it follows from a sample along the last axis."""

    label: str
    statistic: Callable[[Floats], Floats] = lambda sample: np.asarray(sample[..., 0])
    of_memory: bool = False
    least: float = 0.0
    """Below it a value is next to nothing and taken for this; where all are below they are not compared."""


def _mean(sample: Floats) -> Floats:
    return np.asarray(np.nanmean(sample, axis=-1))


def _median(sample: Floats) -> Floats:
    return np.asarray(np.nanmedian(sample, axis=-1))


def _p99(sample: Floats) -> Floats:
    return np.asarray(np.nanpercentile(sample, 99, axis=-1))


_STATISTICS = {"mean": _mean, "median": _median, "p99": _p99}
_TITLES = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2el": "E2EL"}

METRICS: dict[str, Metric] = {
    **{
        f"{name}_{kind}_ms": Metric(f"{title} {name}", statistic)
        for kind, title in _TITLES.items()
        for name, statistic in _STATISTICS.items()
    },
    "duration": Metric("duration"),
    "output_throughput": Metric("output throughput"),
    "total_token_throughput": Metric("total throughput"),
    "mean_running": Metric("running"),
    "mean_waiting": Metric("waiting", least=0.1),
    "mean_kv_usage": Metric("KV use"),
    "peak_kv_usage": Metric("KV use, peak"),
    "preemptions": Metric("preemptions", least=0.5),
    "prefix_hit_tokens": Metric("prefix hits", least=0.5),
    "requested_gib": Metric("memory requested", of_memory=True),
    "weights_gib": Metric("weights", of_memory=True),
    "activation_peak_gib": Metric("activation peak", of_memory=True),
    "non_torch_gib": Metric("outside PyTorch", of_memory=True),
    "kv_cache_gib": Metric("KV cache", of_memory=True),
    "num_gpu_blocks": Metric("KV blocks", of_memory=True),
}
"""Every figure that a recorded run may give, by its name there; times in ms, throughputs per second."""

_OF_STEPS = (
    "mean_running",
    "mean_waiting",
    "mean_kv_usage",
    "peak_kv_usage",
    "preemptions",
    "prefix_hit_tokens",
)
OF_RESULTS = tuple(name for name in METRICS if name not in _OF_STEPS)
"""Those that results.csv may hold, a row for each run."""

_OF_REQUESTS = [f"{name}_{kind}_ms" for kind in ("ttft", "tpot", "e2el") for name in ("mean", "p99")]


def sample_of(metric: str, latencies: Latencies) -> Floats | None:
    """What a latency figure is a statistic of, in ms; None for a figure that is not one of requests."""
    samples = {"ttft": latencies.ttft_s, "tpot": latencies.tpot_s, "e2el": latencies.e2e_s}
    kind = metric.split("_")[1]
    return samples[kind] * 1e3 if metric.endswith("_ms") and kind in samples else None


def request_figures(latencies: Latencies) -> dict[str, float]:
    """The figures of a run that is known request by request; without TPOT where no request has two tokens."""
    figures = {}
    for metric in _OF_REQUESTS:
        sample = sample_of(metric, latencies)
        assert sample is not None
        if np.isfinite(sample).any():
            figures[metric] = float(METRICS[metric].statistic(sample))
    ends_s = latencies.arrival_s + latencies.e2e_s
    duration_s = float(ends_s.max() - latencies.arrival_s.min())
    figures["output_throughput"] = float(latencies.output_tokens.sum()) / duration_s
    return figures


def figures_of(summary: Summary) -> dict[str, float]:
    """The same names from a simulation's result."""
    of = {"ttft": summary.ttft, "tpot": summary.tpot, "itl": summary.itl, "e2el": summary.e2el}
    latencies = {
        f"{name}_{kind}_ms": value * 1e3
        for kind, one in of.items()
        for name, value in (("mean", one.mean_s), ("median", one.p50_s), ("p99", one.p99_s))
    }
    return {
        **latencies,
        "duration": summary.duration_s,
        "output_throughput": summary.output_throughput,
        "total_token_throughput": summary.total_token_throughput,
    }


def memory_figures(memory: MemoryBudget) -> dict[str, float]:
    """The figures of a start-up, per GPU."""
    return {
        "requested_gib": memory.requested_bytes / _GIB,
        "weights_gib": memory.weights_bytes / _GIB,
        "activation_peak_gib": memory.activation_peak_bytes / _GIB,
        "non_torch_gib": memory.non_torch_bytes / _GIB,
        "kv_cache_gib": memory.kv_cache_bytes / _GIB,
        "num_gpu_blocks": float(memory.num_gpu_blocks),
    }
