"""How much of the prompts a prefix cache of a given size would find: the cache alone, without an engine."""

from __future__ import annotations

import gc
import heapq
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from servesim.analysis.simulation import Prepared
from servesim.cost.kv_groups import kv_layout
from servesim.kv.paged import PagedKVCache
from servesim.workload.request import Request, Workload

__all__ = ["CachePoint", "CacheStudy", "che_hit_rate", "replay", "study_cache"]

Floats = NDArray[np.float64]

_POOLS = (1, 2, 4, 8, 16, 32, 64)
"""Sizes that are tried when none are named, in pools of the scenario's own engine."""


@dataclass(frozen=True, slots=True)
class CachePoint:
    """One size of the cache."""

    size_tokens: float
    """inf: nothing is ever forgotten."""
    size_bytes: float
    """On all GPUs of a replica."""
    hit_rate: float
    """Prompt tokens found over prompt tokens asked for."""
    evicted_blocks: int
    independent: float
    """Hit rate by Che's approximation, as if every block were asked for at random times."""


@dataclass(frozen=True, slots=True)
class CacheStudy:
    """Hit rate against size for one workload."""

    name: str
    num_requests: int
    prompt_tokens: int
    block_size: int
    pool_tokens: int
    """KV pool of the scenario's own engine, all of it counted as cache."""
    points: tuple[CachePoint, ...]
    """By size; the last one is unbounded."""


def study_cache(
    prepared: Prepared, sizes_tokens: Sequence[int] = (), on_size: Callable[[float], None] = lambda size: None
) -> CacheStudy:
    """Replay a scenario's requests through the engine's block pool, at its own size and others.

    Requests are looked up and kept one after another in order of arrival, as if each were served at once: no
    other request holds blocks meanwhile. What the engine's own run finds lies below, since live requests
    take their share of the pool. ``on_size(size_tokens)`` is called before each replay.
    """
    engine = prepared.engine
    token_bytes = kv_layout(prepared.model, engine).token_bytes * engine.tensor_parallel_size
    requests = list(_in_order(prepared.workload))
    pool_tokens = (prepared.memory.num_gpu_blocks - 1) * engine.block_size
    named = sizes_tokens or [pool_tokens * many for many in _POOLS]
    sizes: list[float] = [*sorted({*named, pool_tokens}), math.inf]
    counts, lengths = _references(requests)
    points = []
    for size in sizes:
        on_size(size)
        hit_rate, evicted = replay(requests, size, engine.block_size)
        expected = che_hit_rate(counts, lengths, size, first_misses=True)
        points.append(CachePoint(size, size * token_bytes, hit_rate, evicted, expected))
    prompt_tokens = sum(request.prompt_tokens for request in requests)
    return CacheStudy(
        prepared.loaded.scenario.name,
        len(requests),
        prompt_tokens,
        engine.block_size,
        pool_tokens,
        tuple(points),
    )


def replay(requests: Iterable[Request], size_tokens: float, block_size: int) -> tuple[float, int]:
    """Hit rate and evicted blocks of vLLM's least-recently-used block pool of ``size_tokens`` tokens.

    As in the engine, the last token of a prompt is always computed. A named output is kept too, a request
    longer than the cache is not.
    """
    requests = list(requests)
    with _no_collection():
        return _replay(requests, size_tokens, block_size)


def _replay(requests: Sequence[Request], size_tokens: float, block_size: int) -> tuple[float, int]:
    most = sum(-(-(r.prompt_tokens + r.output_tokens) // block_size) for r in requests)
    num_blocks = most if math.isinf(size_tokens) else int(size_tokens) // block_size
    cache = PagedKVCache(num_blocks + 1, block_size, enable_prefix_caching=True)
    found = asked = 0
    for request in requests:
        asked += request.prompt_tokens
        sequence = cache.new_sequence(request.prompt, request.prompt_tokens, request.output_name)
        hit = cache.find_hit(sequence, request.prompt_tokens - 1)
        assert hit is not None
        kept = request.prompt_tokens + (request.output_tokens - 1 if request.output_name is not None else 0)
        found += hit.num_tokens
        if cache.num_blocks_needed(sequence, kept, hit) > cache.num_free_blocks:
            continue
        cache.allocate(sequence, kept, hit)
        cache.cache(sequence, kept)
        cache.free(sequence)
    return (found / asked if asked else math.nan), cache.evictions


@contextmanager
def _no_collection() -> Iterator[None]:
    """Millions of small objects that live long: looking for cycles among them takes three times the rest."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def che_hit_rate(counts: Floats, sizes: Floats, capacity: float, *, first_misses: bool = False) -> float:
    """Hit rate of an LRU cache whose items are asked for independently, in proportion to ``counts``.

    An item stays for the characteristic time T, the same for all, with sum_i sizes_i (1 - exp(-p_i T)) =
    capacity; it is found with probability 1 - exp(-p_i T) (Che, Tung & Wang 2002). The rate is weighted with
    the sizes. ``first_misses``: of the ``counts`` requests for each item, the first finds nothing.
    """
    rates = counts / counts.sum()
    asked = counts - 1 if first_misses else counts
    total = float(counts @ sizes)
    if capacity >= sizes.sum():
        return float(asked @ sizes) / total
    low, high = 0.0, 1.0
    while float(sizes @ -np.expm1(-rates * high)) < capacity:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if float(sizes @ -np.expm1(-rates * middle)) < capacity else (low, middle)
    return float((asked * sizes) @ -np.expm1(-rates * high)) / total


def _in_order(workload: Workload) -> Iterator[Request]:
    """All requests by arrival; those that follow another one come right after it was asked."""
    serial = itertools.count()
    queue = [(request.arrival_s, next(serial), request) for request in workload.arrivals()]
    heapq.heapify(queue)
    while queue:
        now_s, _, request = heapq.heappop(queue)
        yield request
        after = workload.follow_up(request, now_s)
        if after is not None:
            heapq.heappush(queue, (after.arrival_s, next(serial), after))


def _references(requests: Iterable[Request]) -> tuple[Floats, Floats]:
    """How often each distinct piece of a prompt, told by all before it, was asked for; and its tokens."""
    counts: Counter[int] = Counter()
    lengths: dict[int, int] = {}
    private = itertools.count()
    for request in requests:
        chain = 0
        for name, tokens in request.prompt or ((None, request.prompt_tokens),):
            chain = hash((chain, name if name is not None else f"private {next(private)}"))
            counts[chain] += 1
            lengths[chain] = max(lengths.get(chain, 0), tokens)
    return (
        np.array(list(counts.values()), dtype=np.float64),
        np.array([lengths[key] for key in counts], dtype=np.float64),
    )
