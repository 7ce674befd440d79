"""Where the KV memory of a run went, what it should have been by closed form, and what the loss costs.

Definitions follow the PagedAttention paper (arXiv 2309.06180, section 3 and figure 2). Two things it leaves
open are decided here: the empty end of a request's last block counts as reserved while it will still be
filled and as internal once it never will; free slots that the watermark keeps back are a class of their own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from servesim.analysis.closed_form import PerRequest, per_request, served_requests
from servesim.analysis.metrics import gpus_of, summarise
from servesim.analysis.quantities import QUANTITIES
from servesim.analysis.run import Run
from servesim.analysis.shares import Shares, class_slots, pooled, shares_of
from servesim.analysis.summary import Summary
from servesim.analysis.timeline import Timeline, timeline

__all__ = ["Cost", "Fragmentation", "Identity", "RequestWaste", "average", "fragmentation"]

Integers = NDArray[np.int64]

_DOTS = 1200
_WASTE_EDGES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@dataclass(frozen=True, slots=True)
class Identity:
    """The check that the classes add up to the pool."""

    pool_slots: int
    instants: int
    """At how many it was checked: the begin and the end of every row of steps."""
    worst_slots: int
    """Largest deviation; anything but 0 is an error of the simulator."""

    @property
    def holds(self) -> bool:
        """The classes added up each time."""
        return self.worst_slots == 0


@dataclass(frozen=True, slots=True)
class RequestWaste:
    """Slots that requests were given and never filled."""

    output_tokens: tuple[int, ...]
    wasted: tuple[int, ...]
    """Of a sample of the requests, one value each, by output length."""
    mean: float
    """Slots, over all requests."""
    over_reservation: float
    """Slots asked for over slots filled."""
    edges: tuple[float, ...]
    counts: tuple[int, ...]
    """Requests by the share of their slots that stayed empty; bin i is edges[i] to edges[i + 1]."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What the lost share of the pool amounts to, all GPUs together."""

    pool_bytes: float
    lost_bytes: float
    """Mean, while requests wait, or over the whole run when they hardly do (``Fragmentation.pressed``)."""
    lost_gpus: float
    """GPUs whose whole KV pool would be as large."""
    lost_usd_per_hour: float | None
    """Price of those GPUs; None where the GPU's file gives no price."""
    usd_per_million_output_tokens: float | None


@dataclass(frozen=True, slots=True)
class Fragmentation:
    """The fragmentation report of one run (or of the mean of several) in numbers."""

    name: str
    allocator: str
    block_size: int | None
    seeds: tuple[int, ...]
    identity: Identity
    whole: Shares
    in_queue: Shares | None
    """While a request waits; None when none ever did."""
    predicted: PerRequest | None
    running: float
    running_in_queue: float
    sharing: float
    waste: RequestWaste
    pool_bytes: float
    """Of all GPUs."""
    num_gpus: int
    gpu_usd_per_hour: float | None
    """Of each, on average; None where a GPU's file gives no price."""
    usd_per_million_output_tokens: float | None
    preemptions: int
    evicted_blocks: int
    refused: int
    failures: Mapping[str, int]
    """Requests that waited at the head of the queue, by cause; one counts once for each."""
    request_throughput: float
    output_throughput: float
    p99_ttft_s: float
    p99_tpot_s: float

    @property
    def failed_fit_rate(self) -> float:
        """Share of those that memory kept waiting for whom enough was free, in holes that were too small."""
        memory, fit = (self.failures.get(f"admission_failures_{why}", 0) for why in ("memory", "fit"))
        return fit / (memory + fit) if memory + fit else math.nan

    @property
    def has_queue(self) -> bool:
        """Requests wait often enough (a twentieth of the time) for a mean over that time to say something."""
        return self.in_queue is not None and self.in_queue.time_s >= 0.05 * self.whole.time_s

    @property
    def pressed(self) -> Shares:
        """The shares when memory is worth most: while requests wait; of the whole run when they hardly do."""
        return self.in_queue if self.in_queue and self.has_queue else self.whole

    @property
    def pressed_running(self) -> float:
        """The batch attained then."""
        return self.running_in_queue if self.has_queue else self.running

    @property
    def cost(self) -> Cost:
        """What the share amounts to that is lost when memory is worth most."""
        lost, price_usd = self.pressed.lost, self.gpu_usd_per_hour
        return Cost(
            pool_bytes=self.pool_bytes,
            lost_bytes=self.pool_bytes * lost,
            lost_gpus=self.num_gpus * lost,
            lost_usd_per_hour=None if price_usd is None else self.num_gpus * lost * price_usd,
            usd_per_million_output_tokens=self.usd_per_million_output_tokens,
        )

    def predicted_shares(self) -> dict[str, float] | None:
        """By closed form, for the batch attained when it counts."""
        return self.predicted.shares(self.pressed_running) if self.predicted else None


def fragmentation(run: Run, summary: Summary | None = None, name: str | None = None) -> Fragmentation | None:
    """The account of one run; None when no step ever took any time, and for KV pools of several sizes.

    Raises ArithmeticError when the classes do not add up to the pool at every row of the log.
    """
    summary = summary or summarise(run)
    arrival_s = np.array(run.log.requests.columns["arrival_s"])
    line = timeline(run.log.steps, float(arrival_s.min()) if len(arrival_s) else 0.0)
    if not len(line) or len({pool.memory.kv_cache_tokens for pool in run.pools}) > 1:
        return None
    engine, (num_gpus, price_usd) = run.scenario.engine, gpus_of(run)
    watermark = int(engine.watermark * run.memory.num_gpu_blocks) * engine.block_size
    watermark_slots = watermark if engine.allocator == "paged" else 0
    identity = _identity(line, watermark_slots)
    whole = shares_of(line, identity.pool_slots, watermark_slots, queued_only=False)
    if whole is None:
        return None
    in_queue = shares_of(line, identity.pool_slots, watermark_slots, queued_only=True)
    return Fragmentation(
        name=name or summary.name,
        allocator=engine.allocator,
        block_size=engine.block_size if engine.allocator == "paged" else None,
        seeds=(summary.seed,),
        identity=identity,
        whole=whole,
        in_queue=in_queue,
        predicted=per_request(run, identity.pool_slots),
        running=summary.load.mean_running,
        running_in_queue=summary.load.mean_running_in_queue,
        sharing=summary.kv.sharing,
        waste=_request_waste(run),
        pool_bytes=float(summary.memory.kv_cache_bytes * num_gpus),
        num_gpus=num_gpus,
        gpu_usd_per_hour=None if price_usd is None else price_usd / num_gpus,
        usd_per_million_output_tokens=QUANTITIES["usd_per_million_output_tokens"].of(summary),
        preemptions=summary.load.preemptions,
        evicted_blocks=run.log.counters.get("evicted_blocks", 0),
        refused=summary.failed,
        failures={key: n for key, n in run.log.counters.items() if key.startswith("admission_failures_")},
        request_throughput=summary.request_throughput,
        output_throughput=summary.output_throughput,
        p99_ttft_s=summary.ttft.p99_s,
        p99_tpot_s=summary.tpot.p99_s,
    )


_AVERAGED = (
    "usd_per_million_output_tokens",
    "running",
    "running_in_queue",
    "sharing",
    "request_throughput",
    "output_throughput",
    "p99_ttft_s",
    "p99_tpot_s",
)


def average(replications: Sequence[Fragmentation]) -> Fragmentation:
    """Runs of several seeds as one: means, and intervals from how the seeds differ.

    The sample of requests and the closed form are the first seed's; counters are sums.
    """
    first = replications[0]
    if len(replications) == 1:
        return first
    queued = [one.in_queue for one in replications if one.in_queue is not None]
    return replace(
        first,
        seeds=tuple(seed for one in replications for seed in one.seeds),
        identity=replace(
            first.identity,
            instants=sum(one.identity.instants for one in replications),
            worst_slots=max(one.identity.worst_slots for one in replications),
        ),
        whole=pooled([one.whole for one in replications]),
        in_queue=pooled(queued) if len(queued) == len(replications) else None,
        preemptions=sum(one.preemptions for one in replications),
        evicted_blocks=sum(one.evicted_blocks for one in replications),
        refused=sum(one.refused for one in replications),
        failures={key: sum(one.failures.get(key, 0) for one in replications) for key in first.failures},
        **_means(replications),
    )


def _means(replications: Sequence[Fragmentation]) -> dict[str, Any]:
    values = {key: [getattr(one, key) for one in replications] for key in _AVERAGED}
    return {key: None if None in of else float(np.mean(of)) for key, of in values.items()}


def _identity(line: Timeline, watermark_slots: int) -> Identity:
    slots = class_slots(line, watermark_slots)
    sums = np.concatenate([sum(pair[end] for pair in slots.values()) for end in (0, 1)])
    pool = int(sums[0])
    worst = int(np.abs(sums - pool).max())
    negative = min(int(min(pair[0].min(), pair[1].min())) for pair in slots.values())
    if worst or negative < 0:
        raise ArithmeticError(f"KV classes are off by {worst} of {pool} slots, the smallest is {negative}")
    return Identity(pool, len(sums), worst)


def _request_waste(run: Run) -> RequestWaste:
    served = served_requests(run)
    output, wasted, asked = served.output, served.wasted, served.requested
    if not len(output):
        return RequestWaste((), (), math.nan, math.nan, _WASTE_EDGES, (0,) * (len(_WASTE_EDGES) - 1))
    order = np.argsort(output, kind="stable")
    if len(order) > _DOTS:
        order = order[np.linspace(0, len(order) - 1, _DOTS).astype(np.int64)]
    return RequestWaste(
        output_tokens=tuple(output[order].tolist()),
        wasted=tuple(wasted[order].tolist()),
        mean=float(wasted.mean()),
        over_reservation=float(asked.sum() / (asked - wasted).sum()),
        edges=_WASTE_EDGES,
        counts=tuple(np.histogram(wasted / asked, _WASTE_EDGES)[0].tolist()),
    )
