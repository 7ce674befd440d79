"""What happened to the replicas of a fleet, line by line."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from servesim.analysis.summary import FleetUse, TransferUse
from servesim.report.sections import Table

__all__ = ["Line", "fleet_lines", "fleet_table"]


class Line(NamedTuple):
    """One figure with its unit, and what it means."""

    label: str
    value: float | str
    meaning: str


def fleet_lines(fleet: FleetUse) -> Iterator[Line]:
    """The figures that there are."""
    yield Line("Replicas", fleet.replicas, "engines behind the router")
    for pool in fleet.pools:
        yield Line(
            f"{pool.name}: busy (%)",
            pool.busy_share * 100,
            f"{pool.replicas} replicas on {pool.num_gpus} × {pool.gpu}, {pool.requests:,} requests, "
            f"{pool.mean_running:.1f} running and {pool.mean_waiting:.1f} waiting on average",
        )
        yield Line(f"{pool.name}: KV use, mean (%)", pool.kv_usage * 100, "allocated to requests")
    if (scaling := fleet.scaling) is not None:
        yield Line("Replicas paid for, mean", scaling.mean_paid, "from the order until they are given back")
        yield Line("Replicas serving, mean", scaling.mean_serving, f"at most {scaling.peak_serving} at once")
        yield Line("Replicas ordered", scaling.orders, "after the begin")
        yield Line(
            "GPU-hours",
            scaling.gpu_hours,
            f"{scaling.mean_paid / fleet.replicas:.0%} of those of all replicas",
        )
        if scaling.cost_usd is not None:
            yield Line("Cost of the GPUs ($)", scaling.cost_usd, "at the price in the GPU's file")
        return
    if fleet.transfers is not None:
        yield from _transfer_lines(fleet.transfers)
        return
    if fleet.pools and not (fleet.failures or fleet.lost):
        return
    yield Line("Replica failures", fleet.failures, "those that came while there was something to serve")
    yield Line("Replica time in service (%)", fleet.up_share * 100, "of the time of all replicas")
    yield Line("Requests aborted", fleet.aborts, "in flight on a replica that failed")
    yield Line("Requests retried", fleet.retried, "begun anew by another one; latencies count from arrival")
    yield Line("Requests lost", fleet.lost, "ended in an error; among the failed requests")
    yield Line("Output tokens thrown away", fleet.wasted_tokens, "of aborted requests")


def _transfer_lines(of: TransferUse) -> Iterator[Line]:
    yield Line("KV caches transferred", of.count, f"of prompts, over {of.link}")
    for name, one, meaning in (
        ("Wait for decoder", of.blocks_wait, "until the next step there found blocks for the prompt"),
        ("Wait for the link", of.link_wait, "then until both ports were free"),
        ("KV transfer", of.time, "then the latency and the bytes"),
    ):
        yield Line(f"{name}, mean (ms)", one.mean_s * 1e3, meaning)
        yield Line(f"{name}, P99 (ms)", one.p99_s * 1e3, "")


def fleet_table(fleet: FleetUse) -> Table:
    """The same for a page."""
    rows = ((one.label, _text(one.value), one.meaning) for one in fleet_lines(fleet))
    return Table("What happened to the replicas", ("Figure", "Value", "Meaning"), tuple(rows), "words")


def _text(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,.2f}" if isinstance(value, float) else f"{value:,}"
