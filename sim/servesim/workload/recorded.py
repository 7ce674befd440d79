"""Requests replayed from a trace with times: slice, spread, scale."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat
from pathlib import Path

import numpy as np

from servesim.config.workload import AzureTrace, CsvTrace, MooncakeTrace
from servesim.errors import Problem, TraceError
from servesim.workload.request import Request, Segment
from servesim.workload.streams import FloatArray, IntArray, Stream
from servesim.workload.traces import Trace, read_azure, read_csv, read_mooncake

__all__ = ["RecordedWorkload", "kept_rows", "recorded_workload"]

MOONCAKE_BIN_S = 3.0
"""Width of the bins to which Mooncake's times were rounded before publication (1,180 times in 3,537 s)."""


def recorded_workload(
    config: CsvTrace | AzureTrace | MooncakeTrace, path: Path, seed: int
) -> RecordedWorkload:
    """The part of a trace that ``config`` keeps, on its own clock.

    A request's place in its 3 s bin is keyed by its row in the file, so slices of a trace agree.
    """
    block_tokens = 0
    if isinstance(config, CsvTrace):
        trace = read_csv(path, config.arrival_column, config.prompt_column, config.output_column)
    elif isinstance(config, AzureTrace):
        trace = read_azure(path)
    else:
        trace, block_tokens = read_mooncake(path, config.block_tokens), config.block_tokens
    times_s = trace.times_s
    if isinstance(config, MooncakeTrace) and config.jitter:
        times_s = times_s + MOONCAKE_BIN_S * Stream(seed, "trace_jitter").uniforms(0, len(times_s))
    order = np.argsort(times_s, kind="stable")
    end_s = np.inf if config.duration_s is None else config.start_s + config.duration_s
    inside = order[(times_s[order] >= config.start_s) & (times_s[order] < end_s)]
    among, step = " between start_s and its end", "lower skip_requests or start_s, or raise duration_s"
    rows = kept_rows(inside, config.skip_requests, config.max_requests, path, among, step)
    return RecordedWorkload(trace, rows, (times_s[rows] - times_s[rows[0]]) / config.rate_scale, block_tokens)


def kept_rows(
    rows: IntArray,
    skip_requests: int,
    max_requests: int | None,
    path: Path,
    among: str = "",
    next_step: str = "lower skip_requests",
) -> IntArray:
    """The rows after a skip, at most ``max_requests``; TraceError when none is left.

    ``among`` says what the rows were chosen by, ``next_step`` what would leave more.
    """
    kept = rows[skip_requests:][:max_requests]
    if not len(kept):
        raise TraceError(
            Problem(
                "no request of the trace is left",
                file=str(path),
                path="workload.trace",
                got=f"{len(rows):,} requests{among}, skip_requests {skip_requests:,}",
                next_step=next_step,
            )
        )
    return kept


class RecordedWorkload:
    """A trace's requests at the times at which they were recorded.

    Blocks of equal id become segments of equal name, so a prefix cache hits where it did when recorded;
    outputs are unnamed, since the traces do not say which later prompt repeats them.
    """

    def __init__(self, trace: Trace, rows: IntArray, arrival_s: FloatArray, block_tokens: int) -> None:
        """``rows`` are rows of the trace in the order of ``arrival_s``."""
        self._trace = trace
        self._rows = rows
        self._arrival_s = arrival_s
        self._block_tokens = block_tokens

    @property
    def num_requests(self) -> int:
        """Requests kept of the trace."""
        return len(self._rows)

    def arrivals(self) -> Iterator[Request]:
        """The requests by arrival time; ``request_id`` names the line of the file."""
        trace, rows = self._trace, self._rows
        prompt_tokens = trace.prompt_tokens[rows].tolist()
        return map(
            Request,
            range(len(rows)),
            map("line-{}".format, trace.lines[rows].tolist()),
            self._arrival_s.tolist(),
            prompt_tokens,
            trace.output_tokens[rows].tolist(),
            map(self._prompt, rows.tolist(), prompt_tokens) if len(trace.block_starts) else repeat(()),
        )

    def follow_up(self, finished: Request, now_s: float) -> Request | None:
        """None: recorded requests come when they came."""
        return None

    def _prompt(self, row: int, prompt_tokens: int) -> tuple[Segment, ...]:
        starts = self._trace.block_starts
        ids = self._trace.block_ids[starts[row] : starts[row + 1]].tolist()
        whole = [Segment(name, self._block_tokens) for name in ids[:-1]]
        return (*whole, Segment(ids[-1], prompt_tokens - len(whole) * self._block_tokens))
