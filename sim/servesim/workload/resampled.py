"""Other traffic of the same kind as a recorded trace: its requests drawn again, in blocks, with replacement.

A trace is one sample of the traffic it was taken from. Drawing blocks of consecutive requests keeps lengths,
the gaps between arrivals and bursts shorter than a block together (circular block bootstrap, Politis & Romano
1992). A prefix that a block brings again when it is drawn a second time gets a name of its own, so that the
prefix cache does not hit on a repetition that the traffic never had.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np

from servesim.workload.request import Request, Segment, Workload
from servesim.workload.streams import Stream

__all__ = ["BLOCKS", "ResampledWorkload"]

BLOCKS = 30
"""Blocks that a resampled trace is put together from."""


class ResampledWorkload:
    """As many requests as ``recorded`` has, drawn from it by ``seed``; for workloads with their own times."""

    def __init__(self, recorded: Workload, seed: int) -> None:
        self._requests: Sequence[Request] = tuple(recorded.arrivals())
        count = len(self._requests)
        block = -(-count // BLOCKS)
        draws = Stream(seed, "resample").uniforms(0, -(-count // block))
        starts = np.repeat((draws * count).astype(np.int64), block)[:count]
        self._rows = (starts + np.arange(count) % block) % count
        arrival_s = np.array([request.arrival_s for request in self._requests])
        mean_s = (arrival_s[-1] - arrival_s[0]) / max(1, count - 1)
        gaps_s = np.concatenate(([mean_s], np.diff(arrival_s)))[self._rows]
        gaps_s[0] = 0.0
        self._arrival_s = np.cumsum(gaps_s)

    @property
    def num_requests(self) -> int:
        """As many as the trace has."""
        return len(self._requests)

    def arrivals(self) -> Iterator[Request]:
        """The drawn requests; the first one comes at 0."""
        return self.some(slice(None))

    def some(self, which: slice, speed: float = 1.0) -> Iterator[Request]:
        """Some of them, ``speed`` times as fast."""
        rows, arrival_s = self._rows[which].tolist(), (self._arrival_s[which] / speed).tolist()
        for index, row, time_s in zip(range(len(self._rows))[which], rows, arrival_s, strict=True):
            request = self._requests[row]
            prompt = request.prompt
            yield request._replace(
                index=index,
                request_id=f"{request.request_id}-draw-{index}",
                arrival_s=time_s,
                prompt=prompt and tuple(_renamed(part, self._copies[index]) for part in prompt),
            )

    @cached_property
    def _copies(self) -> list[int]:
        """How often each request was drawn before."""
        drawn: Counter[int] = Counter()
        copies = []
        for row in self._rows.tolist():
            copies.append(drawn[row])
            drawn[row] += 1
        return copies

    def follow_up(self, finished: Request, now_s: float) -> Request | None:
        """None: recorded requests come when they came."""
        return None


def _renamed(part: Segment, copy: int) -> Segment:
    return part if part.name is None or not copy else Segment((part.name, copy), part.num_tokens)
