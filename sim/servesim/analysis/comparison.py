"""Two results side by side: what changed, and by what factor."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from servesim.analysis.summary import Summary
from servesim.analysis.timeline import KV_CLASSES

__all__ = ["Difference", "compare_summaries"]


@dataclass(frozen=True, slots=True)
class Difference:
    """One figure of two runs, in the unit of its label."""

    group: str
    label: str
    a: float
    b: float

    @property
    def ratio(self) -> float:
        """b over a; NaN when a is zero or either is missing."""
        return self.b / self.a if self.a else math.nan

    @property
    def is_share(self) -> bool:
        """A percentage: its difference says more than its ratio."""
        return self.label.endswith("(%)")


_Figure = tuple[str, Callable[[Summary], float | None]]

_THROUGHPUT: tuple[_Figure, ...] = (
    ("Successful requests", lambda s: s.completed),
    ("Failed requests", lambda s: s.failed),
    ("Benchmark duration (s)", lambda s: s.duration_s),
    ("Request throughput (req/s)", lambda s: s.request_throughput),
    ("Request goodput (req/s)", lambda s: s.request_goodput),
    ("Output token throughput (tok/s)", lambda s: s.output_throughput),
    ("Total token throughput (tok/s)", lambda s: s.total_token_throughput),
)
_LATENCY: tuple[_Figure, ...] = (
    ("Mean TTFT (ms)", lambda s: s.ttft.mean_s * 1e3),
    ("Median TTFT (ms)", lambda s: s.ttft.median_s * 1e3),
    ("P99 TTFT (ms)", lambda s: s.ttft.p99_s * 1e3),
    ("Mean TPOT (ms)", lambda s: s.tpot.mean_s * 1e3),
    ("P99 TPOT (ms)", lambda s: s.tpot.p99_s * 1e3),
    ("P99 ITL (ms)", lambda s: s.itl.p99_s * 1e3),
    ("Mean E2EL (ms)", lambda s: s.e2el.mean_s * 1e3),
    ("P99 E2EL (ms)", lambda s: s.e2el.p99_s * 1e3),
    ("Mean queue time (ms)", lambda s: s.queue.mean_s * 1e3),
)
_ENGINE: tuple[_Figure, ...] = (
    ("Mean running requests", lambda s: s.load.mean_running),
    ("Mean running while others wait", lambda s: s.load.mean_running_in_queue),
    ("Peak running requests", lambda s: s.load.peak_running),
    ("Mean waiting requests", lambda s: s.load.mean_waiting),
    ("Mean step time (ms)", lambda s: s.load.mean_step_s * 1e3),
    ("Preemptions", lambda s: s.load.preemptions),
    ("Prefix cache hit rate (%)", lambda s: s.load.prefix_cache_hit_rate * 100),
    ("Acceptance length", lambda s: s.speculation.acceptance_length if s.speculation else None),
)
_KV: tuple[_Figure, ...] = (
    ("KV pool (tokens)", lambda s: s.kv.fitting_tokens),
    ("KV use, mean (%)", lambda s: s.kv.mean_usage * 100),
    ("KV use, peak (%)", lambda s: s.kv.peak_usage * 100),
)


def compare_summaries(a: Summary, b: Summary) -> tuple[Difference, ...]:
    """The figures that a comparison shows, in its order; a figure that neither run has is left out."""
    groups = (
        ("Throughput", _THROUGHPUT),
        ("Latency", _LATENCY),
        ("Engine", _ENGINE),
        ("KV-cache memory", (*_KV, *_kv_shares())),
    )
    rows = (
        Difference(group, label, _number(figure(a)), _number(figure(b)))
        for group, figures in groups
        for label, figure in figures
    )
    return tuple(row for row in rows if not (math.isnan(row.a) and math.isnan(row.b)))


def _kv_shares() -> Iterator[_Figure]:
    for name in KV_CLASSES:
        yield f"Pool share: {name.replace('_', '-')} (%)", lambda s, name=name: s.kv.mean[name] * 100  # type: ignore[misc]


def _number(value: float | None) -> float:
    return math.nan if value is None else value
