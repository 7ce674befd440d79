"""Workloads that differ from another one in a single respect, request by request, for sensitivity studies."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from servesim.workload.request import Request, Workload
from servesim.workload.streams import Column, Stream

__all__ = ["AlteredWorkload", "burstier", "private_share", "scaled_lengths"]

Change = Callable[[Request], Request]


class AlteredWorkload:
    """Every request of ``original`` after ``change``; what follows on a request is asked of the original."""

    def __init__(self, original: Workload, change: Change) -> None:
        self._original = original
        self._change = change
        self._unchanged: dict[int, Request] = {}

    @property
    def num_requests(self) -> int:
        """As many as the original has."""
        return self._original.num_requests

    def arrivals(self) -> Iterator[Request]:
        """The original's, changed."""
        return map(self._altered, self._original.arrivals())

    def follow_up(self, finished: Request, now_s: float) -> Request | None:
        """The original's follow-up to the request before its change, changed."""
        released = self._original.follow_up(self._unchanged.pop(finished.index), now_s)
        return None if released is None else self._altered(released)

    def _altered(self, request: Request) -> Request:
        self._unchanged[request.index] = request
        return self._change(request)


def scaled_lengths(prompt: float, output: float) -> Change:
    """Multiply the lengths; for prompts that are shared with nobody (others would no longer match)."""

    def change(request: Request) -> Request:
        return request._replace(
            prompt_tokens=max(1, round(request.prompt_tokens * prompt)),
            output_tokens=max(1, round(request.output_tokens * output)),
            prompt=request.prompt if prompt == 1 else (),
        )

    return change


def burstier(arrivals: Iterator[Request], factor: float) -> Change:
    """Multiply the coefficient of variation of the gaps between ``arrivals``; mean and order stay.

    Every gap is raised to one power, so that each request's time moves with it steadily.
    """
    requests = list(arrivals)
    times_s = np.array([request.arrival_s for request in requests])
    gaps_s = np.diff(times_s)
    if len(gaps_s) < 2 or not gaps_s.std() > 0:
        return lambda request: request
    wanted = factor * gaps_s.std() / gaps_s.mean()
    low, high = -3.0, 3.0
    for _ in range(50):
        middle = (low + high) / 2
        powered = (gaps_s / gaps_s.mean()) ** np.exp(middle)
        low, high = (middle, high) if powered.std() / powered.mean() < wanted else (low, middle)
    moved_s = times_s[0] + np.concatenate(([0.0], np.cumsum(powered / powered.mean() * gaps_s.mean())))
    at_s = dict(zip((request.index for request in requests), moved_s.tolist(), strict=True))

    def change(request: Request) -> Request:
        return request._replace(arrival_s=at_s.get(request.index, request.arrival_s))

    return change


def private_share(share: float, seed: int) -> Change:
    """A share of the requests, chosen by ``seed``, neither finds nor leaves anything in the prefix cache."""
    chances: Column[float] = Column(Stream(seed, "private").uniforms)

    def change(request: Request) -> Request:
        return request._replace(prompt=()) if chances[request.index] < share else request

    return change
