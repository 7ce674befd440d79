"""How many tokens a prompt or an output has."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from servesim.config.workload import (
    EmpiricalTokens,
    FixedTokens,
    GammaTokens,
    GeometricTokens,
    LognormalTokens,
    TokensConfig,
    UniformTokens,
)
from servesim.workload.streams import Column, IntArray, Stream
from servesim.workload.traces import read_column

__all__ = ["drawn_lengths", "recorded_lengths"]

_MOST_TOKENS = 1_000_000_000


def drawn_lengths(config: TokensConfig, stream: Stream, find_file: Callable[[str], Path]) -> Column[int]:
    """Lengths by request index, at least 1, each a function of one or two random numbers of that index."""
    match config:
        case FixedTokens():
            return Column(lambda start, count: np.full(count, config.tokens, dtype=np.int64))
        case UniformTokens():
            return _uniform(config, stream)
        case LognormalTokens():
            return _lognormal(config, stream)
        case GeometricTokens():
            return _geometric(config, stream)
        case GammaTokens():
            return _gamma(config, stream)
        case EmpiricalTokens():
            return _empirical(_rescaled(config, read_column(find_file(config.file), config.column)), stream)


def recorded_lengths(values: IntArray) -> Column[int]:
    """Lengths as recorded, row by row."""

    def block(start: int, count: int) -> IntArray:
        return values[start : start + count]

    return Column(block)


def _uniform(config: UniformTokens, stream: Stream) -> Column[int]:
    low = max(1, math.floor(config.mean_tokens * (1 - config.range_ratio)))
    high = math.ceil(config.mean_tokens * (1 + config.range_ratio))

    def block(start: int, count: int) -> IntArray:
        return low + (stream.uniforms(start, count) * (high - low + 1)).astype(np.int64)

    return Column(block)


def _lognormal(config: LognormalTokens, stream: Stream) -> Column[int]:
    most = _MOST_TOKENS if config.max_tokens is None else config.max_tokens

    def block(start: int, count: int) -> IntArray:
        tokens = config.median_tokens * np.exp(config.sigma * stream.normals(start, count))
        return np.clip(np.rint(tokens), config.min_tokens, most).astype(np.int64)

    return Column(block)


def _geometric(config: GeometricTokens, stream: Stream) -> Column[int]:
    if config.mean_tokens == 1:
        return Column(lambda start, count: np.ones(count, dtype=np.int64))
    log_continue = math.log1p(-1 / config.mean_tokens)

    def block(start: int, count: int) -> IntArray:
        # by inversion: P(length > n) = (1 - 1 / mean) ** n
        return 1 + (np.log1p(-stream.uniforms(start, count)) / log_continue).astype(np.int64)

    return Column(block)


def _gamma(config: GammaTokens, stream: Stream) -> Column[int]:
    most = _MOST_TOKENS if config.max_tokens is None else config.max_tokens

    def block(start: int, count: int) -> IntArray:
        tokens = config.mean_tokens * stream.gammas(config.shape, start, count)
        return np.clip(np.rint(tokens), 1, most).astype(np.int64)

    return Column(block)


def _rescaled(config: EmpiricalTokens, values: IntArray) -> IntArray:
    if config.mean_tokens is not None:
        values = np.rint(values * (config.mean_tokens / values.mean())).astype(np.int64)
    return np.clip(values, 1, config.max_tokens)


def _empirical(values: IntArray, stream: Stream) -> Column[int]:
    def block(start: int, count: int) -> IntArray:
        return values[(stream.uniforms(start, count) * len(values)).astype(np.int64)]

    return Column(block)
