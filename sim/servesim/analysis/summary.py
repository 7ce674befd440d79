"""The shape of a result: every figure of one run, in SI units, with its meaning."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from servesim.analysis.caveats import Warned
from servesim.analysis.distribution import Distribution

if TYPE_CHECKING:
    from servesim.cost.memory import MemoryBudget

__all__ = [
    "FleetUse",
    "KvUse",
    "Load",
    "PoolUse",
    "ScaleUse",
    "SloCheck",
    "Speculation",
    "Summary",
    "TransferUse",
]


@dataclass(frozen=True, slots=True)
class SloCheck:
    """A limit of the scenario beside what the run attained."""

    metric: str
    limit_s: float
    p99_s: float
    """NaN when no request completed."""
    within: float
    """Share of the completed requests that keep the limit."""

    @property
    def met(self) -> bool:
        """The limit holds for the 99th percentile."""
        return self.p99_s <= self.limit_s


@dataclass(frozen=True, slots=True)
class Load:
    """How full the engine was. Means over time run from the first arrival to the end of the last step.

    Of a fleet they are means over all replicas; one that an autoscaler has not ordered counts as idle.
    """

    horizon_s: float
    num_steps: int
    busy_share: float
    """Share of the horizon in which a step ran."""
    queue_share: float
    """Share of the horizon in which a request waited."""
    mean_running: float
    peak_running: int
    mean_running_in_queue: float
    """Mean of the running requests while others waited: the batch that the memory or the limits allow."""
    mean_waiting: float
    peak_waiting: int
    mean_step_s: float
    mean_step_decodes: float
    mean_step_tokens: float
    preemptions: int
    preempted_requests: int
    admission_failures: dict[str, int]
    """Requests that had to wait at the head of the queue, by reason (Log.ADMISSION_FAILURES); empty where a
    log does not count them."""
    prefix_cache_queries: int
    prefix_cache_hits: int
    blocks_moved: dict[str, int]
    """Blocks swapped out and in, preemptions that found no room and recomputed, blocks copied on write; empty
    where an engine does none of these."""

    @property
    def prefix_cache_hit_rate(self) -> float:
        """Prompt tokens found in the prefix cache over prompt tokens looked up; NaN without a look-up."""
        return self.prefix_cache_hits / self.prefix_cache_queries if self.prefix_cache_queries else math.nan


@dataclass(frozen=True, slots=True)
class KvUse:
    """Shares of the KV pool by class (`KV_CLASSES`), averaged over time, and over replicas as in Load."""

    pool_tokens: int
    """Token slots of the pool; a model with several groups of layers takes one in each for every token."""
    fitting_tokens: int
    """Tokens of context that fit at once."""
    fitting_requests: float
    """Requests of max_model_len that fit at once."""
    mean: dict[str, float]
    """Over the whole horizon."""
    in_queue: dict[str, float]
    """While a request waits; NaN when none ever did."""
    mean_usage: float
    """Mean share allocated to live requests: what vLLM's kv_cache_usage gauge shows."""
    peak_usage: float
    sharing: float
    """Logical over physical token slots: 1 when no two requests share a block; NaN with nothing stored."""
    saved_by_sharing: float
    """Slots of blocks that sharing saves, over those that would be allocated without it: the "memory saving"
    of the PagedAttention paper's Figure 15; NaN with nothing stored."""
    external: float
    """Share of the pool in nobody's requested size (round-up, holes, free) over the whole horizon: "external
    fragmentation and others" of the PagedAttention paper's Figure 2, which was taken under saturation."""
    external_in_queue: float
    """The same while a request waits; NaN when none ever did."""
    adds_up: bool
    """The seven classes added up to the same pool at the begin and end of every row."""


@dataclass(frozen=True, slots=True)
class Speculation:
    """Speculative decoding as vLLM counts it; a draft is one verification of a request."""

    num_drafts: int
    draft_tokens: int
    accepted_tokens: int
    accepted_per_position: tuple[int, ...]

    @property
    def acceptance_rate(self) -> float:
        """Accepted over proposed tokens; NaN when nothing was proposed."""
        return self.accepted_tokens / self.draft_tokens if self.draft_tokens else math.nan

    @property
    def acceptance_length(self) -> float:
        """Mean tokens that a verification yields: the accepted ones and one more."""
        return 1 + self.accepted_tokens / self.num_drafts if self.num_drafts else math.nan

    @property
    def position_rates(self) -> tuple[float, ...]:
        """Share of the verifications in which at least 1, 2, ... tokens were accepted."""
        return tuple(n / self.num_drafts if self.num_drafts else math.nan for n in self.accepted_per_position)


@dataclass(frozen=True, slots=True)
class PoolUse:
    """How full the replicas of one pool were, on average over them and over time."""

    name: str
    serves: str
    replicas: int
    gpu: str
    num_gpus: int
    """Of the whole pool."""
    requests: int
    """That began there; in pools that serve decode, that came from those that serve prefill."""
    busy_share: float
    mean_running: float
    mean_waiting: float
    kv_usage: float


@dataclass(frozen=True, slots=True)
class TransferUse:
    """The KV caches that went over the link; all three are seconds of one request."""

    count: int
    link: str
    blocks_wait: Distribution
    """From the end of the prompt until the decoding replica had blocks for it."""
    link_wait: Distribution
    """From then until both ports were free."""
    time: Distribution
    """On the link."""


@dataclass(frozen=True, slots=True)
class ScaleUse:
    """What an autoscaler ordered, from the first arrival to the end."""

    gpu_hours: float
    """From the order for a replica until it is given back."""
    cost_usd: float | None
    """None where the GPU's file gives no price."""
    mean_paid: float
    """Replicas."""
    mean_serving: float
    peak_serving: int
    orders: int
    """After the begin."""


@dataclass(frozen=True, slots=True)
class FleetUse:
    """What happened to the replicas of a fleet, and to requests because of it."""

    replicas: int
    failures: int
    """Those that came while there was something to serve."""
    up_share: float
    """Share of the replicas' time in which they were not down."""
    aborts: int
    """Requests in flight on a replica that failed; one that meets two failures counts twice."""
    retried: int
    """Requests that another replica began anew."""
    lost: int
    wasted_tokens: int
    """Output tokens of aborted requests, thrown away."""
    pools: tuple[PoolUse, ...] = ()
    """Where they differ."""
    scaling: ScaleUse | None = None
    """Where an autoscaler orders replicas."""
    transfers: TransferUse | None = None
    """Where prompts and outputs are computed by different replicas."""


@dataclass(frozen=True, slots=True)
class Summary:
    """Everything that the result block, the JSON and the comparison of two runs need."""

    name: str
    model: str
    gpu: str
    num_gpus: int
    price_per_hour_usd: float | None
    """Of all the GPUs; None where the GPU's file gives no price."""
    seed: int
    config_hash: str
    interrupted: bool
    num_prompts: int
    request_rate: float | None
    """Configured, requests per second; inf: a burst or a closed loop; None: a trace with its own times."""
    burstiness: float | None
    max_concurrency: int | None
    offered_rate: float
    """Requests per second that in fact arrived, between the first and the last arrival."""
    duration_s: float
    """First arrival to last finish (to the end of the simulation when it was interrupted)."""
    completed: int
    failed: int
    """Refused, or lost with a replica."""
    unfinished: int
    total_input_tokens: int
    total_output_tokens: int
    request_throughput: float
    request_goodput: float | None
    """Completed requests per second that keep every limit of the SLO; None without an SLO."""
    output_throughput: float
    total_token_throughput: float
    max_output_tokens_per_s: float
    max_concurrent_requests: int
    ttft: Distribution
    tpot: Distribution
    itl: Distribution
    e2el: Distribution
    queue: Distribution
    slo: tuple[SloCheck, ...]
    load: Load
    speculation: Speculation | None
    """None without speculative decoding."""
    fleet: FleetUse | None
    """None for a fleet to which nothing happens."""
    kv: KvUse
    memory: MemoryBudget
    warnings: tuple[Warned, ...]
