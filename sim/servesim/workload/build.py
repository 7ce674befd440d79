"""From the workload section of a scenario to a source of requests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from servesim.config.workload import ClosedLoopArrivals, LengthsTrace, TimedTrace, WorkloadConfig
from servesim.workload.arrivals import ThinkTime, arrival_times
from servesim.workload.lengths import drawn_lengths, recorded_lengths
from servesim.workload.prefixes import SharedPrefixes
from servesim.workload.recorded import kept_rows, recorded_workload
from servesim.workload.request import Workload
from servesim.workload.samples import Samples
from servesim.workload.streams import Column, Stream
from servesim.workload.synthetic import SyntheticWorkload
from servesim.workload.traces import read_lengths

__all__ = ["build_workload"]


def build_workload(
    config: WorkloadConfig, seed: int, find_file: Callable[[str], Path], *, redraw_lengths: bool = False
) -> Workload:
    """The requests of a scenario; ``find_file`` turns a file name of the scenario into a path.

    ``redraw_lengths`` draws the rows of a trace of lengths again, with replacement, by ``seed``.
    Raises TraceError for a file that cannot be used or of which nothing is kept.
    """
    workload = _requests(config, seed, find_file, redraw_lengths)
    if config.sampling is not None and config.forks is None:
        return Samples(workload, config.sampling.n)
    return workload


def _requests(
    config: WorkloadConfig, seed: int, find_file: Callable[[str], Path], redraw_lengths: bool
) -> Workload:
    """The requests, before any is sampled more than once."""
    if isinstance(config.trace, TimedTrace):
        return recorded_workload(config.trace, find_file(config.trace.file), seed)
    arrivals, sessions = config.arrivals, config.sessions
    assert arrivals is not None  # by WorkloadConfig's validator, as below
    num_requests, prompt_tokens, output_tokens = _lengths(config, seed, find_file, redraw_lengths)
    closed = arrivals if isinstance(arrivals, ClosedLoopArrivals) else None
    return SyntheticWorkload(
        num_requests,
        lambda count: arrival_times(arrivals, seed, count),
        prompt_tokens,
        output_tokens,
        SharedPrefixes(config.shared_prefixes, Stream(seed, "prefix")) if config.shared_prefixes else None,
        turns=sessions.turns if sessions else 1,
        turn_think=ThinkTime(sessions.think_time_s, sessions.think_time_law, Stream(seed, "turn_think_time"))
        if sessions
        else None,
        users=closed.concurrency if closed else None,
        user_think=ThinkTime(closed.think_time_s, closed.think_time_law, Stream(seed, "user_think_time"))
        if closed
        else None,
    )


def _lengths(
    config: WorkloadConfig, seed: int, find_file: Callable[[str], Path], redraw: bool
) -> tuple[int, Column[int], Column[int]]:
    """Number of requests, and their prompt and output lengths."""
    trace = config.trace
    if isinstance(trace, LengthsTrace):
        path = find_file(trace.file)
        recorded = read_lengths(path, trace.prompt_column, trace.output_column)
        rows = kept_rows(np.arange(len(recorded.lines)), trace.skip_requests, trace.max_requests, path)
        if redraw:
            rows = rows[(Stream(seed, "resample").uniforms(0, len(rows)) * len(rows)).astype(np.int64)]
        columns = recorded.prompt_tokens[rows], recorded.output_tokens[rows]
        return len(rows), recorded_lengths(columns[0]), recorded_lengths(columns[1])
    assert config.num_requests is not None
    assert config.prompt_tokens is not None
    assert config.output_tokens is not None
    return (
        config.num_requests,
        drawn_lengths(config.prompt_tokens, Stream(seed, "prompt_tokens"), find_file),
        drawn_lengths(config.output_tokens, Stream(seed, "output_tokens"), find_file),
    )
