"""The steady part of a run: its figures without the filling at the begin and the draining at the end."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from servesim.analysis.metrics import request_times, summarise
from servesim.analysis.run import Run
from servesim.analysis.summary import Summary
from servesim.analysis.warmup import arrival_span_s
from servesim.config.workload import BurstArrivals
from servesim.engine.events import Log

__all__ = ["has_steady_state", "steady_summary", "steady_window_s"]

Mask = NDArray[np.bool_]


def has_steady_state(run: Run) -> bool:
    """False when all requests come at once: then the whole run is the figure that is asked for."""
    return not isinstance(run.scenario.workload.arrivals, BurstArrivals)


def steady_summary(run: Run, cut: float) -> Summary:
    """The figures of the requests that arrive after ``cut``, a share of the time between first and last.

    Requests of the last 90th percentile of E2E latency before the last arrival are left out, too: the engine
    empties around them. Means over time and throughputs are of the steps between these two instants. The
    prefix cache's hits are those at first admission; inter-token gaps of several steps are of the whole run,
    and so are drafts, in proportion to the decodes. What the log counts over a whole run only is left out:
    admission failures, moved blocks.
    """
    begin_s, end_s = steady_window_s(run, cut)
    log = _between(run.log, begin_s, end_s)
    summary = summarise(replace(run, log=log))
    if not len(log.requests) or not len(log.steps):
        return summary
    return _with_rates(summary, run, log, begin_s, end_s)


def steady_window_s(run: Run, cut: float) -> tuple[float, float]:
    """When the requests arrive that ``steady_summary`` counts."""
    first_s, last_s = arrival_span_s(run)
    e2e_s = request_times(run.log).e2e_s
    drain_s = float(np.nanquantile(e2e_s, 0.9)) if np.isfinite(e2e_s).any() else 0.0
    begin_s = first_s + cut * (last_s - first_s)
    return begin_s, max(last_s - drain_s, (begin_s + last_s) / 2)


def _between(log: Log, begin_s: float, end_s: float) -> Log:
    """The requests that arrive, and the rows of steps that begin, in [begin_s, end_s]."""
    kept = Log()
    arrival_s, start_s = log.requests.columns["arrival_s"], log.steps.columns["start_s"]
    kept.requests = log.requests.where((arrival_s >= begin_s) & (arrival_s <= end_s))
    kept.steps = log.steps.where((start_s >= begin_s) & (start_s <= end_s))
    kept.itl_gaps_s = log.itl_gaps_s
    share = _decodes(kept) / max(_decodes(log), 1)
    drafts = {name: n for name, n in log.counters.items() if name.startswith("spec_decode")}
    kept.counters = {name: round(n * share) for name, n in drafts.items()}
    kept.end_s, kept.interrupted, kept.fleet = log.end_s, log.interrupted, log.fleet
    if log.counters.get("prefix_cache_queries"):
        column = {name: np.array(values) for name, values in kept.requests.columns.items()}
        looked_up = ~np.isnan(column["scheduled_s"])
        kept.counters["prefix_cache_queries"] = int(column["prompt_tokens"][looked_up].sum())
        kept.counters["prefix_cache_hits"] = int(column["cached_tokens"][looked_up].sum())
    return kept


def _decodes(log: Log) -> int:
    return int(log.steps.columns["steps"] @ log.steps.columns["decodes"])


def _with_rates(summary: Summary, run: Run, part: Log, begin_s: float, end_s: float) -> Summary:
    """Throughputs of what was done in the time, in place of what was asked in it over when that ended."""
    column = {name: np.array(values) for name, values in run.log.requests.columns.items()}
    ended: Mask = (column["finish_s"] >= begin_s) & (column["finish_s"] <= end_s) & (column["status"] <= 1)
    steps = {name: np.array(values) for name, values in part.steps.columns.items()}
    window_s = end_s - begin_s
    per_s = run.stands_for / window_s
    requests = float(ended.sum()) * per_s
    output = float(steps["steps"] @ steps["outputs"]) * per_s
    goodput = summary.request_goodput
    if goodput is not None and summary.request_throughput:
        goodput *= requests / summary.request_throughput
    return replace(
        summary,
        duration_s=window_s,
        request_throughput=requests,
        request_goodput=goodput,
        output_throughput=output,
        total_token_throughput=output + float(column["prompt_tokens"][ended].sum()) * per_s,
    )
