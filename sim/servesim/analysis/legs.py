"""What happened to requests before the replica that finished them had them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from servesim.analysis.comebacks import handed_over_s
from servesim.analysis.spent import PARTS, Columns, Legs, Spent
from servesim.analysis.step_split import SplitRows
from servesim.engine.events import Log
from servesim.engine.residence import Residence

__all__ = ["Prefilled", "legs_of", "prefilled_elsewhere"]

Floats = NDArray[np.float64]


class Prefilled(NamedTuple):
    """Requests whose KV cache came from another replica, by Request.index."""

    requests: NDArray[np.int64]
    parts: NDArray[np.longdouble]
    """Of the time until the prompt was computed."""
    prefilled_s: Floats
    asked_s: Floats
    received_s: Floats


def prefilled_elsewhere(log: Log, engines: Sequence[tuple[SplitRows, Residence]]) -> Prefilled | None:
    """The time of prompts at the replicas that computed them; None where every replica does its own."""
    if log.fleet is None or not len(log.fleet.transfers):
        return None
    of = log.fleet.transfers.columns
    order = np.argsort(of["index"])
    of = {name: values[order] for name, values in of.items()}
    arrived = np.argsort(log.requests.columns["index"])
    place = np.searchsorted(log.requests.columns["index"][arrived], of["index"])
    arrival_s = log.requests.columns["arrival_s"][arrived[place]]
    parts = np.zeros((len(order), len(PARTS)), np.longdouble)
    for source in np.unique(of["source"]).tolist():
        rows, residence = engines[source]
        mine = of["source"] == source
        ends_s = of["prefilled_s"][mine]
        columns = {"index": of["index"][mine], "first_token_s": ends_s, "finish_s": ends_s}
        spent = Spent(rows, columns, _direct(arrival_s[mine]))
        spent.wait(residence)
        spent.run(residence)
        parts[mine] = spent.before + spent.after
    return Prefilled(of["index"], parts, of["prefilled_s"], of["asked_s"], of["done_s"])


def legs_of(log: Log, replica: int, of: Columns, prefilled: Prefilled | None) -> Legs:
    """Of requests that ``replica`` finished, sorted by index."""
    legs, arrival_s = _direct(handed_over_s(log, replica, of)), of["arrival_s"]
    legs.before[:, PARTS.index("failure")] = legs.handed_s.astype(np.longdouble) - arrival_s
    if prefilled is not None and len(arrival_s):
        place = np.minimum(np.searchsorted(prefilled.requests, of["index"]), len(prefilled.requests) - 1)
        known = prefilled.requests[place] == of["index"]
        place = place[known]
        legs.before[known] = prefilled.parts[place]
        legs.handed_s[known] = prefilled.prefilled_s[place]
        legs.asked_s[known] = prefilled.asked_s[place]
        legs.received_s[known] = prefilled.received_s[place]
    return legs


def _direct(handed_s: Floats) -> Legs:
    unknown = np.full(len(handed_s), np.nan)
    return Legs(handed_s, np.zeros((len(handed_s), len(PARTS)), np.longdouble), unknown, unknown.copy())
