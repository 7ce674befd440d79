"""Which drafts the model accepts: laws of acceptance that depend on no order of events.

Whether a draft is accepted is a function of (seed, request, place in its output), so a change of scheduler,
allocator or batch changes no request's luck.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from servesim.config.speculative import DepthAcceptance, IidAcceptance, RecordedAcceptance, SpeculativeConfig
from servesim.engine.speculation import Accept
from servesim.engine.state import RequestState
from servesim.workload.streams import Stream
from servesim.workload.traces import read_column

__all__ = ["RecordedDrafts", "build_acceptance", "expected_tokens_per_step"]

_PLACES = 1 << 24  # values of the stream that each request has to itself


def build_acceptance(config: SpeculativeConfig, seed: int, find_file: Callable[[str], Path]) -> Accept:
    """The law of acceptance of a scenario; ``find_file`` turns a file name of the scenario into a path.

    Raises TraceError for a recording that cannot be used.
    """
    law, stream = config.acceptance, Stream(seed, "acceptance")
    if isinstance(law, RecordedAcceptance):
        rows = read_column(find_file(law.file), law.column) - 1
        return _Recorded(rows.tolist(), stream)
    return _Independent(_rates(law, config.num_speculative_tokens), stream)


def expected_tokens_per_step(rates: tuple[float, ...]) -> float:
    """Mean tokens of a verification step: 1 + sum over depths of the product of rates up to there.

    With equal rates a and g drafts it is (1 - a^(g + 1)) / (1 - a) (Leviathan et al., arXiv 2211.17192).
    """
    total, reached = 1.0, 1.0
    for rate in rates:
        reached *= rate
        total += reached
    return total


def _rates(config: IidAcceptance | DepthAcceptance, num_drafts: int) -> tuple[float, ...]:
    return (config.rate,) * num_drafts if isinstance(config, IidAcceptance) else config.rates


class _Independent:
    """A draft is accepted when the uniform number of its place in the output lies below its depth's rate.

    A step never asks again for a place whose draft was rejected, since the model's own token takes it.
    """

    def __init__(self, rates: tuple[float, ...], stream: Stream) -> None:
        self._rates = rates
        self._stream = stream

    def __call__(self, request: RequestState, num_drafts: int, padded: bool) -> int:
        if padded:
            return 0  # placeholders match no token
        if request.drawn is None:
            count = request.output_limit + len(self._rates)
            request.drawn = self._stream.uniforms(request.request.index * _PLACES, count).tolist()
        uniforms: list[float] = request.drawn
        place, accepted = request.num_output_tokens, 0
        while accepted < num_drafts and uniforms[place + accepted] < self._rates[accepted]:
            accepted += 1
        return accepted


class _Recorded:
    """The recorded numbers one after another, from a row that the request's number draws."""

    def __init__(self, rows: list[int], stream: Stream) -> None:
        self._rows = rows
        self._stream = stream

    def __call__(self, request: RequestState, num_drafts: int, padded: bool) -> int:
        if padded:
            return 0
        row: int | None = request.drawn
        if row is None:
            place = request.request.index * _PLACES
            row = int(self._stream.uniforms(place, 1)[0] * len(self._rows))
        request.drawn = (row + 1) % len(self._rows)
        return min(self._rows[row], num_drafts)


class RecordedDrafts:
    """What a drafter proposed and the model accepted of it, by request and place in its output.

    Greedy drafts follow from a request's own tokens: they are the same whatever is served beside it.
    """

    def __init__(self, verified: Mapping[tuple[int, int], tuple[int, int]]) -> None:
        self._verified = verified
        """(request, output tokens before): drafts, accepted."""

    def propose(self, request: RequestState) -> int:
        """Drafts for the next step of a request."""
        return self._of(request)[0]

    def __call__(self, request: RequestState, num_drafts: int, padded: bool) -> int:
        """How many of them are accepted."""
        return min(self._of(request)[1], num_drafts)

    def _of(self, request: RequestState) -> tuple[int, int]:
        return self._verified.get((request.request.index, request.num_output_tokens), (0, 0))
