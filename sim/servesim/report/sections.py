"""The tables and headlines of the HTML pages, as rows of finished text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal

from servesim.analysis.comparison import compare_summaries
from servesim.analysis.run import Run
from servesim.analysis.summary import Summary
from servesim.analysis.timeline import KV_CLASSES
from servesim.report.words import (
    KV_LABELS,
    KV_MEANINGS,
    LATENCY_NAMES,
    change,
    figure_text,
    memory_parts,
    verdict,
)
from servesim.units import GIB, format_count, format_seconds, format_share

__all__ = [
    "Card",
    "Table",
    "comparison_tables",
    "configuration",
    "headlines",
    "kv_classes",
    "latencies",
    "memory",
    "provenance",
    "slo",
    "sources",
    "subtitle",
]


@dataclass(frozen=True, slots=True)
class Card:
    """One headline number."""

    label: str
    value: str
    unit: str
    note: str


@dataclass(frozen=True, slots=True)
class Table:
    """A table; the first column names the row, ``swatches`` names the KV class whose colour a row shows."""

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    kind: Literal["numbers", "words", "paths"] = "numbers"
    swatches: tuple[str, ...] = ()


def subtitle(run: Run, summary: Summary) -> str:
    """What was simulated, in one line."""
    gpus = f"{summary.num_gpus} × {run.gpu.label}"
    if run.pools:
        counts = Counter[str]()
        for pool in run.pools:
            counts[pool.gpu.label] += pool.replicas * pool.gpus_per_replica
        gpus = " and ".join(f"{count} × {label}" for label, count in counts.items())
    took = format_seconds(summary.duration_s)
    return (
        f"{run.model.label} on {gpus}, vLLM {run.scenario.engine.version}: "
        f"{format_count(summary.num_prompts)} requests in {took}"
    )


def headlines(summary: Summary) -> tuple[Card, ...]:
    """The numbers to read first."""
    load, kv = summary.load, summary.kv
    goodput = summary.request_goodput
    kept = f"{goodput:.2f} req/s keep the SLO" if goodput is not None else f"{summary.completed:,} completed"
    hits = load.prefix_cache_hit_rate
    found = "prefix cache not in use" if hits != hits else f"prefix cache hit rate {format_share(hits)}"
    return (
        Card(
            "Output throughput",
            _digits(summary.output_throughput),
            "tok/s",
            f"peak {_digits(summary.max_output_tokens_per_s)} tok/s in one second",
        ),
        Card("Request throughput", f"{summary.request_throughput:.2f}", "req/s", kept),
        _latency_card("Time to first token", summary.ttft.p50_s, summary.ttft.p99_s),
        _latency_card("Time per output token", summary.tpot.p50_s, summary.tpot.p99_s),
        _latency_card("End to end", summary.e2el.p50_s, summary.e2el.p99_s),
        Card(
            "Batch attained",
            _digits(load.mean_running),
            "running",
            f"peak {load.peak_running:,}; {_digits(load.mean_waiting)} waiting on average",
        ),
        Card("KV pool in use", *_split(format_share(kv.mean_usage)), f"peak {format_share(kv.peak_usage)}"),
        Card("Preemptions", f"{load.preemptions:,}", "", found),
    )


def latencies(summary: Summary) -> Table:
    """Mean and percentiles of every latency, in milliseconds."""
    distributions = {
        **{title: getattr(summary, name) for name, title in LATENCY_NAMES.items()},
        "Queue time": summary.queue,
    }
    rows = tuple(
        (
            title,
            *(_ms(value_s) for value_s in (of.mean_s, of.std_s, of.p50_s, of.p90_s, of.p95_s, of.p99_s)),
        )
        for title, of in distributions.items()
    )
    return Table("Latencies in milliseconds", ("Latency", "Mean", "Std", "Median", "P90", "P95", "P99"), rows)


def slo(summary: Summary) -> Table:
    """Every limit of the scenario against what was attained."""
    rows = tuple(
        (
            f"P99 {check.metric.upper()}",
            f"{_ms(check.limit_s)} ms",
            f"{_ms(check.p99_s)} ms",
            format_share(check.within),
            verdict(check),
        )
        for check in summary.slo
    )
    return Table("Service level", ("Limit on", "Limit", "Attained", "Requests within", "Verdict"), rows)


def kv_classes(summary: Summary) -> Table:
    """Where the KV pool goes, class by class, averaged over time."""
    kv, pool_gib = summary.kv, summary.memory.kv_cache_bytes / GIB
    rows = tuple(
        (
            KV_LABELS[name],
            KV_MEANINGS[name],
            f"{kv.mean[name] * pool_gib:.2f}",
            format_share(kv.mean[name]),
            format_share(kv.in_queue[name]),
        )
        for name in KV_CLASSES
    )
    head = ("Class", "A slot of the pool that", "Mean GiB", "Whole run", "While requests wait")
    return Table("Where the KV pool goes, averaged over time", head, rows, swatches=KV_CLASSES)


def memory(summary: Summary) -> Table:
    """The memory of one GPU, part by part."""
    total = summary.memory.total_bytes
    rows = [
        (part.label, f"{part.size_bytes / GIB:.2f}", format_share(part.size_bytes / total))
        for part in memory_parts(summary.memory)
    ]
    rows.append(("Total", f"{total / GIB:.2f}", format_share(1.0)))
    return Table("Memory of each GPU at start", ("Part", "GiB", "Share"), tuple(rows))


def configuration(run: Run) -> Table:
    """Every value of the scenario, defaults filled in, by its path."""
    rows = tuple(_flat("", run.scenario.model_dump(mode="json", exclude_none=True)))
    return Table("Scenario", ("Setting", "Value"), rows, "paths")


def provenance(run: Run, summary: Summary) -> Table:
    """What it takes to get the same numbers again."""
    rows = (
        ("servesim", version("servesim")),
        ("Seed", str(summary.seed)),
        ("Configuration hash", summary.config_hash),
        ("GPU", f"{run.gpu.label} ({run.gpu.name})"),
        ("Kernel efficiency", run.gpu.efficiency.provenance),
        ("Model", f"{run.model.label} ({run.model.name})"),
        ("Model configuration", run.model.source),
    )
    return Table("Provenance", ("What", "Value"), rows, "words")


def sources(run: Run) -> Table:
    """Where every number of the GPU's profile comes from; the unverified ones first."""
    ordered = sorted(run.gpu.sources.items(), key=lambda item: item[1] != "unverified")
    return Table(f"Sources of {run.gpu.label}", ("Field", "Source"), tuple(ordered), "paths")


def comparison_tables(a: Summary, b: Summary) -> tuple[Table, ...]:
    """The differences of two runs, one table for each group of figures."""
    groups: dict[str, list[tuple[str, ...]]] = {}
    for row in compare_summaries(a, b):
        groups.setdefault(row.group, []).append((row.label, _figure(row.a), _figure(row.b), change(row)))
    return tuple(Table(group, (group, "A", "B", "B to A"), tuple(rows)) for group, rows in groups.items())


def _latency_card(label: str, median_s: float, p99_s: float) -> Card:
    return Card(label, *_split(format_seconds(median_s)), f"median; P99 {format_seconds(p99_s)}")


def _split(text: str) -> tuple[str, str]:
    """``12.3 ms`` as value and unit; longer texts (``3 min 20 s``) stay whole."""
    value, _, unit = text.partition(" ")
    return (text, "") if " " in unit else (value, unit)


def _flat(path: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flat(f"{path}.{key}" if path else key, item)
    elif value != "":
        yield path, str(value).lower() if isinstance(value, bool) else str(value)


def _digits(value: float) -> str:
    return "n/a" if value != value else f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _ms(value_s: float) -> str:
    return "n/a" if value_s != value_s else f"{value_s * 1e3:,.1f}"


def _figure(value: float) -> str:
    if 0 < abs(value) < 0.1:
        return figure_text(value)
    return "n/a" if value != value else f"{value:,.0f}" if float(value).is_integer() else f"{value:,.2f}"
