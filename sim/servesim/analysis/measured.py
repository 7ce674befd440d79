"""Requests that a real server has served, and the workload that sends them again."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from servesim.analysis.run import Run
from servesim.errors import Problem, TraceError
from servesim.workload.request import Request

__all__ = ["Latencies", "MeasuredRequests", "MeasuredWorkload", "read_measured", "simulated_latencies"]

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

_COLUMNS = ("arrival_s", "prompt_tokens", "output_tokens", "first_token_s", "finish_s")


@dataclass(frozen=True, slots=True)
class Latencies:
    """Per request, in the order of arrival: seconds, by the definitions of `vllm bench serve`."""

    arrival_s: Floats
    output_tokens: Integers
    ttft_s: Floats
    e2e_s: Floats

    @property
    def tpot_s(self) -> Floats:
        """Time per output token after the first; NaN for requests of one token."""
        gaps = self.output_tokens - 1
        return np.where(gaps > 0, (self.e2e_s - self.ttft_s) / np.maximum(gaps, 1), np.nan)

    def part(self, chosen: slice) -> Latencies:
        """Some of the requests."""
        return Latencies(*(getattr(self, name)[chosen] for name in self.__dataclass_fields__))

    def __len__(self) -> int:
        return len(self.arrival_s)


@dataclass(frozen=True, slots=True)
class MeasuredRequests:
    """What was asked for and what came back, in the order of arrival."""

    prompt_tokens: Integers
    latencies: Latencies


def read_measured(path: Path) -> MeasuredRequests:
    """The requests.csv of a recorded run; raises TraceError for a missing column or an impossible row."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise TraceError(Problem("cannot be read", file=str(path), got=error.strerror or "")) from None
    missing = [name for name in _COLUMNS if not rows or name not in rows[0]]
    if missing:
        raise TraceError(
            Problem(
                f"needs the columns {', '.join(_COLUMNS)} and at least one row",
                file=str(path),
                got=f"no {', '.join(missing)}",
                next_step="see reports/validation/README.md for the format of a recorded run",
            )
        )
    values = [[_number(path, line, row, name) for name in _COLUMNS] for line, row in enumerate(rows, start=2)]
    columns = dict(zip(_COLUMNS, np.array(values).T, strict=True))
    empty = np.flatnonzero((columns["prompt_tokens"] < 1) | (columns["output_tokens"] < 1))
    if len(empty):
        raise TraceError(
            Problem(
                "a request asks with at least one token, and gets at least one",
                file=str(path),
                line=int(empty[0]) + 2,
                next_step="leave out requests that failed",
            )
        )
    order = np.argsort(columns["arrival_s"], kind="stable")
    column = {name: values[order] for name, values in columns.items()}
    arrival_s = column["arrival_s"]
    latencies = Latencies(
        arrival_s - arrival_s[0],
        column["output_tokens"].astype(np.int64),
        column["first_token_s"] - arrival_s,
        column["finish_s"] - arrival_s,
    )
    wrong = np.flatnonzero((latencies.ttft_s <= 0) | (latencies.e2e_s < latencies.ttft_s))
    if len(wrong):
        raise TraceError(
            Problem(
                "a request must arrive before its first token, and that come before its last",
                file=str(path),
                line=int(order[wrong[0]]) + 2,
                next_step="bring all stamps to one clock",
            )
        )
    return MeasuredRequests(column["prompt_tokens"].astype(np.int64), latencies)


def _number(path: Path, line: int, row: dict[str, str], name: str) -> float:
    try:
        value = float(row[name])
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        wrong = Problem("needs a number", file=str(path), line=line, path=name, got=repr(row.get(name)))
        raise TraceError(wrong)
    return value


class MeasuredWorkload:
    """The same requests at the same times, nothing shared between their prompts."""

    def __init__(self, measured: MeasuredRequests) -> None:
        latencies = measured.latencies
        columns = (latencies.arrival_s, measured.prompt_tokens, latencies.output_tokens)
        self._requests = [
            Request(index, f"request-{index}", *row)
            for index, row in enumerate(zip(*(column.tolist() for column in columns), strict=True))
        ]

    @property
    def num_requests(self) -> int:
        """Requests in all."""
        return len(self._requests)

    def arrivals(self) -> Iterator[Request]:
        """The requests in the order of arrival."""
        return iter(self._requests)

    def follow_up(self, finished: Request, now_s: float) -> Request | None:
        """None: measured requests come when they came."""
        return None


def simulated_latencies(run: Run) -> Latencies:
    """The latencies of a replay, request by request in the order of arrival."""
    columns = {name: np.array(values) for name, values in run.log.requests.columns.items()}
    order = np.argsort(columns["index"], kind="stable")
    column = {name: values[order] for name, values in columns.items()}
    arrival_s = column["arrival_s"]
    return Latencies(
        arrival_s,
        column["generated_tokens"].astype(np.int64),
        column["first_token_s"] - arrival_s,
        column["finish_s"] - arrival_s,
    )
