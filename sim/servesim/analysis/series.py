"""What a picture of a run needs: quantities over time, in bins, and latency distributions as curves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from servesim.analysis.distribution import weighted_quantiles
from servesim.analysis.metrics import itl_sample, request_times
from servesim.analysis.run import Run
from servesim.analysis.timeline import KV_CLASSES, expand_steps, timeline
from servesim.engine.events import Log

__all__ = ["CURVE_QUANTILES", "MAX_BINS", "TimeSeries", "latency_curves", "time_series"]

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

MAX_BINS = 480
_STEPS_PER_BIN = 20  # fewer would show the beat of the steps against the bins

CURVE_QUANTILES: Floats = np.unique(
    np.concatenate((np.linspace(0, 0.99, 199), np.linspace(0.99, 0.999, 37), np.linspace(0.999, 1, 11)))
)
"""Points of a cumulative distribution, close together where P99 and beyond are read."""


@dataclass(frozen=True, slots=True)
class TimeSeries:
    """Figures in bins of ``bin_s``; bin i lies around ``time_s[i]``, in seconds after the first arrival.

    running, waiting and the KV classes (token slots) are time-weighted means; the rates count per second.
    """

    bin_s: float
    time_s: Floats
    running: Floats
    waiting: Floats
    output_tokens_per_s: Floats
    prompt_tokens_per_s: Floats
    """Prompt tokens computed; what the prefix cache supplied is not in it."""
    arrivals_per_s: Floats
    finishes_per_s: Floats
    preemptions: Integers
    kv_tokens: Mapping[str, Floats]


def time_series(run: Run, horizon_s: float | None = None) -> TimeSeries:
    """The run over time in at most ``MAX_BINS`` bins, up to ``horizon_s`` (default: the end of the run)."""
    column = {name: np.array(values) for name, values in run.log.requests.columns.items()}
    begin_s = float(column["arrival_s"].min()) if len(run.log.requests) else 0.0
    line = timeline(run.log.steps, begin_s)
    horizon_s = horizon_s or line.horizon_s
    num_steps = int(line.columns["steps"].sum())
    bins = int(np.clip(num_steps // _STEPS_PER_BIN, 20, MAX_BINS))
    if not len(line) or not horizon_s > 0:
        return _nothing()
    edges_s = np.linspace(begin_s, begin_s + horizon_s, bins + 1)
    bin_s = horizon_s / bins
    steps = expand_steps(line)
    of = line.columns

    def count(times_s: Floats, weights: Integers | None = None) -> Floats:
        # The last step may end a rounding error after the last edge.
        return np.histogram(np.minimum(times_s, edges_s[-1]), edges_s, weights=weights)[0] / bin_s

    preemptions = np.histogram(line.start_s, edges_s, weights=of["preemptions"])[0]
    return TimeSeries(
        bin_s=bin_s,
        time_s=(edges_s[:-1] + edges_s[1:]) / 2 - begin_s,
        running=line.bin_means(edges_s, of["running"], of["running"]),
        waiting=line.bin_means(edges_s, of["waiting"], of["waiting"]),
        output_tokens_per_s=count(steps.end_s, of["outputs"][steps.row]),
        prompt_tokens_per_s=count(steps.end_s, of["prefill_tokens"][steps.row]),
        arrivals_per_s=count(column["arrival_s"]),
        finishes_per_s=count(column["finish_s"][~np.isnan(column["finish_s"])]),
        preemptions=preemptions.astype(np.int64),
        kv_tokens={name: line.bin_means(edges_s, *line.kv(name)) for name in KV_CLASSES},
    )


def latency_curves(log: Log) -> dict[str, Floats]:
    """TTFT, TPOT, ITL and E2E in seconds at ``CURVE_QUANTILES``; one without a sample is absent."""
    times = request_times(log)
    samples = {"ttft": times.ttft_s, "tpot": times.tpot_s, "e2el": times.e2e_s}
    curves = {}
    for name, values_s in samples.items():
        finite = values_s[times.completed & ~np.isnan(values_s)]
        if len(finite):
            curves[name] = np.quantile(finite, CURVE_QUANTILES)
    line = timeline(log.steps, 0.0)
    values_s, weights = itl_sample(log, line, expand_steps(line))
    if weights.sum():
        curves["itl"] = weighted_quantiles(values_s, weights, CURVE_QUANTILES)
    return {name: curves[name] for name in ("ttft", "tpot", "itl", "e2el") if name in curves}


def _nothing() -> TimeSeries:
    none, no_count = np.zeros(0), np.zeros(0, dtype=np.int64)
    return TimeSeries(
        0.0, none, none, none, none, none, none, none, no_count, dict.fromkeys(KV_CLASSES, none)
    )
