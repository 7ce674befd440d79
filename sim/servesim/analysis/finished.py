"""Finished reports, read back from their JSON, and what sets several of them apart."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from servesim.analysis.caveats import Caveat, Warned
from servesim.analysis.shares import FRAGMENT_CLASSES
from servesim.errors import ConfigError, Problem

__all__ = ["Finished", "Row", "compare_finished", "fragmentation_rows", "other_traffic", "read_finished"]

_GIB = 2**30
_FIGURES = (
    ("Throughput", "Successful requests", "completed", 1),
    ("Throughput", "Failed requests", "failed", 1),
    ("Throughput", "Benchmark duration (s)", "duration", 1),
    ("Throughput", "Request throughput (req/s)", "request_throughput", 1),
    ("Throughput", "Request goodput (req/s)", "request_goodput", 1),
    ("Throughput", "Output token throughput (tok/s)", "output_throughput", 1),
    ("Latency", "Mean TTFT (ms)", "mean_ttft_ms", 1),
    ("Latency", "P99 TTFT (ms)", "p99_ttft_ms", 1),
    ("Latency", "Mean TPOT (ms)", "mean_tpot_ms", 1),
    ("Latency", "P99 TPOT (ms)", "p99_tpot_ms", 1),
    ("Latency", "P99 ITL (ms)", "p99_itl_ms", 1),
    ("Latency", "Mean E2EL (ms)", "mean_e2el_ms", 1),
    ("Latency", "Mean queue time (ms)", "mean_queue_ms", 1),
    ("Engine", "Mean running requests", "engine.mean_running", 1),
    ("Engine", "Mean running while others wait", "engine.mean_running_in_queue", 1),
    ("Engine", "Mean waiting requests", "engine.mean_waiting", 1),
    ("Engine", "Preemptions", "preemptions", 1),
    ("Engine", "Prefix cache hit rate (%)", "prefix_cache_hit_rate", 100),
    ("KV-cache memory", "KV pool (tokens)", "kv_cache.pool_tokens", 1),
    ("KV-cache memory", "KV use, mean (%)", "kv_cache.mean_usage", 100),
    ("KV-cache memory", "KV use, peak (%)", "kv_cache.peak_usage", 100),
)
_LOSSES = (
    ("Lost of the pool (%)", "fragmentation.pressed.lost", 100.0),
    ("Lost memory (GiB)", "fragmentation.cost.lost_bytes", 1 / _GIB),
    ("Lost memory in GPUs", "fragmentation.cost.lost_gpus", 1.0),
    ("Price of those GPUs ($/h)", "fragmentation.cost.lost_usd_per_hour", 1.0),
    ("$ per million output tokens", "fragmentation.cost.usd_per_million_output_tokens", 1.0),
    ("Batch that fits, by closed form", "fragmentation.closed_form.requests_that_fit", 1.0),
    ("Slots never filled per request", "fragmentation.waste_per_request.mean_slots", 1.0),
    ("Sharing factor", "fragmentation.sharing_factor", 1.0),
)


@dataclass(frozen=True, slots=True)
class Finished:
    """A result object (report/as_json.py) under a name."""

    name: str
    result: Mapping[str, Any]

    def figure(self, path: str) -> float:
        """A figure by its path; NaN when the result has none."""
        value: Any = self.result
        for key in path.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        if value == "inf":
            return math.inf
        return float(value) if isinstance(value, int | float) else math.nan


@dataclass(frozen=True, slots=True)
class Row:
    """One figure of several results; NaN where one has none."""

    group: str
    label: str
    values: tuple[float, ...]


def read_finished(path: Path) -> Finished:
    """The ``result.json`` of an earlier run; raises ConfigError when the file is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(_problem("cannot be read", path, error.strerror or str(error))) from error
    except ValueError as error:
        raise ConfigError(_problem("is not JSON", path, str(error))) from error
    if not isinstance(value, dict) or value.get("backend") != "servesim" or "kv_cache" not in value:
        raise ConfigError(_problem("is not the result of a run", path, ""))
    return Finished(str(value.get("label") or path.stem), value)


def compare_finished(results: Sequence[Finished]) -> tuple[Row, ...]:
    """The figures that a comparison shows; one that no result has is left out."""
    rows = [
        Row(group, label, tuple(one.figure(path) * factor for one in results))
        for group, label, path, factor in _FIGURES
    ]
    return tuple(row for row in rows if not all(map(math.isnan, row.values))) + fragmentation_rows(results)


def fragmentation_rows(results: Sequence[Finished]) -> tuple[Row, ...]:
    """Where the memory went, class by class, and what the loss costs."""
    group = "Fragmentation while requests wait, if they do"
    paths = [
        *(
            (f"Pool share: {name} (%)", f"fragmentation.pressed.classes.{name}.mean", 100.0)
            for name in FRAGMENT_CLASSES
        ),
        *_LOSSES,
    ]
    rows = [
        Row(group, label, tuple(one.figure(path) * factor for one in results))
        for label, path, factor in paths
    ]
    return tuple(row for row in rows if any(value > 0 for value in row.values))


def other_traffic(results: Sequence[Finished]) -> tuple[Warned, ...]:
    """A warning for each result whose requests are not those of the first one."""
    first = results[0]
    found = ((one, _traffic_differs(first, one)) for one in results[1:])
    return tuple(Caveat.OTHER_TRAFFIC.say(a=first.name, b=one.name, what=what) for one, what in found if what)


def _traffic_differs(a: Finished, b: Finished) -> str:
    """What differs, in words; lengths count where all were served, rates where arrivals wait for nothing."""
    looked_at = [("{:,.0f} and {:,.0f} requests", "num_prompts")]
    if all(one.figure("completed") == one.figure("num_prompts") for one in (a, b)):
        looked_at.append(("{:,.0f} and {:,.0f} prompt tokens", "total_input_tokens"))
    if all(math.isfinite(one.figure("request_rate")) for one in (a, b)):
        looked_at.append(("{:.4g} and {:.4g} req/s", "request_rate"))
    elif all(math.isnan(one.figure(key)) for one in (a, b) for key in ("request_rate", "max_concurrency")):
        looked_at.append(("{:.4g} and {:.4g} req/s", "offered_request_rate"))
    found = ((words, a.figure(path), b.figure(path)) for words, path in looked_at)
    differ = (one for one in found if not math.isclose(one[1], one[2], rel_tol=1e-6))
    return ", ".join(words.format(left, right) for words, left, right in differ)


def _problem(what: str, path: Path, got: str) -> Problem:
    step = "give the result.json that `servesim run` wrote"
    return Problem(what, file=str(path), got=got, next_step=step)
