"""What the engine is asked to serve."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import NamedTuple, Protocol

__all__ = ["Request", "Segment", "Workload"]


class Segment(NamedTuple):
    """A run of tokens known by name: two segments of one name begin with the same tokens.

    ``name`` None stands for tokens that no other request has.
    """

    name: Hashable | None
    num_tokens: int


class Request(NamedTuple):
    """One request as a client sends it.

    The lengths of ``prompt`` add up to ``prompt_tokens``; an empty ``prompt`` stands for a prompt that
    no other request shares. ``output_name`` names the generated tokens, so that a later prompt can
    contain them; None when none does. ``output_tokens`` is where the request stops (max_tokens, EOS ignored).
    """

    index: int  # type: ignore[assignment]  # the field's name, not tuple.index
    request_id: str
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    prompt: tuple[Segment, ...] = ()
    output_name: Hashable | None = None
    priority: int = 0


class Workload(Protocol):
    """A source of requests, the same for every configuration that serves it."""

    @property
    def num_requests(self) -> int:
        """Requests that will be sent in all when every one of them is finished."""
        ...

    def arrivals(self) -> Iterator[Request]:
        """Requests whose arrival depends on nothing that is served, by arrival time."""
        ...

    def follow_up(self, finished: Request, now_s: float) -> Request | None:
        """The request released when ``finished`` ends at ``now_s`` (closed loop, next turn), if any.

        Its ``arrival_s`` is at or after ``now_s``.
        """
        ...
