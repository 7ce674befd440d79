"""Which beams go on: beam search over a synthetic language model.

A beam's next token has the probabilities of a stick that is broken again and again, each time at a Beta(1, c)
share of the rest. The smaller c, the surer the model. c is a request's own: the scenario's concentration
times a squared standard normal, since some texts (lists, copies, loops) are nearly certain and others are
open. The n best sums of log-probabilities go on, as in real beam search. Source: an assumption; its one
number is an estimate that docs/sharing.md compares with the PagedAttention paper.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from servesim.config.sampling import SamplingConfig
from servesim.engine.state import RequestState
from servesim.workload.streams import FloatArray, Stream

__all__ = ["CONCENTRATION", "BeamSearch", "build_beams"]

CONCENTRATION = 0.4
_LEAST = 1e-4  # of a request's concentration: every token is certain
_STICKS = 2  # pieces broken off per beam that are kept as candidates
_PIECES = 1 << 16  # drawn at a time


class BeamSearch:
    """The parents of every step's beams: a function of (seed, request, place in its output)."""

    def __init__(self, width: int, concentration: float, seed: int) -> None:
        self.width = width
        self._mean = concentration
        self._stream = Stream(seed, "beams")

    def parents(self, request: RequestState) -> list[int]:
        """For each beam of the token that has just come out, the beam that it continues."""
        if request.drawn is None:
            request.drawn = self._search(request.request.index, request.output_limit)
        parents: list[int] = next(request.drawn)
        return parents

    def _search(self, index: int, num_tokens: int) -> Iterator[list[int]]:
        width, own = self.width, self._stream.child(str(index))
        concentration = max(self._mean * float(own.child("law").normals(0, 1)[0]) ** 2, _LEAST)
        scores = np.full(width, -np.inf)
        scores[0] = 0.0  # a prompt is one beam
        size = max(1, _PIECES // (_STICKS * width**2))
        for first in range(0, num_tokens, size):
            count = min(size, num_tokens - first)
            for step in _log_probabilities(own, first, count, width, concentration):
                sums = (scores[:, None] + step).ravel()
                best = np.argsort(-sums, kind="stable")[:width]
                scores = sums[best]
                yield (best // width).tolist()


def _log_probabilities(
    stream: Stream, first: int, num_tokens: int, width: int, concentration: float
) -> FloatArray:
    """The ``width`` likeliest next tokens of every beam from a place on: (tokens, beams, candidates)."""
    shape = (num_tokens, width, _STICKS * width)
    uniforms = stream.uniforms(first * _STICKS * width**2, int(np.prod(shape))).reshape(shape)
    rest = np.log1p(-uniforms) / concentration
    broken = np.log(-np.expm1(np.minimum(rest, -1e-300)))  # Beta(1, c) = 1 - uniform ** (1 / c)
    pieces = broken + np.cumsum(rest, axis=2) - rest
    likeliest: FloatArray = -np.sort(-pieces, axis=2)[:, :, :width]
    return likeliest


def build_beams(config: SamplingConfig, seed: int) -> BeamSearch | None:
    """The law of a scenario; None when its sequences never branch."""
    if config.method != "beam":
        return None
    return BeamSearch(config.n, config.concentration or CONCENTRATION, seed)
