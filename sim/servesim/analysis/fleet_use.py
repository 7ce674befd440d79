"""What happened to the replicas of a fleet, in figures."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from servesim.analysis.distribution import distribution
from servesim.analysis.run import Run
from servesim.analysis.summary import FleetUse, PoolUse, ScaleUse, TransferUse
from servesim.analysis.timeline import KV_CLASSES, Timeline
from servesim.engine.events import FleetLog, Log

__all__ = ["aborts_of", "fleet_use"]


def fleet_use(run: Run, line: Timeline, begin_s: float, end_s: float) -> FleetUse | None:
    """The figures of a fleet between two instants; None when nothing was to happen to it."""
    log, replicas = run.log.fleet, run.scenario.num_replicas
    if log is None:
        return None
    aborts, requests = log.aborts.columns, run.log.requests.columns
    lost = requests["index"][requests["status"] == Log.STATUSES.index("lost")]
    retried = np.setdiff1d(aborts["index"], lost)
    failures, time_s = log.failures.columns, replicas * (end_s - begin_s)
    back_s = np.where(np.isnan(failures["back_s"]), end_s, failures["back_s"])
    down_s = np.clip(back_s, begin_s, end_s) - np.clip(failures["failed_s"], begin_s, end_s)
    return FleetUse(
        replicas=replicas,
        failures=len(log.failures),
        up_share=1 - float(down_s.sum()) / time_s if time_s > 0 else 1.0,
        aborts=len(log.aborts),
        retried=len(retried),
        lost=len(lost),
        wasted_tokens=int(aborts["generated_tokens"].sum()),
        pools=tuple(_pools(run, line)),
        scaling=_scaling(run, begin_s, end_s),
        transfers=_transfers(log, link) if (link := _link(run)) else None,
    )


def _scaling(run: Run, begin_s: float, end_s: float) -> ScaleUse | None:
    assert run.log.fleet is not None
    if run.scenario.fleet is None or run.scenario.fleet.autoscaler is None:
        return None
    spans, engine, span_s = run.log.fleet.spans.columns, run.scenario.engine, end_s - begin_s
    gone_s = np.where(np.isnan(spans["gone_s"]), end_s, spans["gone_s"]).clip(begin_s, end_s)
    paid_s = float((gone_s - spans["ordered_s"].clip(begin_s, end_s)).sum())
    ready_s = spans["ready_s"].clip(begin_s, end_s)
    gpu_hours = paid_s / 3600 * engine.tensor_parallel_size * engine.pipeline_parallel_size
    price_usd = run.gpu.price_per_hour_usd
    serving = [int(((ready_s <= at) & (at < gone_s)).sum()) for at in ready_s]
    return ScaleUse(
        gpu_hours=gpu_hours,
        cost_usd=None if price_usd is None else price_usd * gpu_hours,
        mean_paid=paid_s / span_s if span_s > 0 else float("nan"),
        mean_serving=float((gone_s - ready_s).sum()) / span_s if span_s > 0 else float("nan"),
        peak_serving=max(serving, default=0),
        orders=int((spans["ordered_s"] > 0).sum()),
    )


def _link(run: Run) -> str | None:
    return run.scenario.fleet.kv_link if run.scenario.fleet else None


def _pools(run: Run, line: Timeline) -> Iterator[PoolUse]:
    """Every pool; its replicas come one after another."""
    assert run.log.fleet is not None
    begun, first = list(run.log.requests.parts), 0
    targets = run.log.fleet.transfers.columns["target"]
    sources = run.log.fleet.transfers.columns["source"]
    for pool in run.pools:
        numbers = range(first, first + pool.replicas)
        first += pool.replicas
        rows = np.zeros(len(line), dtype=np.bool_)
        for part in line.parts[numbers.start : numbers.stop]:
            rows[part] = True
        time_s, of = float(line.duration_s[rows].sum()), line.columns
        slots = np.sum([of[f"kv_{name}"] for name in KV_CLASSES], axis=0)
        moved = {"prefill": sources, "decode": targets}.get(pool.serves)
        busy_s = float(line.duration_s[rows & (of["steps"] > 0)].sum())
        yield PoolUse(
            name=pool.name,
            serves=pool.serves,
            replicas=pool.replicas,
            gpu=pool.gpu.name,
            num_gpus=pool.replicas * pool.gpus_per_replica,
            requests=sum(begun[number] for number in numbers)
            if moved is None
            else int(np.isin(moved, numbers).sum()),
            busy_share=busy_s / time_s if time_s > 0 else float("nan"),
            mean_running=line.mean(of["running"], of["running"], rows),
            mean_waiting=line.mean(of["waiting"], of["waiting"], rows),
            kv_usage=line.mean(*line.live(), rows) / line.mean(slots, slots, rows)
            if time_s > 0
            else float("nan"),
        )


def _transfers(log: FleetLog, link: str) -> TransferUse:
    of = log.transfers.columns
    return TransferUse(
        count=len(log.transfers),
        link=link,
        blocks_wait=distribution(of["asked_s"] - of["prefilled_s"]),
        link_wait=distribution(of["begun_s"] - of["asked_s"]),
        time=distribution(of["done_s"] - of["begun_s"]),
    )


def aborts_of(log: FleetLog, index: NDArray[np.int64]) -> NDArray[np.int64]:
    """How often each request was in flight on a replica that failed."""
    counts = np.bincount(log.aborts.columns["index"], minlength=int(index.max(initial=0)) + 1)
    return np.asarray(counts[index], dtype=np.int64)
