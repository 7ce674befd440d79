"""Where every request's time went: parts that add up to its end-to-end latency by construction.

From its arrival to its end a request's time is cut at the begins of the log's rows; in each row it waits,
computes its prompt, decodes, or recomputes after a preemption, and the row's time goes to the parts of that.
Sums over rows are differences of running sums, in long double so that a short request late in a long run
loses nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from servesim.analysis.comebacks import handed_over_s
from servesim.analysis.step_split import SplitRows
from servesim.config.scenario import EngineConfig
from servesim.cost.step_parts import DECODE_PARTS
from servesim.cost.step_time import StepTime
from servesim.engine.events import Log, RequestLog, StepLog
from servesim.engine.residence import Residence

__all__ = ["PARTS", "Attribution", "Watched", "attribute", "columns_by_replica"]

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
until KV blocks have been copied; preemption: until it has recomputed what a preemption threw away; batch:
until its static batch ends; failure: until it is sent to the replica that serves it, as others had failed."""

_AT = {name: number for number, name in enumerate(PARTS)}
_DECODE = slice(_AT[DECODE_PARTS[0]], _AT[DECODE_PARTS[-1]] + 1)
_WAITS = ("tokens", "slot", "kv_blocks", "kv_blocks", "kv_blocks")  # by AdmissionFailure
_PREFILLING, _DECODING, _PREEMPTED, _ENDED = range(4)


@dataclass(frozen=True, slots=True)
class Attribution:
    """One row per completed request, one column per part, in seconds."""

    index: Integers
    """Request.index"""
    replica: Integers
    """Which of the simulated replicas served it, from 0."""
    before: Floats
    """Until the first token: rows add up to TTFT."""
    after: Floats
    """From the first token to the last."""
    ttft_s: Floats
    e2e_s: Floats
    gaps: Integers
    """Tokens after the first."""
    prompt_tokens: Integers

    @property
    def parts_s(self) -> Floats:
        """Rows add up to the end-to-end latency."""
        return self.before + self.after

    def metric_s(self, metric: str) -> Floats:
        """ttft, tpot (NaN without a second token) or e2e, per request."""
        match metric:
            case "ttft":
                return self.ttft_s
            case "e2e":
                return self.e2e_s
        return np.where(self.gaps > 0, (self.e2e_s - self.ttft_s) / np.maximum(self.gaps, 1), np.nan)

    def parts_of(self, metric: str) -> Floats:
        """The parts of the same: rows add up to metric_s."""
        match metric:
            case "ttft":
                return self.before
            case "e2e":
                return self.parts_s
        return self.after / np.maximum(self.gaps, 1)[:, None]

    def means(self, metric: str, rows: Integers | None = None) -> dict[str, float]:
        """Seconds by part, mean over some requests (all that have the metric)."""
        if rows is None:
            rows = np.flatnonzero(np.isfinite(self.metric_s(metric)))
        return dict(zip(PARTS, self.parts_of(metric)[rows].mean(axis=0).tolist(), strict=True))

    def of(self, rows: Any) -> Attribution:
        """Some of the requests."""
        return replace(self, **{name: getattr(self, name)[rows] for name in self.__slots__})


class Watched(NamedTuple):
    """One engine of a run, and what was noted of it beside the log."""

    engine: EngineConfig
    residence: Residence
    law: StepTime


def attribute(log: Log, watched: Sequence[Watched]) -> Attribution:
    """Split the latencies of the completed requests of a log; ``watched``: its replicas, in their order."""
    each = [
        _of_engine(log, number, engine, *columns)
        for number, (engine, *columns) in enumerate(
            zip(watched, columns_by_replica(log.steps), columns_by_replica(log.requests), strict=True)
        )
    ]
    joined = {name: np.concatenate([getattr(one, name) for one in each]) for name in Attribution.__slots__}
    return Attribution(**joined).of(np.argsort(joined["index"], kind="stable"))


def columns_by_replica(rows: StepLog | RequestLog) -> list[Columns]:
    """The columns of each replica."""
    ends = np.cumsum((0, *(rows.parts or (len(rows),)))).tolist()
    return [
        {name: values[begin:end] for name, values in rows.columns.items()}
        for begin, end in itertools.pairwise(ends)
    ]


def _of_engine(log: Log, number: int, watched: Watched, steps: Columns, requests: Columns) -> Attribution:
    rows = SplitRows(steps, *watched)
    done = np.isin(
        requests["status"], (Log.STATUSES.index("finished_stop"), Log.STATUSES.index("finished_length"))
    )
    of = {name: values[done] for name, values in requests.items()}
    order = np.argsort(of["index"], kind="stable")
    of = {name: values[order] for name, values in of.items()}
    spent = _Spent(rows, of, handed_over_s(log, number, of))
    spent.wait(watched.residence)
    spent.run(watched.residence)
    return Attribution(
        index=of["index"],
        replica=np.full(len(of["index"]), number),
        before=spent.before.astype(np.float64),
        after=spent.after.astype(np.float64),
        ttft_s=of["first_token_s"] - of["arrival_s"],
        e2e_s=of["finish_s"] - of["arrival_s"],
        gaps=of["generated_tokens"] - 1,
        prompt_tokens=of["prompt_tokens"],
    )


class _Spent:
    """Seconds by request and part, filled piece by piece."""

    def __init__(self, rows: SplitRows, of: Columns, handed_s: Floats) -> None:
        self._rows, self._of, self._handed_s = rows, of, handed_s
        shape = len(of["index"]), len(PARTS)
        self.before, self.after = np.zeros(shape, np.longdouble), np.zeros(shape, np.longdouble)
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
        """From the arrival to the step that admits."""
        arrival_s = self._of["arrival_s"]
        rows = self._rows
        considered = np.zeros(len(self._of["index"]), np.int64)
        for table, target in ((residence.arrivals, considered), (residence.admissions, self._admitted)):
            place, known = self._at(table[:, 0])
            target[place] = rows.of_step(table[known, 1])
        total_s = rows.start_s[self._admitted].astype(np.longdouble) - arrival_s
        failure_s = self._handed_s.astype(np.longdouble) - arrival_s
        self.before[:, _AT["failure"]] += failure_s
        total_s -= failure_s
        for failure, name in enumerate(_WAITS):
            reason = np.where(rows.preempts & (rows.failure == 0), 2, rows.failure)
            sums = _running_sum(np.where(reason == failure, rows.duration_s, 0.0))
            waited_s = sums[self._admitted] - sums[considered]
            self.before[:, _AT[name]] += waited_s
            total_s -= waited_s
        self.before[:, _AT["joining"]] += total_s

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
