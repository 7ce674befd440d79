"""Which beams go on: beam search over a synthetic language model.

A beam's next token has the probabilities of a stick that is broken again and again, each time at a Beta(1, c)
share of the rest. The smaller c, the surer the model. c is a request's own: the scenario's concentration
times a squared standard normal, since some texts (lists, copies, loops) are nearly certain and others are
open. The n best sums of log-probabilities go on, as in real beam search. Source: an assumption; its one
number is an estimate that docs/sharing.md compares with the PagedAttention paper.
"""

from __future__ import annotations

import numpy as np

from servesim.config.sampling import SamplingConfig
from servesim.engine.state import RequestState
from servesim.workload.streams import FloatArray, Stream

__all__ = ["CONCENTRATION", "BeamSearch", "build_beams"]

CONCENTRATION = 0.4
_LEAST = 1e-4  # of a request's concentration: every token is certain
_STICKS = 2  # pieces broken off per beam that are kept as candidates


class BeamSearch:
    """The parents of every step's beams: a function of (seed, request, place in its output)."""

    def __init__(self, width: int, concentration: float, seed: int) -> None:
        self.width = width
        self._mean = concentration
        self._stream = Stream(seed, "beams")
        self._parents: dict[RequestState, list[list[int]]] = {}

    def parents(self, request: RequestState) -> list[int]:
        """For each beam of the token that has just come out, the beam that it continues."""
        steps = self._parents.get(request)
        if steps is None:
            steps = self._parents[request] = self._search(request.request.index, request.output_limit)
        step = steps[request.num_output_tokens - 1]
        if request.num_output_tokens == request.output_limit:
            del self._parents[request]
        return step

    def _search(self, index: int, num_tokens: int) -> list[list[int]]:
        width, own = self.width, self._stream.child(str(index))
        concentration = max(self._mean * float(own.child("law").normals(0, 1)[0]) ** 2, _LEAST)
        candidates = _log_probabilities(own, num_tokens, width, concentration)
        scores, steps = candidates[0, 0], [[0] * width]
        for step in candidates[1:]:
            sums = (scores[:, None] + step).ravel()
            best = np.argsort(-sums, kind="stable")[:width]
            scores = sums[best]
            steps.append((best // width).tolist())
        return steps


def _log_probabilities(stream: Stream, num_tokens: int, width: int, concentration: float) -> FloatArray:
    """The ``width`` likeliest next tokens of every beam at every place: (tokens, beams, candidates)."""
    shape = (num_tokens, width, _STICKS * width)
    rest = np.log1p(-stream.uniforms(0, int(np.prod(shape)))).reshape(shape) / concentration
    broken = np.log(-np.expm1(np.minimum(rest, -1e-300)))  # Beta(1, c) = 1 - uniform ** (1 / c)
    pieces = broken + np.cumsum(rest, axis=2) - rest
    likeliest: FloatArray = -np.sort(-pieces, axis=2)[:, :, :width]
    return likeliest


def build_beams(config: SamplingConfig, seed: int) -> BeamSearch | None:
    """The law of a scenario; None when its sequences never branch."""
    if config.method != "beam":
        return None
    return BeamSearch(config.n, config.concentration or CONCENTRATION, seed)
