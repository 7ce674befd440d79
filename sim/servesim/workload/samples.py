"""Several samples of every prompt, each a request of its own."""

from __future__ import annotations

from collections.abc import Iterator

from servesim.workload.request import Request, Segment, Workload

__all__ = ["Samples"]


class Samples:
    """A workload whose requests wait for nothing, ``n`` times over: same prompt, same moment, same length.

    The prompt gets a name, so that a prefix cache finds it; sample k of request i is request i * n + k.
    """

    def __init__(self, workload: Workload, n: int) -> None:
        self._workload = workload
        self._n = n

    @property
    def num_requests(self) -> int:
        """Samples in all."""
        return self._workload.num_requests * self._n

    def arrivals(self) -> Iterator[Request]:
        """The samples of each request, one after another."""
        for request in self._workload.arrivals():
            prompt = _named(request)
            for sample in range(self._n):
                yield request._replace(
                    index=request.index * self._n + sample,
                    request_id=f"{sample}_{request.request_id}",
                    prompt=prompt,
                )

    def follow_up(self, finished: Request, now_s: float) -> Request | None:
        """Nobody waits for a sample."""
        return None


def _named(request: Request) -> tuple[Segment, ...]:
    """The prompt of a request with a name for what nobody else has."""
    prompt = request.prompt or (Segment(None, request.prompt_tokens),)
    return tuple(
        part if part.name is not None else part._replace(name=("samples", request.index, place))
        for place, part in enumerate(prompt)
    )
