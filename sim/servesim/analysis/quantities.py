"""Every figure of a result that is compared, swept or given an interval: its name and where it stands."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

from servesim.analysis.distribution import Distribution
from servesim.analysis.summary import Summary
from servesim.analysis.timeline import KV_CLASSES
from servesim.units import GIB

__all__ = ["QUANTITIES", "Quantity", "value_of"]


class Quantity(NamedTuple):
    """One figure. ``key`` is its name in JSON: vLLM's where it has one."""

    key: str
    group: str
    label: str
    """With the unit."""
    of: Callable[[Summary], float | None]
    better: int = 0
    """-1: less is better, 1: more is better, 0: neither."""
    quantile: float | None = None
    samples: Callable[[Summary], int] | None = None
    """For a quantile: how many samples it was read from."""

    @property
    def is_share(self) -> bool:
        """A percentage: its difference says more than its ratio."""
        return self.label.endswith("(%)")


def value_of(quantity: Quantity, summary: Summary) -> float:
    """The figure; NaN when the run has none."""
    value = quantity.of(summary)
    return math.nan if value is None else float(value)


def _latency(name: str) -> Iterator[Quantity]:
    """Mean, median and P99 of one latency, in milliseconds."""

    def of(summary: Summary) -> Distribution:
        found: Distribution = getattr(summary, name)
        return found

    title, group = name.upper(), "Latency"
    count: Callable[[Summary], int] = lambda s: of(s).count  # noqa: E731
    yield Quantity(f"mean_{name}_ms", group, f"Mean {title} (ms)", lambda s: of(s).mean_s * 1e3, -1)
    yield Quantity(
        f"median_{name}_ms", group, f"Median {title} (ms)", lambda s: of(s).p50_s * 1e3, -1, 0.5, count
    )
    yield Quantity(f"p99_{name}_ms", group, f"P99 {title} (ms)", lambda s: of(s).p99_s * 1e3, -1, 0.99, count)


def _prompt_per_request(summary: Summary) -> float:
    return summary.total_input_tokens / summary.completed if summary.completed else math.nan


def _computed_per_request(summary: Summary) -> float:
    """Prompt tokens that the prefix cache did not supply."""
    hits = summary.load.prefix_cache_hit_rate
    return _prompt_per_request(summary) * (1.0 if math.isnan(hits) else 1 - hits)


_THROUGHPUT = tuple(
    Quantity(key, "Throughput", label, of, better)
    for key, label, of, better in (
        ("completed", "Successful requests", lambda s: s.completed, 0),
        ("failed", "Failed requests", lambda s: s.failed, -1),
        ("duration", "Benchmark duration (s)", lambda s: s.duration_s, 0),
        ("request_throughput", "Request throughput (req/s)", lambda s: s.request_throughput, 1),
        ("request_goodput", "Request goodput (req/s)", lambda s: s.request_goodput, 1),
        ("output_throughput", "Output token throughput (tok/s)", lambda s: s.output_throughput, 1),
        ("total_token_throughput", "Total token throughput (tok/s)", lambda s: s.total_token_throughput, 1),
        ("prompt_tokens_per_request", "Prompt tokens per request", _prompt_per_request, 0),
        ("computed_tokens_per_request", "Prompt tokens computed per request", _computed_per_request, -1),
    )
)

_LATENCY = (
    *_latency("ttft"),
    *_latency("tpot"),
    *_latency("itl"),
    *_latency("e2el"),
    Quantity("mean_queue_ms", "Latency", "Mean queue time (ms)", lambda s: s.queue.mean_s * 1e3, -1),
)

_ENGINE = tuple(
    Quantity(key, "Engine", label, of, better)
    for key, label, of, better in (
        ("mean_running", "Mean running requests", lambda s: s.load.mean_running, 0),
        (
            "mean_running_in_queue",
            "Mean running while others wait",
            lambda s: s.load.mean_running_in_queue,
            0,
        ),
        ("peak_running", "Peak running requests", lambda s: s.load.peak_running, 0),
        ("mean_waiting", "Mean waiting requests", lambda s: s.load.mean_waiting, -1),
        ("mean_step_ms", "Mean step time (ms)", lambda s: s.load.mean_step_s * 1e3, -1),
        ("preemptions", "Preemptions", lambda s: s.load.preemptions, -1),
        (
            "prefix_cache_hit_rate",
            "Prefix cache hit rate (%)",
            lambda s: s.load.prefix_cache_hit_rate * 100,
            1,
        ),
        (
            "acceptance_length",
            "Acceptance length",
            lambda s: s.speculation.acceptance_length if s.speculation else None,
            1,
        ),
    )
)


def _pool_gib_per_request(summary: Summary) -> float:
    """KV memory of all GPUs that a running request held on average."""
    pool_bytes = summary.memory.kv_cache_bytes * summary.num_gpus
    running = summary.load.mean_running
    return summary.kv.mean_usage * pool_bytes / GIB / running if running else math.nan


def _usd_per(amount_per_s: Callable[[Summary], float]) -> Callable[[Summary], float | None]:
    def of(summary: Summary) -> float | None:
        price, rate = summary.price_per_hour_usd, amount_per_s(summary)
        return None if price is None or not rate > 0 else price / 3600 / rate

    return of


_COST = tuple(
    Quantity(key, "Cost", label, of, -1)
    for key, label, of in (
        ("usd_per_hour", "Price of the GPUs ($/h)", lambda s: s.price_per_hour_usd),
        ("usd_per_request", "Cost per request ($)", _usd_per(lambda s: s.request_throughput)),
        (
            "usd_per_million_output_tokens",
            "Cost per million output tokens ($)",
            _usd_per(lambda s: s.output_throughput / 1e6),
        ),
    )
)


def _kv_shares() -> Iterator[Quantity]:
    for name in KV_CLASSES:
        yield Quantity(
            f"kv_share_{name}",
            "KV-cache memory",
            f"Pool share: {name.replace('_', '-')} (%)",
            lambda s, name=name: s.kv.mean[name] * 100,  # type: ignore[misc]
        )


_KV = (
    Quantity("kv_pool_tokens", "KV-cache memory", "KV pool (tokens)", lambda s: s.kv.fitting_tokens, 1),
    Quantity("kv_mean_usage", "KV-cache memory", "KV use, mean (%)", lambda s: s.kv.mean_usage * 100),
    Quantity("kv_peak_usage", "KV-cache memory", "KV use, peak (%)", lambda s: s.kv.peak_usage * 100),
    Quantity(
        "kv_gib_per_request", "KV-cache memory", "KV per running request (GiB)", _pool_gib_per_request, -1
    ),
    *_kv_shares(),
)

QUANTITIES = {one.key: one for one in (*_THROUGHPUT, *_COST, *_LATENCY, *_ENGINE, *_KV)}
"""By key, in the order in which they are shown."""
