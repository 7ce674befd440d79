"""The time of an engine's requests by part, filled stretch by stretch.

From its arrival to its end a request's time is cut at the begins of the log's rows; in each row it waits,
computes its prompt, decodes, or recomputes after a preemption, and the row's time goes to the parts of that.
Sums over rows are differences of running sums, in long double so that a short request late in a long run
loses nothing.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from servesim.analysis.step_split import SplitRows
from servesim.cost.step_parts import DECODE_PARTS
from servesim.engine.residence import Residence

__all__ = ["PARTS", "Columns", "Legs", "Spent"]

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Columns: TypeAlias = dict[str, NDArray[Any]]

PARTS = (
    "joining", "slot", "kv_blocks", "tokens", "prefill", "interference", *DECODE_PARTS, "transfer",
    "preemption", "batch", "failure",
)  # fmt: skip
"""joining: until the steps in flight at its arrival end; slot, kv_blocks, tokens: waits, by what the head of
the queue lacks, tokens also while a step has none left for its prompt; prefill: its prompt, with the decodes
of the same steps; interference: what others' chunks add; DECODE_PARTS (host: also of prefills); transfer:
until KV blocks have been copied, from the host or from another replica; preemption: until it has recomputed
what a preemption threw away; batch: until its static batch ends; failure: until it is sent to the replica
that serves it, as others had failed."""

_AT = {name: number for number, name in enumerate(PARTS)}
_DECODE = slice(_AT[DECODE_PARTS[0]], _AT[DECODE_PARTS[-1]] + 1)
_WAITS = ("tokens", "slot", "kv_blocks", "kv_blocks", "kv_blocks")  # by AdmissionFailure
_PREFILLING, _DECODING, _PREEMPTED, _ENDED = range(4)


class Legs(NamedTuple):
    """What happened to requests before an engine had them; one row each."""

    handed_s: Floats
    """When it was sent to the engine."""
    before: NDArray[np.longdouble]
    """By part: from the arrival until then."""
    asked_s: Floats
    """Since when blocks wait for its KV cache; NaN where that comes from nowhere."""
    received_s: Floats
    """When it was there."""


class Spent:
    """Seconds by request and part."""

    def __init__(self, rows: SplitRows, of: Columns, legs: Legs) -> None:
        self._rows, self._of, self._legs = rows, of, legs
        self.before, self.after = legs.before.copy(), np.zeros_like(legs.before)
        self._first = rows.ending_at(of["first_token_s"]) + 1  # the first row after the first token
        self._last = rows.ending_at(of["finish_s"]) + 1
        self._admitted = np.zeros(len(of["index"]), np.int64)

    def _at(self, index: Integers) -> tuple[Integers, NDArray[np.bool_]]:
        """Places of requests in the tables, and which of them are there."""
        place = np.searchsorted(self._of["index"], index)
        place = np.minimum(place, max(len(self._of["index"]) - 1, 0))
        known = self._of["index"][place] == index if len(self._of["index"]) else np.zeros(len(index), bool)
        return place[known], known

    def wait(self, residence: Residence) -> None:
        """Until the step that admits."""
        rows, legs = self._rows, self._legs
        considered = np.zeros(len(self._of["index"]), np.int64)
        for table, target in ((residence.arrivals, considered), (residence.admissions, self._admitted)):
            place, known = self._at(table[:, 0])
            target[place] = rows.of_step(table[known, 1])
        total_s = rows.start_s[self._admitted].astype(np.longdouble) - legs.handed_s
        pulls = np.isfinite(legs.asked_s)
        pulling_s = (legs.received_s - legs.asked_s)[pulls]
        self.before[pulls, _AT["transfer"]] += pulling_s
        total_s[pulls] -= pulling_s
        reason = np.where(rows.preempts & (rows.failure == 0), 2, rows.failure)
        for failure, name in enumerate(_WAITS):
            sums = _running_sum(np.where(reason == failure, rows.duration_s, 0.0))
            waited_s = sums[self._admitted] - sums[considered]
            if pulls.any():
                waited_s[pulls] -= self._meanwhile(sums, considered)[pulls]
            self.before[:, _AT[name]] += waited_s
            total_s -= waited_s
        self.before[:, _AT["joining"]] += total_s

    def _meanwhile(self, sums: NDArray[np.longdouble], considered: Integers) -> Floats:
        """What of the running sum fell into the time in which the KV cache was on its way."""
        rows, legs = self._rows, self._legs
        times_s = np.stack((rows.start_s, rows.start_s + rows.duration_s), axis=1).reshape(-1)
        reached = np.stack((sums[:-1], sums[1:]), axis=1).reshape(-1).astype(np.float64)
        first_s, last_s = rows.start_s[considered], rows.start_s[self._admitted]
        begin_s, end_s = (np.clip(at_s, first_s, last_s) for at_s in (legs.asked_s, legs.received_s))
        return np.asarray(np.interp(end_s, times_s, reached) - np.interp(begin_s, times_s, reached))

    def run(self, residence: Residence) -> None:
        """From the step that admits to the end."""
        rows = self._rows
        request, state, begin, end = self._stretches(residence)
        computing_s = rows.duration_s - rows.transfer_s
        whole = np.zeros((len(rows.duration_s), len(PARTS)))
        for kind, fill in (
            (_PREFILLING, {"prefill": computing_s, "transfer": rows.transfer_s}),
            (_PREEMPTED, {"preemption": rows.duration_s}),
            (
                _DECODING,
                {
                    **dict(zip(DECODE_PARTS, rows.decode.T, strict=True)),
                    "interference": rows.interference_s,
                    "transfer": rows.transfer_s,
                },
            ),
        ):
            whole[:] = 0.0
            for name, values in fill.items():
                whole[:, _AT[name]] = values
            sums, of = _running_sum(whole), state == kind
            middle = np.clip(self._first[request[of]], begin[of], end[of])
            np.add.at(self.before, request[of], sums[middle] - sums[begin[of]])
            np.add.at(self.after, request[of], sums[end[of]] - sums[middle])
        self._prefills(residence)
        self._absences(residence)

    def _stretches(self, residence: Residence) -> tuple[Integers, Integers, Integers, Integers]:
        """(place of the request, state, first row, row after the last), one state after the other."""
        rows, tables = self._rows, []
        for kind, table, shift in (
            (_DECODING, residence.prefills, 1),
            (_PREEMPTED, residence.preemptions, 0),
        ):
            place, known = self._at(table[:, 0])
            tables.append((place, np.full(len(place), kind), rows.of_step(table[known, 1] + shift)))
        every = np.arange(len(self._of["index"]))
        tables.append((every, np.full(len(every), _PREFILLING), self._admitted))
        tables.append((every, np.full(len(every), _ENDED), self._last))
        request, state, begin = (np.concatenate(columns) for columns in zip(*tables, strict=True))
        order = np.lexsort((state, begin, request))  # by request, by time; then in the order of the states
        request, state = request[order], state[order]
        begin = np.minimum(begin[order], self._last[request])
        end, inner = np.roll(begin, -1), np.zeros(len(request), bool)
        inner[:-1] = request[1:] == request[:-1]
        return request[inner], state[inner], begin[inner], end[inner]

    def _prefills(self, residence: Residence) -> None:
        """Move what others' chunks and the host add to the steps of a prompt out of prefill."""
        chunks = residence.chunks
        place, known = self._at(chunks[:, 0])
        row = self._rows.of_step(chunks[known, 1])
        others_s, host_s = self._rows.beside_chunks(chunks[known])
        for name, seconds in (("interference", others_s), ("host", host_s)):
            self._move(place, row, "prefill", name, seconds)

    def _absences(self, residence: Residence) -> None:
        """Rows in which a running request computes nothing."""
        table, rows = residence.absences, self._rows
        computing_s = rows.duration_s - rows.transfer_s
        place, known = self._at(table[:, 0])
        row, decodes = rows.of_step(table[known, 1]), table[known, 2].astype(bool)
        within = row < self._last[place]
        place, row, decodes = place[within], row[within], decodes[within]
        self._move(place[~decodes], row[~decodes], "prefill", "tokens", computing_s[row[~decodes]])
        place, row = place[decodes], row[decodes]
        standing = np.where(
            rows.has_chunks[row], _AT["interference"], _AT["batch" if rows.is_static else "tokens"]
        )
        for number, name in enumerate(DECODE_PARTS):
            self._move(place, row, name, standing, rows.decode[row, number])
        self._move(place, row, "interference", standing, rows.interference_s[row])

    def _move(
        self, place: Integers, row: Integers, source: str, target: str | Integers, seconds: Floats
    ) -> None:
        column = np.full(len(place), _AT[target]) if isinstance(target, str) else target
        for into, chosen in (
            (self.before, row < self._first[place]),
            (self.after, row >= self._first[place]),
        ):
            np.add.at(into, (place[chosen], np.full(int(chosen.sum()), _AT[source])), -seconds[chosen])
            np.add.at(into, (place[chosen], column[chosen]), seconds[chosen])


def _running_sum(values: Floats) -> NDArray[np.longdouble]:
    """Sums over the first 0, 1, ... rows."""
    sums = np.zeros((len(values) + 1, *values.shape[1:]), np.longdouble)
    np.cumsum(values, axis=0, dtype=np.longdouble, out=sums[1:])
    return sums
