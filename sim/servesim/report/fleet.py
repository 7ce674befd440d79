"""What happened to the replicas of a fleet, line by line."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from servesim.analysis.summary import FleetUse
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
    yield Line("Replica failures", fleet.failures, "those that came while there was something to serve")
    yield Line("Replica time in service (%)", fleet.up_share * 100, "of the time of all replicas")
    yield Line("Requests aborted", fleet.aborts, "in flight on a replica that failed")
    yield Line("Requests retried", fleet.retried, "begun anew by another one; latencies count from arrival")
    yield Line("Requests lost", fleet.lost, "ended in an error; among the failed requests")
    yield Line("Output tokens thrown away", fleet.wasted_tokens, "of aborted requests")


def fleet_table(fleet: FleetUse) -> Table:
    """The same for a page."""
    rows = ((one.label, _text(one.value), one.meaning) for one in fleet_lines(fleet))
    return Table("What happened to the replicas", ("Figure", "Value", "Meaning"), tuple(rows), "words")


def _text(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,.2f}" if isinstance(value, float) else f"{value:,}"
