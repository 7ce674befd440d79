"""When replicas that failed came back, and when requests reached the engine that finished them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from servesim.engine.events import Log

__all__ = ["Outage", "handed_over_s", "outages", "returns_s"]

Floats = NDArray[np.float64]


class Outage(NamedTuple):
    """A failure of a replica; ``back_s`` is None where it never came back."""

    replica: int
    failed_s: float
    back_s: float | None
    aborted: int
    """Requests that it had not finished."""


def outages(log: Log) -> list[Outage]:
    """The failures of a fleet, by their time."""
    if log.fleet is None:
        return []
    failures, aborts = log.fleet.failures.columns, log.fleet.aborts.columns
    rows = zip(*(failures[name].tolist() for name in ("failed_s", "replica", "back_s")), strict=True)
    found = []
    for failed_s, replica, back_s in sorted(rows):
        until_s = back_s if math.isfinite(back_s) else math.inf
        of_it = (aborts["replica"] == replica) & (aborts["at_s"] >= failed_s) & (aborts["at_s"] <= until_s)
        back = back_s if math.isfinite(back_s) else None
        found.append(Outage(replica, failed_s, back, int(of_it.sum())))
    return found


def returns_s(log: Log, replica: int) -> Floats:
    """The instants at which a replica began anew, with an empty cache."""
    if log.fleet is None:
        return np.zeros(0)
    failures, spans = log.fleet.failures.columns, log.fleet.spans.columns
    back_s = failures["back_s"][failures["replica"] == replica]
    if len(back_s):  # nobody who fails is given back
        return np.sort(back_s[np.isfinite(back_s)])
    return np.sort(spans["ready_s"][spans["replica"] == replica])[1:]


def handed_over_s(log: Log, replica: int, requests: dict[str, NDArray[Any]]) -> Floats:
    """When requests that ``replica`` finished were sent to it: at their arrival, unless another one failed
    with them in flight, or none took requests."""
    handed_s: Floats = requests["arrival_s"].copy()
    if log.fleet is None or not len(handed_s):
        return handed_s
    aborts = log.fleet.aborts.columns
    place = np.searchsorted(requests["index"], aborts["index"])
    place = np.minimum(place, len(handed_s) - 1)
    known = requests["index"][place] == aborts["index"]
    np.maximum.at(handed_s, place[known], aborts["at_s"][known])
    begins_s = np.concatenate(([-np.inf], returns_s(log, replica)))
    life = np.searchsorted(begins_s, requests["scheduled_s"], side="right") - 1
    return np.maximum(handed_s, begins_s[life])
