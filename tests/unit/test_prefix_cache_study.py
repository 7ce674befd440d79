"""Hit rate against cache size: the published Mooncake figures, Che's approximation, and a cache by hand."""

from __future__ import annotations

import json
import math
from collections import OrderedDict

import numpy as np
import pytest

from servesim import api
from servesim.analysis.prefix_cache import che_hit_rate, replay, study_cache
from servesim.analysis.simulation import prepare
from servesim.config.load import load_scenario
from servesim.workload.request import Request, Segment


def asks(names, tokens=16):
    """One request for each name: a prompt of one block and one token more."""
    return [
        Request(i, str(i), float(i), tokens + 1, 1, (Segment(int(name), tokens), Segment(None, 1)))
        for i, name in enumerate(names)
    ]


def test_mooncakes_hit_rates_against_cache_size():
    """Computed from the public trace (512-token blocks, LRU); Mooncake, FAST 2025, Figure 9 agrees."""
    prepared = prepare(load_scenario("mooncake-conv-h100"))
    study = study_cache(prepared, [3_000_000, 5_000_000, 10_000_000])
    rates = {point.size_tokens: point.hit_rate * 100 for point in study.points}
    assert rates.pop(study.pool_tokens) < 5
    published = {3_000_000: 14.1, 5_000_000: 21.5, 10_000_000: 29.3, math.inf: 37.4}
    assert rates == pytest.approx(published, abs=1.0)
    assert study.points[-1].evicted_blocks == 0


@pytest.mark.parametrize("split", ["tensor_parallel_size=2", "pipeline_parallel_size=2"])
def test_a_cache_is_as_large_however_its_engine_is_split(split):
    few = ["workload.num_requests=5"]
    whole, parts = (
        study_cache(prepare(load_scenario("poisson-chat", [*few, *more])), [4096])
        for more in ([], [f"engine.{split}"])
    )
    assert parts.points[0].size_bytes == whole.points[0].size_bytes > 0


@pytest.mark.parametrize("skew", [0.6, 0.9, 1.2])
@pytest.mark.parametrize("share", [0.05, 0.2, 0.5])
def test_che_against_a_simulated_cache_under_independent_references(skew, share):
    items, count = 2000, 60_000
    weights = 1 / np.arange(1, items + 1) ** skew
    weights /= weights.sum()
    names = np.random.default_rng(5).choice(items, count, p=weights)
    size = int(items * share)
    hits = lru_hits(names, size)
    expected = che_hit_rate(weights * count, np.ones(items), size)
    warm = hits[count // 3 :].mean()
    assert warm == pytest.approx(expected, abs=0.02)


def lru_hits(names, size):
    """Which references find their item in a textbook LRU cache."""
    kept: OrderedDict[int, None] = OrderedDict()
    hits = np.zeros(len(names))
    for i, name in enumerate(names.tolist()):
        if name in kept:
            hits[i] = 1
            kept.move_to_end(name)
        else:
            kept[name] = None
            if len(kept) > size:
                kept.popitem(last=False)
    return hits


@pytest.mark.parametrize("size", [40, 200, 600])
def test_the_block_pool_is_that_cache(size):
    names = np.random.default_rng(2).zipf(1.3, 5000) % 1000
    whole = [
        Request(i, str(i), float(i), 17, 1, (Segment(int(name), 16), Segment(int(name) + 10_000, 1)))
        for i, name in enumerate(names)
    ]
    rate, _ = replay(whole, (size + 1) * 16, 16)  # the last token of a prompt needs a place, too
    assert rate * 17 / 16 == pytest.approx(lru_hits(names, size).mean(), abs=0.012)


def test_a_small_cache_forgets_in_order():
    rate, evicted = replay(asks([1, 2, 1, 3, 2, 1]), 3 * 16, 16)
    # Three blocks; the private end of a prompt takes one while it is looked at and leaves nothing to find.
    # 1 and 2 fill the rest; 1 is found and is then the newer; 3 drives out 2, 2 drives out 1, 1 drives out 3.
    assert rate == pytest.approx(1 * 16 / (6 * 17))
    assert evicted == 3


def test_che_ends_where_everything_fits():
    counts, sizes = np.array([4.0, 3.0, 1.0]), np.array([10.0, 10.0, 10.0])
    assert che_hit_rate(counts, sizes, 30) == 1
    assert che_hit_rate(counts, sizes, 30, first_misses=True) == pytest.approx(5 / 8)
    rates = [che_hit_rate(counts, sizes, size) for size in (1, 5, 10, 20, 29)]
    assert rates == sorted(rates)


def test_turns_of_a_conversation_find_the_turns_before():
    report = api.prefix_cache("poisson-chat", overrides=["workload.num_requests=400"])
    study = report.study
    assert study.num_requests == 400
    assert study.points[-1].hit_rate > 0.5
    rates = [point.hit_rate for point in study.points]
    assert rates == sorted(rates)
    told = json.loads(report.to_json())
    assert told["points"][-1]["size_tokens"] == "inf"
    assert "unbounded" in str(report)
    assert f"own pool {study.pool_tokens:,}" in str(report)
    assert set(report.files()) == {"prefix-cache.html", "prefix-cache.json"}


def test_a_request_longer_than_the_cache_is_not_kept():
    rate, evicted = replay(asks([1, 1], tokens=160), 64, 16)
    assert (rate, evicted) == (0, 0)
