"""The result of a run in numbers, defined as vLLM's benchmark client and gauges define them.

Client side (`vllm bench serve`): TTFT is first token minus arrival; E2E is finish minus arrival; TPOT is
(E2E - TTFT) / (tokens - 1), requests of one token left out; ITL is the gap between two tokens. All over
completed requests, ITL over all tokens. Engine side: the queue ends when a request is first scheduled.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from servesim.analysis.distribution import Distribution, distribution, weighted_distribution
from servesim.analysis.fleet_use import fleet_use
from servesim.analysis.judgement import judge
from servesim.analysis.run import Run
from servesim.analysis.summary import KvUse, Load, SloCheck, Speculation, Summary
from servesim.analysis.timeline import KV_CLASSES, ExpandedSteps, Timeline, expand_steps, timeline
from servesim.config.scenario import SloConfig
from servesim.config.workload import BurstArrivals, ClosedLoopArrivals, GammaArrivals
from servesim.engine.events import Log

__all__ = ["RequestTimes", "gpus_of", "itl_sample", "request_times", "summarise"]

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Mask = NDArray[np.bool_]

_EXTERNAL = ("round_up", "holes", "free")
_MOVES = ("swapped_out_blocks", "swapped_in_blocks", "preemptions_recomputed", "copied_blocks")
_STATUS = {name: number for number, name in enumerate(Log.STATUSES)}


@dataclass(frozen=True, slots=True)
class RequestTimes:
    """Latencies of every request in the log's order, in seconds; NaN where there is none."""

    completed: Mask
    ttft_s: Floats
    tpot_s: Floats
    """NaN for requests of one token."""
    e2e_s: Floats
    queue_s: Floats


def summarise(run: Run) -> Summary:
    """All result figures of a run."""
    log, scenario = run.log, run.scenario
    column = _request_columns(log)
    times = request_times(log)
    done = times.completed
    arrival_s = column["arrival_s"]
    first_s = float(arrival_s.min()) if len(arrival_s) else 0.0
    last_s = float(arrival_s.max()) if len(arrival_s) else 0.0
    line = timeline(log.steps, first_s)
    finish_s = column["finish_s"][done]
    end_s = log.end_s if log.interrupted or not len(finish_s) else float(finish_s.max())
    duration_s = max(end_s - first_s, 0.0)
    itl, max_output_tokens_per_s = _per_token(line, log, first_s)
    slo, good = _check_slo(scenario.slo, times)
    completed = int(done.sum())
    total_input = int(column["prompt_tokens"][done].sum())
    total_output = int(column["generated_tokens"][done].sum())
    failed = int(np.isin(column["status"], (_STATUS["refused"], _STATUS["lost"])).sum())
    rate, burstiness, concurrency = _arrival_settings(run)
    stands_for = run.stands_for
    num_gpus, price_usd = gpus_of(run)
    summary = Summary(
        name=scenario.name,
        model=run.model.name,
        gpu=run.gpu.name,
        num_gpus=num_gpus,
        price_per_hour_usd=price_usd,
        seed=scenario.seed,
        config_hash=run.config_hash,
        interrupted=log.interrupted,
        num_prompts=len(arrival_s),
        request_rate=rate,
        burstiness=burstiness,
        max_concurrency=concurrency,
        offered_rate=(len(arrival_s) - 1) * stands_for / (last_s - first_s) if last_s > first_s else math.inf,
        duration_s=duration_s,
        completed=completed,
        failed=failed,
        unfinished=len(arrival_s) - completed - failed,
        total_input_tokens=total_input,
        total_output_tokens=total_output,
        request_throughput=_per(completed * stands_for, duration_s),
        request_goodput=_per(good * stands_for, duration_s) if slo else None,
        output_throughput=_per(total_output * stands_for, duration_s),
        total_token_throughput=_per((total_input + total_output) * stands_for, duration_s),
        max_output_tokens_per_s=max_output_tokens_per_s * stands_for,
        max_concurrent_requests=_max_concurrent(arrival_s[done], finish_s),
        ttft=distribution(times.ttft_s[done]),
        tpot=distribution(times.tpot_s[done & ~np.isnan(times.tpot_s)]),
        itl=itl,
        e2el=distribution(times.e2e_s[done]),
        queue=distribution(times.queue_s[done]),
        slo=slo,
        load=_load(line, log, column),
        speculation=_speculation(run),
        fleet=fleet_use(run, line, first_s, end_s),
        kv=_kv_use(run, line),
        memory=run.memory,
        warnings=(),
    )
    scaling = summary.fleet.scaling if summary.fleet else None
    if scaling is not None and scaling.cost_usd is not None and duration_s > 0:
        summary = replace(summary, price_per_hour_usd=scaling.cost_usd / duration_s * 3600)
    return replace(summary, warnings=judge(run, summary, line))


def gpus_of(run: Run) -> tuple[int, float | None]:
    """How many in all, with those that an autoscaler may order, and their price per hour, if all have one."""
    engine, price_usd = run.scenario.engine, run.gpu.price_per_hour_usd
    if run.pools:
        counts = [pool.replicas * pool.gpus_per_replica for pool in run.pools]
        prices = [pool.gpu.price_per_hour_usd for pool in run.pools]
        total = sum((price or 0.0) * count for price, count in zip(prices, counts, strict=True))
        return sum(counts), None if None in prices else total
    num_gpus = engine.tensor_parallel_size * engine.pipeline_parallel_size * run.scenario.num_replicas
    return num_gpus, None if price_usd is None else price_usd * num_gpus


def request_times(log: Log) -> RequestTimes:
    """The latencies of every request, by vLLM's definitions."""
    column = _request_columns(log)
    arrival_s, finish_s = column["arrival_s"], column["finish_s"]
    completed = np.isin(column["status"], (_STATUS["finished_stop"], _STATUS["finished_length"]))
    e2e_s = np.where(completed, finish_s - arrival_s, np.nan)
    ttft_s = column["first_token_s"] - arrival_s
    gaps = column["generated_tokens"] - 1
    tpot_s = np.where(gaps > 0, (e2e_s - ttft_s) / np.maximum(gaps, 1), np.nan)
    return RequestTimes(completed, ttft_s, tpot_s, e2e_s, column["scheduled_s"] - arrival_s)


def itl_sample(log: Log, line: Timeline, steps: ExpandedSteps) -> tuple[Floats, Integers]:
    """Inter-token latencies of all requests, in seconds, and how often each occurs.

    A token that follows one of the step before has waited for exactly one step; the rest are the log's gaps.
    """
    gaps_s = np.array(log.itl_gaps_s, dtype=np.float64)
    weights = line.columns["itl_samples"][steps.row]
    return np.concatenate((steps.duration_s, gaps_s)), np.concatenate(
        (weights, np.ones(len(gaps_s), np.int64))
    )


def _request_columns(log: Log) -> dict[str, NDArray[np.float64]]:
    return {name: np.array(column) for name, column in log.requests.columns.items()}


def _per(amount: float, duration_s: float) -> float:
    return amount / duration_s if duration_s > 0 else math.nan


def _per_token(line: Timeline, log: Log, first_s: float) -> tuple[Distribution, float]:
    """Inter-token latencies, and the most tokens yielded in one second, seconds counted from ``first_s``."""
    steps = expand_steps(line)
    most = _most_in_a_second(steps.end_s - first_s, line.columns["outputs"][steps.row])
    sample = itl_sample(log, line, steps)
    del steps  # as large as what is sorted next
    return weighted_distribution(*sample), most


def _most_in_a_second(times_s: Floats, amounts: Integers) -> float:
    """Times that lie in the same second mostly follow one another: each such stretch is added up first."""
    if not len(times_s):
        return 0.0
    second = np.floor(times_s)
    begins = np.flatnonzero(np.append(True, second[1:] != second[:-1]))
    _, which = np.unique(second[begins], return_inverse=True)
    return float(np.bincount(which, weights=np.add.reduceat(amounts, begins)).max())


def _max_concurrent(arrival_s: Floats, finish_s: Floats) -> int:
    """Most completed requests that touch one and the same second, as vLLM's client counts them."""
    if not len(arrival_s):
        return 0
    begun, ended = (np.sort(np.floor(times_s - arrival_s.min())) for times_s in (arrival_s, finish_s))
    gone = np.searchsorted(ended, begun)  # by the second in which each begins
    return int((np.arange(1, len(begun) + 1) - gone).max())


def _check_slo(slo: SloConfig, times: RequestTimes) -> tuple[tuple[SloCheck, ...], int]:
    """Each limit against its 99th percentile, and the number of requests that keep all limits.

    As in vLLM's goodput, the TPOT of a request of one token counts as 0; a percentile has such a request in
    it only where there are no others.
    """
    done = times.completed
    good = np.ones(int(done.sum()), dtype=np.bool_)
    checks = []
    for metric, limit_s, value_s in (
        ("ttft", slo.ttft_p99_s, times.ttft_s[done]),
        ("tpot", slo.tpot_p99_s, times.tpot_s[done]),
        ("e2el", slo.e2e_p99_s, times.e2e_s[done]),
    ):
        if limit_s is None:
            continue
        kept = ~(value_s > limit_s)
        good &= kept
        known_s = value_s[~np.isnan(value_s)]
        p99_s = distribution(known_s if len(known_s) else np.zeros(len(value_s))).p99_s
        checks.append(SloCheck(metric, limit_s, p99_s, float(kept.mean()) if len(kept) else math.nan))
    return tuple(checks), int(good.sum())


def _arrival_settings(run: Run) -> tuple[float | None, float | None, int | None]:
    """Request rate, burstiness and concurrency as `vllm bench serve` would have been told them."""
    arrivals = run.scenario.workload.arrivals
    if arrivals is None:
        return None, None, None
    if isinstance(arrivals, BurstArrivals):
        return math.inf, None, None
    if isinstance(arrivals, ClosedLoopArrivals):
        return math.inf, None, arrivals.concurrency
    return arrivals.rate_per_s, arrivals.burstiness if isinstance(arrivals, GammaArrivals) else 1.0, None


def _load(line: Timeline, log: Log, column: dict[str, NDArray[np.float64]]) -> Load:
    of = line.columns
    num_steps = int(of["steps"].sum())
    horizon_s = line.horizon_s
    queued = of["waiting"] > 0
    total_s = line.total_s
    busy_s = float(line.duration_s[of["steps"] > 0].sum())
    tokens = of["decodes"] + of["prefill_tokens"]
    draft_tokens = log.counters.get("spec_decode_num_draft_tokens", 0)
    return Load(
        horizon_s=horizon_s,
        num_steps=num_steps,
        busy_share=_per(busy_s, total_s),
        queue_share=_per(float(line.duration_s[queued].sum()), total_s),
        mean_running=line.mean(of["running"], of["running"]),
        peak_running=int(of["running"].max(initial=0)),
        mean_running_in_queue=line.mean(of["running"], of["running"], queued),
        mean_waiting=line.mean(of["waiting"], of["waiting"]),
        peak_waiting=int(of["waiting"].max(initial=0)),
        mean_step_s=_per(busy_s, num_steps),
        mean_step_decodes=_per(int(of["steps"] @ of["decodes"]), num_steps),
        mean_step_tokens=_per(int(of["steps"] @ tokens) + draft_tokens, num_steps),
        preemptions=int(column["preemptions"].sum()),
        preempted_requests=int((column["preemptions"] > 0).sum()),
        admission_failures={
            name: log.counters[key]
            for name in Log.ADMISSION_FAILURES[1:]
            if (key := f"admission_failures_{name}") in log.counters
        },
        prefix_cache_queries=log.counters.get("prefix_cache_queries", 0),
        prefix_cache_hits=log.counters.get("prefix_cache_hits", 0),
        blocks_moved={name: log.counters[name] for name in _MOVES if name in log.counters},
    )


def _speculation(run: Run) -> Speculation | None:
    speculative, counters = run.scenario.engine.speculative, run.log.counters
    if speculative is None:
        return None
    positions = range(speculative.num_speculative_tokens)
    return Speculation(
        counters.get("spec_decode_num_drafts", 0),
        counters.get("spec_decode_num_draft_tokens", 0),
        counters.get("spec_decode_num_accepted_tokens", 0),
        tuple(counters.get(f"spec_decode_num_accepted_tokens_pos_{i}", 0) for i in positions),
    )


def _adds_up(pools: Integers, line: Timeline) -> bool:
    """Whether the pool of each replica has the same size at any time."""
    halves = pools.reshape(2, -1)
    parts = line.parts or (slice(None),)
    return all(np.ptp(halves[:, rows]) == 0 for rows in parts if halves[:, rows].size)


def _kv_use(run: Run, line: Timeline) -> KvUse:
    ends = {name: line.kv(name) for name in KV_CLASSES}
    pools = np.concatenate([sum(pair[end] for pair in ends.values()) for end in (0, 1)])
    queued = line.columns["waiting"] > 0

    def pool_in(where: Mask | None) -> float:
        """Of replicas with pools of several sizes their mean, over the time that is looked at."""
        if not run.pools:
            return int(pools[0]) if len(pools) else 0
        return line.mean(pools[: len(line)], pools[: len(line)], where)

    def shares(where: Mask | None) -> dict[str, float]:
        pool = pool_in(where)
        return {name: _per(line.mean(*pair, where), pool) for name, pair in ends.items()}

    pool = pool_in(None)

    live = line.live()
    usage = np.concatenate(live) / np.maximum(pools, 1)
    stored, reserved, internal, logical = (
        float(line.integral(*line.kv(name)).sum()) for name in ("tokens", "reserved", "internal", "logical")
    )
    empty = reserved + internal  # ends of blocks, which nobody shares: each sharer would have the same
    memory, engine = run.memory, run.scenario.engine
    tokens, requests = memory.kv_cache_tokens, memory.max_concurrency
    if engine.allocator != "paged":
        assert engine.max_model_len is not None
        longest = engine.max_model_len
        if engine.contiguous_fit == "buddy":
            longest = 1 << (longest - 1).bit_length()
        tokens, requests = memory.contiguous_tokens, memory.contiguous_tokens // longest
    mean, in_queue = shares(None), shares(queued)
    return KvUse(
        pool_tokens=round(pool),
        fitting_tokens=tokens,
        fitting_requests=requests,
        mean=mean,
        in_queue=in_queue,
        external=sum(mean[name] for name in _EXTERNAL),
        external_in_queue=sum(in_queue[name] for name in _EXTERNAL),
        mean_usage=_per(line.mean(*live), pool),
        peak_usage=float(usage.max()) if len(usage) else math.nan,
        sharing=_per(logical, stored),
        saved_by_sharing=_per(logical - stored, logical + empty),
        adds_up=_adds_up(pools, line),
    )
