"""Which caveats a result has earned."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from servesim.analysis.caveats import RELIABLE_COMPLETIONS, Caveat, Warned
from servesim.analysis.run import Run
from servesim.analysis.summary import Summary
from servesim.analysis.timeline import Timeline
from servesim.analysis.warmup import arrival_span_s
from servesim.config.workload import BurstArrivals, ClosedLoopArrivals
from servesim.engine.events import Log

__all__ = ["judge", "overload_per_s"]


def judge(run: Run, summary: Summary, line: Timeline) -> tuple[Warned, ...]:
    """All warnings of a run, the ones that touch the most figures first."""
    return (*_ends(run, summary), *_load(run, summary, line), *_statistics(summary), *_memory(run, summary))


def overload_per_s(run: Run, line: Timeline) -> float:
    """By how many requests per second the queue (of a fleet: all queues) grows to the end; 0 if it does not.

    Least squares on 20 time-binned means over the second half of the time in which requests, or sessions,
    begin: a queue that fills at the begin is not overload. The queue of a stable engine wanders, too: growth
    counts from 2 % of that half's arrivals on.
    """
    first_s, last_s = arrival_span_s(run)
    half_s = (last_s - first_s) / 2
    if not half_s > 0 or not len(line):
        return 0.0
    edges_s = np.linspace(last_s - half_s, last_s, 21)
    waiting = line.columns["waiting"]
    slope, _ = np.polyfit(edges_s[:-1], line.bin_means(edges_s, waiting, waiting), 1)
    growth_per_s = float(slope) * max(1, len(line.parts))
    return growth_per_s if growth_per_s * half_s > max(0.02 * len(run.log.requests) / 2, 10) else 0.0


def _ends(run: Run, summary: Summary) -> Iterator[Warned]:
    arrived, limit = summary.num_prompts, run.scenario.engine.max_model_len or 0
    status = np.array(run.log.requests.columns["status"])
    cut = int((status == Log.STATUSES.index("finished_length")).sum())
    if summary.interrupted:
        yield Caveat.PARTIAL.say(end_s=run.log.end_s)
    if summary.unfinished:
        yield Caveat.UNFINISHED.say(unfinished=summary.unfinished, arrived=arrived)
    if not summary.completed:
        yield Caveat.NOTHING_COMPLETED.say()
    if refused := int((status == Log.STATUSES.index("refused")).sum()):
        yield Caveat.REFUSED.say(failed=refused, arrived=arrived, max_model_len=limit)
    yield from _fleet(run, summary)
    hardware = run.scenario.hardware
    if hardware.num_simulated < hardware.replicas:
        yield Caveat.SAMPLED.say(simulated=hardware.num_simulated, replicas=hardware.replicas)
    if cut:
        yield Caveat.CUT_SHORT.say(cut=cut, arrived=arrived, max_model_len=limit)


def _fleet(run: Run, summary: Summary) -> Iterator[Warned]:
    fleet = summary.fleet
    if fleet is None or run.scenario.fleet is None:
        return
    if fleet.lost:
        yield Caveat.LOST.say(lost=fleet.lost, arrived=summary.num_prompts)
    due = len(run.scenario.fleet.failures)
    if fleet.failures < due and not summary.interrupted:
        yield Caveat.FAILED_TOO_LATE.say(
            late=due - fleet.failures, failures=due, duration_s=summary.duration_s
        )


def _load(run: Run, summary: Summary, line: Timeline) -> Iterator[Warned]:
    arrivals = run.scenario.workload.arrivals
    if isinstance(arrivals, ClosedLoopArrivals):
        return  # a closed loop cannot show overload: its users wait
    if isinstance(arrivals, BurstArrivals):
        if summary.num_prompts > 1:
            yield Caveat.BURST.say()
        return
    if summary.num_prompts and (growth_per_s := overload_per_s(run, line)):
        yield Caveat.OVERLOAD.say(growth_per_s=growth_per_s)


def _statistics(summary: Summary) -> Iterator[Warned]:
    if 0 < summary.completed < RELIABLE_COMPLETIONS:
        yield Caveat.FEW_COMPLETIONS.say(completed=summary.completed, reliable=RELIABLE_COMPLETIONS)
    if summary.duration_s > 0 and (share := summary.e2el.mean_s / summary.duration_s) > 0.1:
        yield Caveat.EDGES.say(share=share)


def _memory(run: Run, summary: Summary) -> Iterator[Warned]:
    load, eviction = summary.load, run.scenario.engine.kv_eviction
    if eviction is not None:
        yield Caveat.KV_DROPPED.say(budget=eviction.budget_tokens or 0, policy=eviction.policy)
    if load.preempted_requests > 0.05 * summary.num_prompts:
        yield Caveat.PREEMPTIONS.say(
            preempted=load.preempted_requests, arrived=summary.num_prompts, preemptions=load.preemptions
        )
    if load.prefix_cache_queries and not load.prefix_cache_hits:
        yield Caveat.NOTHING_SHARED.say(tokens=summary.total_input_tokens)
