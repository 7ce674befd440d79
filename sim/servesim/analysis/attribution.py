"""Where every request's time went: parts that add up to its end-to-end latency by construction."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from servesim.analysis.legs import Prefilled, legs_of, prefilled_elsewhere
from servesim.analysis.spent import PARTS, Columns, Spent
from servesim.analysis.step_split import SplitRows
from servesim.config.scenario import EngineConfig
from servesim.cost.step_time import StepTime
from servesim.engine.events import Log, RequestLog, StepLog
from servesim.engine.residence import Residence

__all__ = ["PARTS", "Attribution", "Watched", "attribute", "columns_by_replica"]

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


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
    steps, requests = columns_by_replica(log.steps), columns_by_replica(log.requests)
    rows = [SplitRows(*each) for each in zip(steps, *zip(*watched, strict=True), strict=True)]
    engines = [(of, one.residence) for of, one in zip(rows, watched, strict=True)]
    prefilled = prefilled_elsewhere(log, engines)
    each = [
        _of_engine(log, number, *engine, requests[number], prefilled) for number, engine in enumerate(engines)
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


def _of_engine(
    log: Log,
    number: int,
    rows: SplitRows,
    residence: Residence,
    requests: Columns,
    prefilled: Prefilled | None,
) -> Attribution:
    done = np.isin(
        requests["status"], (Log.STATUSES.index("finished_stop"), Log.STATUSES.index("finished_length"))
    )
    of = {name: values[done] for name, values in requests.items()}
    order = np.argsort(of["index"], kind="stable")
    of = {name: values[order] for name, values in of.items()}
    spent = Spent(rows, of, legs_of(log, number, of, prefilled))
    spent.wait(residence)
    spent.run(residence)
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
