"""Recorded runs that hold every step of the engine: reading them.

`runs.csv` names the runs, `requests.csv` and `steps.csv` (or the same zipped) hold their requests and steps.
Format: reports/validation/README.md.
"""

from __future__ import annotations

import csv
import gzip
import io
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from servesim.analysis.measured import Latencies
from servesim.config.load import LoadedScenario, load_scenario
from servesim.engine.acceptance import RecordedDrafts
from servesim.errors import Problem, TraceError
from servesim.workload.request import Request, Segment

__all__ = ["RecordedStep", "StepwiseRun", "StepwiseWorkload", "read_stepwise"]


class RecordedStep(NamedTuple):
    """One step as vLLM scheduled it; times in seconds since the begin of the run."""

    call: int
    """Which call of the scheduler it was."""
    start_s: float
    output_s: float
    """When the scheduler was given the step's output."""
    end_s: float
    """When the output had been handed out."""
    scheduled: tuple[tuple[int, int, int], ...]
    """Request, tokens, computed tokens before; in scheduling order."""
    preempted: tuple[int, ...]
    running: int
    waiting: int
    free_blocks: int
    evicted: int
    finished: tuple[int, ...]
    free_after: int
    drafts: dict[int, int] = {}  # noqa: RUF012
    """Draft tokens among those scheduled, by request."""
    accepted: dict[int, int] = {}  # noqa: RUF012


class RecordedRequest(NamedTuple):
    """One request and what became of it."""

    arrival_s: float
    arrival_step: int
    """Calls of the scheduler before it was handed in."""
    prompt_tokens: int
    output_tokens: int
    prefix_group: str
    """Requests of one group begin with the same ``prefix_tokens`` tokens; empty: of none."""
    prefix_tokens: int
    first_token_s: float
    finish_s: float
    preemptions: int

    def request(self, index: int) -> Request:
        """The same as a client sends it."""
        prompt: tuple[Segment, ...] = ()
        if self.prefix_group:
            own = self.prompt_tokens - self.prefix_tokens
            prompt = (Segment(self.prefix_group, self.prefix_tokens), Segment(None, own))
        return Request(index, str(index), self.arrival_s, self.prompt_tokens, self.output_tokens, prompt)


@dataclass(frozen=True, slots=True)
class StepwiseRun:
    """One recorded run; runs of one ``group`` are repeats of the same requests."""

    name: str
    group: str
    load: str
    """In words: grid, burst, or a share of the capacity."""
    scenario: Path
    overrides: tuple[str, ...]
    judged: bool
    """False for a run that a calibration may be fitted to."""
    requests: tuple[RecordedRequest, ...]
    steps: tuple[RecordedStep, ...]
    rows_met: tuple[int, ...] = ()
    """Tokens of the steps that the same process had run before; every count once, the latest last."""

    def load_scenario(self) -> LoadedScenario:
        """What was served; raises ServesimError when it asks for what the simulator does not have."""
        return load_scenario(self.scenario, self.overrides)

    @property
    def latencies(self) -> Latencies:
        """Per request, in the order of arrival."""
        rows = sorted(self.requests, key=lambda one: one.arrival_s)
        arrival_s = np.array([one.arrival_s for one in rows])
        return Latencies(
            arrival_s - arrival_s[0],
            np.array([one.output_tokens for one in rows], dtype=np.int64),
            np.array([one.first_token_s for one in rows]) - arrival_s,
            np.array([one.finish_s for one in rows]) - arrival_s,
        )

    def workload(self) -> StepwiseWorkload:
        """The same requests for the simulator."""
        return StepwiseWorkload(self)

    @property
    def drafts(self) -> RecordedDrafts:
        """What was proposed and accepted, for an engine that speculates."""
        verified = {}
        for step in self.steps:
            for request, tokens, before in step.scheduled:
                count = step.drafts.get(request, 0)
                if count:
                    place = before + tokens - count - self.requests[request].prompt_tokens
                    verified[request, place] = (count, step.accepted.get(request, 0))
        return RecordedDrafts(verified)


class StepwiseWorkload:
    """The requests of a recorded run at their times, with the prefixes that they share."""

    def __init__(self, run: StepwiseRun) -> None:
        requests = [one.request(index) for index, one in enumerate(run.requests)]
        self._requests = sorted(requests, key=lambda request: request.arrival_s)

    @property
    def num_requests(self) -> int:
        """Requests in all."""
        return len(self._requests)

    def arrivals(self) -> Iterator[Request]:
        """The requests in the order of arrival."""
        return iter(self._requests)

    def follow_up(self, finished: Request, now_s: float) -> Request | None:
        """None: recorded requests come when they came."""
        return None


def read_stepwise(folder: Path) -> tuple[StepwiseRun, ...]:
    """The runs of a folder; raises TraceError for a file that is missing or a row that cannot be read."""
    requests: defaultdict[str, list[RecordedRequest]] = defaultdict(list)
    steps: defaultdict[str, list[RecordedStep]] = defaultdict(list)
    for run, request in _read(folder, "requests.csv", _request):
        requests[run].append(request)
    for run, step in _read(folder, "steps.csv", _step):
        steps[run].append(step)
    runs = []
    process, met = "", dict[int, None]()
    for name, (of_process, group, load, overrides, part) in _read(folder, "runs.csv", _run):
        if not requests[name] or not steps[name]:
            problem = Problem(f"run {name} has no requests or no steps", file=str(folder / "runs.csv"))
            raise TraceError(problem)
        if process != of_process:
            process, met = of_process, {}
        runs.append(
            StepwiseRun(
                name=name,
                group=group,
                load=load,
                scenario=folder / "scenario.yaml",
                overrides=tuple(text for text in overrides.split(";") if text),
                judged=part != "fit",
                requests=tuple(requests[name]),
                steps=tuple(steps[name]),
                rows_met=tuple(met),
            )
        )
        for step in steps[name]:
            rows = sum(tokens for _, tokens, _ in step.scheduled)
            met.pop(rows, None)
            met[rows] = None
    if not runs:
        raise TraceError(Problem("names no run", file=str(folder / "runs.csv")))
    return tuple(runs)


Row = dict[str, str]
T = TypeVar("T")


def _read(folder: Path, name: str, make: Callable[[Row], T]) -> Iterator[tuple[str, T]]:
    """The rows of a table, zipped or not, each with the name of its run."""
    path = folder / name
    zipped = folder / f"{name}.gz"
    try:
        text = gzip.decompress(zipped.read_bytes()).decode() if zipped.is_file() else path.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise TraceError(Problem("cannot be read", file=str(path), got=str(error))) from None
    for line, row in enumerate(csv.DictReader(io.StringIO(text)), start=2):
        try:
            if None in row.values():
                raise ValueError("fewer cells than the head has")
            yield row["run"], make(row)
        except KeyError as error:
            problem = Problem(f"has no column {error.args[0]}", file=str(path))
            raise TraceError(problem) from None
        except (ValueError, TypeError) as error:
            problem = Problem("is not a row of a recorded run", file=str(path), line=line, got=str(error))
            raise TraceError(problem) from None


def _run(row: Row) -> tuple[str, ...]:
    return tuple(row[name] for name in ("process", "group", "load", "set", "part"))


def _request(row: Row) -> RecordedRequest:
    return RecordedRequest(
        float(row["arrival_s"]),
        int(row["arrival_step"]),
        int(row["prompt_tokens"]),
        int(row["output_tokens"]),
        row["prefix_group"],
        int(row["prefix_tokens"] or 0),
        float(row["first_token_s"]),
        float(row["finish_s"]),
        int(row["preemptions"]),
    )


def _step(row: Row) -> RecordedStep:
    return RecordedStep(
        int(row["call"]),
        float(row["start_s"]),
        float(row["output_s"]),
        float(row["end_s"]),
        tuple(_part(text) for text in row["scheduled"].split()),
        _numbers(row["preempted"]),
        int(row["running"]),
        int(row["waiting"]),
        int(row["free_blocks"]),
        int(row["evicted"]),
        _numbers(row["finished"]),
        int(row["free_after"]),
        _counts(row["drafts"]),
        _counts(row["accepted"]),
    )


def _part(text: str) -> tuple[int, int, int]:
    """``7:16@32``: request 7 computes 16 tokens behind 32."""
    request, _, rest = text.partition(":")
    tokens, _, before = rest.partition("@")
    return int(request), int(tokens), int(before)


def _counts(text: str) -> dict[int, int]:
    """``7:4 9:2``: four of request 7, two of request 9."""
    return {int(request): int(count) for request, _, count in (each.partition(":") for each in text.split())}


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split())
