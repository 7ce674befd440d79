"""Other traffic of the same kind as a recorded trace: its requests drawn again, in blocks, with replacement.

A trace is one sample of the traffic it was taken from. Drawing blocks of consecutive requests keeps lengths,
the gaps between arrivals and bursts shorter than a block together (circular block bootstrap, Politis & Romano
1992). A prefix that a block brings again when it is drawn a second time gets a name of its own, so that the
prefix cache does not hit on a repetition that the traffic never had.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

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
        self._block = -(-count // BLOCKS)
        draws = Stream(seed, "resample").uniforms(0, -(-count // self._block))
        self._starts = (draws * count).astype(np.int64).tolist()
        arrival_s = [request.arrival_s for request in self._requests]
        mean_s = (arrival_s[-1] - arrival_s[0]) / max(1, count - 1)
        self._gaps_s = [mean_s, *np.diff(arrival_s).tolist()]

    @property
    def num_requests(self) -> int:
        """As many as the trace has."""
        return len(self._requests)

    def arrivals(self) -> Iterator[Request]:
        """The drawn requests; the first one comes at 0."""
        now_s, count = 0.0, len(self._requests)
        drawn: dict[int, int] = {}
        for index in range(count):
            start = self._starts[index // self._block]
            row = (start + index % self._block) % count
            now_s += self._gaps_s[row] if index else 0.0
            copy = drawn[row] = drawn.get(row, -1) + 1
            request = self._requests[row]
            yield request._replace(
                index=index,
                request_id=f"{request.request_id}-draw-{index}",
                arrival_s=now_s,
                prompt=tuple(_renamed(part, copy) for part in request.prompt),
            )

    def follow_up(self, finished: Request, now_s: float) -> Request | None:
        """None: recorded requests come when they came."""
        return None


def _renamed(part: Segment, copy: int) -> Segment:
    return part if part.name is None or not copy else Segment((part.name, copy), part.num_tokens)
