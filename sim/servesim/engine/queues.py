"""The waiting requests, in the order in which they are considered."""

from __future__ import annotations

from bisect import insort
from collections import deque

from servesim.engine.state import RequestState

__all__ = ["FcfsQueue", "PriorityQueue", "WaitingQueue"]


class FcfsQueue(deque[RequestState]):
    """First come, first served, with preempted requests at the head."""

    @property
    def head(self) -> RequestState:
        """The request to be admitted next."""
        return self[0]

    def prepend(self, request: RequestState) -> None:
        """A preempted request."""
        self.appendleft(request)

    def unordered(self) -> list[RequestState]:
        """All requests that wait."""
        return list(self)


class PriorityQueue:
    """By priority, arrival and id, whoever was preempted too."""

    def __init__(self) -> None:
        self._queue: list[RequestState] = []  # the head last

    def __len__(self) -> int:
        return len(self._queue)

    @property
    def head(self) -> RequestState:
        """The request to be admitted next."""
        return self._queue[-1]

    def append(self, request: RequestState) -> None:
        """A new request."""
        insort(self._queue, request, key=_backwards)

    prepend = append

    def popleft(self) -> RequestState:
        """Remove the head."""
        return self._queue.pop()

    def remove(self, request: RequestState) -> None:
        """Remove a preempted request whose last token was already on its way."""
        self._queue.remove(request)

    def unordered(self) -> list[RequestState]:
        """All requests that wait."""
        return list(self._queue)


WaitingQueue = FcfsQueue | PriorityQueue


class _Descending:
    """A sort key that reverses the order of another."""

    __slots__ = ("key",)

    def __init__(self, key: tuple[int, float, str]) -> None:
        self.key = key

    def __lt__(self, other: _Descending) -> bool:
        return other.key < self.key


def _backwards(request: RequestState) -> _Descending:
    return _Descending(request.priority_key)
