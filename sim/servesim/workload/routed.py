"""What single replicas get from a router that looks at none of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from servesim.workload.request import Request, Workload

__all__ = ["Share", "shares"]


class Share:
    """The requests that one replica gets; what follows on a request goes to the same replica."""

    def __init__(self, original: Workload, requests: list[Request]) -> None:
        self._original = original
        self._requests = requests

    @property
    def num_requests(self) -> int:
        """Those that wait for no other request."""
        return len(self._requests)

    def arrivals(self) -> Iterator[Request]:
        """In the order of their arrival."""
        return iter(self._requests)

    def follow_up(self, finished: Request, now_s: float) -> Request | None:
        """The original's."""
        return self._original.follow_up(finished, now_s)


def shares(original: Workload, replica_of: Callable[[Request], int], count: int) -> list[Share]:
    """What the first ``count`` replicas get; ``replica_of`` is asked about every request, in order."""
    requests: list[list[Request]] = [[] for _ in range(count)]
    for request in original.arrivals():
        replica = replica_of(request)
        if replica < count:
            requests[replica].append(request)
    return [Share(original, one) for one in requests]
