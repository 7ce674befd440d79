"""The result as plain text: vLLM's benchmark block, then the engine and the memory, then the warnings.

The text depends on nothing but its arguments: no clock, no terminal width, no colours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from servesim.analysis.comparison import Difference, compare_summaries
from servesim.analysis.distribution import Distribution
from servesim.analysis.summary import Speculation, Summary
from servesim.analysis.timeline import KV_CLASSES
from servesim.report.fleet import fleet_lines
from servesim.report.words import (
    KV_LABELS,
    LATENCY_TITLES,
    MOVES,
    change,
    figure_text,
    memory_parts,
    verdict,
)
from servesim.units import GIB, format_share

__all__ = ["comparison_text", "result_text", "warnings_text"]

_WIDTH = 50  # of vLLM's block
_LABEL = 40
_COMPARISON_WIDTH = 72


def result_text(summary: Summary) -> str:
    """The result block and the KV-memory block, without the warnings."""
    parts = (_benchmark, _engine, _fleet, _kv_pool, _gpu_memory)
    lines = [*(line for part in parts for line in part(summary)), "=" * _WIDTH]
    return "\n".join(lines) + "\n"


def warnings_text(summary: Summary, name: str = "") -> str:
    """One line for each warning, after ``name`` when it takes one; empty when there is none."""
    begin = f"Warning ({name})" if name else "Warning"
    return "".join(f"{begin}: {warned}\n" for warned in summary.warnings)


def comparison_text(a: Summary, b: Summary) -> str:
    """The table of differences of two runs."""
    name_a, name_b = _two_names(a.name, b.name)
    lines = [_head(" Comparison ", "=", _COMPARISON_WIDTH), f"A: {a.name}", f"B: {b.name}"]
    lines.append(f"{'':<34}{name_a:>14}{name_b:>14}{'B to A':>10}")
    group = ""
    for row in compare_summaries(a, b):
        if row.group != group:
            group = row.group
            lines.append(_head(f" {group} ", "-", _COMPARISON_WIDTH))
        lines.append(_difference(row))
    lines.append("=" * _COMPARISON_WIDTH)
    return "\n".join(lines) + "\n"


def _benchmark(summary: Summary) -> Iterator[str]:
    yield _head(" Serving Benchmark Result ", "=")
    yield _line("Successful requests:", summary.completed)
    yield _line("Failed requests:", summary.failed)
    if summary.unfinished:
        yield _line("Unfinished requests:", summary.unfinished)
    if summary.max_concurrency is not None:
        yield _line("Maximum request concurrency:", summary.max_concurrency)
    if summary.request_rate is not None and math.isfinite(summary.request_rate):
        yield _line("Request rate configured (RPS):", summary.request_rate)
    yield _line("Benchmark duration (s):", summary.duration_s)
    yield _line("Total input tokens:", summary.total_input_tokens)
    yield _line("Total generated tokens:", summary.total_output_tokens)
    yield _line("Request throughput (req/s):", summary.request_throughput)
    if summary.request_goodput is not None:
        yield _line("Request goodput (req/s):", summary.request_goodput)
    yield _line("Output token throughput (tok/s):", summary.output_throughput)
    yield _line("Peak output token throughput (tok/s):", summary.max_output_tokens_per_s)
    yield _line("Peak concurrent requests:", float(summary.max_concurrent_requests))
    yield _line("Total token throughput (tok/s):", summary.total_token_throughput)
    for name, title in LATENCY_TITLES.items():
        yield from _latency(title, name.upper(), getattr(summary, name))
    if summary.speculation is not None:
        yield from _speculation(summary.speculation)
    for check in summary.slo:
        label = f"SLO P99 {check.metric.upper()} <= {check.limit_s * 1e3:g} ms:"
        yield _line(label, f"{verdict(check)} ({format_share(check.within)} within)")


def _latency(title: str, short: str, of: Distribution) -> Iterator[str]:
    yield _head(title, "-")
    yield _line(f"Mean {short} (ms):", of.mean_s * 1e3)
    yield _line(f"Median {short} (ms):", of.median_s * 1e3)
    yield _line(f"P90 {short} (ms):", of.p90_s * 1e3)
    yield _line(f"P99 {short} (ms):", of.p99_s * 1e3)


def _speculation(of: Speculation) -> Iterator[str]:
    yield _head("Speculative Decoding", "-")
    yield _line("Acceptance rate (%):", of.acceptance_rate * 100)
    yield _line("Acceptance length:", of.acceptance_length)
    yield _line("Drafts:", of.num_drafts)
    yield _line("Draft tokens:", of.draft_tokens)
    yield _line("Accepted tokens:", of.accepted_tokens)
    yield "Per-position acceptance (%):"
    for position, rate in enumerate(of.position_rates):
        yield _line(f"  Position {position}:", rate * 100)


def _engine(summary: Summary) -> Iterator[str]:
    load = summary.load
    yield _head(" Engine ", "=")
    yield _line("Mean queue time (ms):", summary.queue.mean_s * 1e3)
    yield _line("P99 queue time (ms):", summary.queue.p99_s * 1e3)
    yield _line("Running requests, mean:", load.mean_running)
    yield _line("Running requests, peak:", load.peak_running)
    yield _line("Waiting requests, mean:", load.mean_waiting)
    yield _line("Waiting requests, peak:", load.peak_waiting)
    yield _line("Time with a queue (%):", load.queue_share * 100)
    yield _line("Steps:", load.num_steps)
    yield _line("Mean step time (ms):", load.mean_step_s * 1e3)
    yield _line("Mean tokens per step:", load.mean_step_tokens)
    yield _line("Preemptions:", load.preemptions)
    for name, count in load.blocks_moved.items():
        yield _line(MOVES[name], count)
    if load.prefix_cache_queries:
        yield _line("Prefix cache hit rate (%):", load.prefix_cache_hit_rate * 100)


def _fleet(summary: Summary) -> Iterator[str]:
    if summary.fleet is None:
        return
    yield _head(" Fleet ", "=")
    for label, value, _ in fleet_lines(summary.fleet):
        yield _line(f"{label}:", value)


def _kv_pool(summary: Summary) -> Iterator[str]:
    kv, pool_gib = summary.kv, summary.memory.kv_cache_bytes / GIB
    yield _head(" KV-cache memory ", "=")
    yield _line("KV pool per GPU (GiB):", pool_gib)
    yield _line("KV pool (tokens):", kv.fitting_tokens)
    yield _line("Requests of max_model_len that fit:", kv.fitting_requests)
    yield _line("KV use, mean (%):", kv.mean_usage * 100)
    yield _line("KV use, peak (%):", kv.peak_usage * 100)
    if kv.sharing > 1:
        yield _line("Sharing factor:", kv.sharing)
        yield _line("Blocks saved by sharing (%):", 100 * kv.saved_by_sharing)
    yield _head(" Where the pool goes ", "-")
    yield f"{'':<20}{'mean GiB':>10}{'mean %':>8}{'% in queue':>12}"
    for name in KV_CLASSES:
        gib, mean, in_queue = kv.mean[name] * pool_gib, kv.mean[name] * 100, kv.in_queue[name] * 100
        yield f"{KV_LABELS[name]:<20}{_number(gib):>10}{_number(mean, 1):>8}{_number(in_queue, 1):>12}"


def _gpu_memory(summary: Summary) -> Iterator[str]:
    yield _head(" Each GPU's memory at start (GiB) ", "-")
    for part in memory_parts(summary.memory):
        yield _line(f"{part.label}:", part.size_bytes / GIB)
    yield _line("Total:", summary.memory.total_bytes / GIB)


def _head(title: str, fill: str, width: int = _WIDTH) -> str:
    return f"{title:{fill}^{width}}"


def _line(label: str, value: float | str) -> str:
    return f"{label:<{_LABEL}} {_number(value) if isinstance(value, float) else value}"


def _number(value: float, decimals: int = 2) -> str:
    return f"{value:.{decimals}f}" if math.isfinite(value) else "n/a"


def _difference(row: Difference) -> str:
    whole = float(row.a).is_integer() and float(row.b).is_integer()
    small = not whole and max(abs(row.a), abs(row.b)) < 0.1
    a, b = (figure_text(value) if small else _number(value, 0 if whole else 2) for value in (row.a, row.b))
    return f"{row.label:<34}{a:>14}{b:>14}{change(row):>10}"


def _two_names(a: str, b: str) -> tuple[str, str]:
    """The names as column heads: in full when both are short, else A and B."""
    return (a, b) if max(len(a), len(b)) <= 13 and a != b else ("A", "B")
