"""The waiting requests, in the order in which they are considered."""

from __future__ import annotations

from bisect import insort
from collections import deque

from servesim.engine.state import RequestState

__all__ = ["WaitingQueue"]


class WaitingQueue:
    """First come, first served with preempted requests at the head; or by (priority, arrival, id)."""

    def __init__(self, *, by_priority: bool) -> None:
        self._by_priority = by_priority
        self._queue: deque[RequestState] = deque()
        self._reversed: list[RequestState] = []  # by priority, the head last

    def __len__(self) -> int:
        return len(self._reversed if self._by_priority else self._queue)

    def unordered(self) -> list[RequestState]:
        """All requests that wait."""
        return [*self._reversed, *self._queue]

    @property
    def head(self) -> RequestState:
        """The request to be admitted next."""
        return self._reversed[-1] if self._by_priority else self._queue[0]

    def append(self, request: RequestState) -> None:
        """A new request."""
        if self._by_priority:
            insort(self._reversed, request, key=_backwards)
        else:
            self._queue.append(request)

    def prepend(self, request: RequestState) -> None:
        """A preempted request."""
        if self._by_priority:
            insort(self._reversed, request, key=_backwards)
        else:
            self._queue.appendleft(request)

    def popleft(self) -> RequestState:
        """Remove the head."""
        return self._reversed.pop() if self._by_priority else self._queue.popleft()

    def remove(self, request: RequestState) -> None:
        """Remove a preempted request whose last token was already on its way."""
        if self._by_priority:
            self._reversed.remove(request)
        else:
            self._queue.remove(request)


class _Descending:
    """A sort key that reverses the order of another."""

    __slots__ = ("key",)

    def __init__(self, key: tuple[int, float, str]) -> None:
        self.key = key

    def __lt__(self, other: _Descending) -> bool:
        return other.key < self.key


def _backwards(request: RequestState) -> _Descending:
    return _Descending(request.priority_key)
