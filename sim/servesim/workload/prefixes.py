"""System prompts that requests share."""

from __future__ import annotations

import numpy as np

from servesim.config.workload import SharedPrefixesConfig
from servesim.workload.request import Segment
from servesim.workload.streams import Column, FloatArray, IntArray, Stream

__all__ = ["SharedPrefixes"]


class SharedPrefixes:
    """Which of the system prompts a request (or a session) begins with."""

    def __init__(self, config: SharedPrefixesConfig, stream: Stream) -> None:
        self._tokens = config.tokens
        cumulative = _cumulative_popularity(config)

        def block(start: int, count: int) -> IntArray:
            return np.searchsorted(cumulative, stream.uniforms(start, count), side="right").astype(np.int64)

        self._choices: Column[int] = Column(block)

    def of(self, index: int) -> Segment:
        """The system prompt of request (or session) ``index``; 0 is the most popular one."""
        return Segment(("system", self._choices[index]), self._tokens)


def _cumulative_popularity(config: SharedPrefixesConfig) -> FloatArray:
    exponent = config.zipf_exponent if config.popularity == "zipf" else 0.0
    sums = np.cumsum(np.arange(1, config.num_prefixes + 1, dtype=np.float64) ** -exponent)
    shares: FloatArray = sums / sums[-1]  # the last is exactly 1, above every uniform
    return shares
