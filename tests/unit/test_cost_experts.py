"""Which experts a step reaches, and the busiest GPU: against closed forms and against drawing at random."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from servesim.config.profiles import load_gpu
from servesim.config.weight_formats import WEIGHT_FORMATS
from servesim.cost.experts import Routing, popularities
from servesim.cost.ops import Gemm

H100 = load_gpu("h100-sxm")


def drawn(num_experts, experts_per_token, num_ranks, num_tokens, repeats=300):
    """Mean over random uniform routings of (experts, rows) of the rank with most of each."""
    random = np.random.default_rng(7)
    experts, rows = [], []
    for _ in range(repeats):
        order = random.random((num_tokens, num_experts)).argsort(axis=1)[:, :experts_per_token]
        counts = np.bincount(order.ravel(), minlength=num_experts).reshape(-1, num_ranks)
        experts.append(np.count_nonzero(counts, axis=0).max())
        rows.append(counts.sum(axis=0).max())
    return np.mean(experts), np.mean(rows)


def test_uniform_routing_reaches_the_expected_number_of_experts():
    assert Routing(8, 2).load(1).experts == pytest.approx(2)
    assert Routing(128, 8).load(64).experts == pytest.approx(126, abs=0.1)
    assert Routing(4, 4).load(1).experts == pytest.approx(4)
    load = Routing(128, 8).load(2048)
    assert (load.rows, load.tile_rows) == (pytest.approx(8 * 2048), pytest.approx(8 * 2048))
    assert Routing(128, 8).load(2049).tile_rows == pytest.approx(128 * 192)


def test_uneven_popularity_reads_fewer_weights():
    """Zipf on 128 experts, 8 per token: by how much a step gets cheaper, as the sum over experts says."""
    for tokens in (8, 16, 64):
        even, skewed = Routing(128, 8).load(tokens), Routing(128, 8, skew=1.0).load(tokens)
        expected = sum(1 - (1 - p) ** tokens for p in popularities(128, 8, 1.0))
        assert skewed.experts == pytest.approx(expected)
        assert skewed.experts < even.experts
        assert skewed.rows == pytest.approx(even.rows)


@settings(deadline=None)
@given(experts=st.integers(1, 300), per_token=st.integers(1, 16), skew=st.floats(0, 3))
def test_popularities_are_probabilities_that_add_up(experts, per_token, skew):
    per_token = min(per_token, experts)
    found = popularities(experts, per_token, skew)
    assert found.sum() == pytest.approx(per_token)
    assert found.min() > 0
    assert found.max() <= 1
    assert (np.diff(found) <= 1e-12).all()


@pytest.mark.parametrize("num_tokens", [1, 4, 16, 64, 512])
@pytest.mark.parametrize(
    ("experts", "per_token", "ranks"), [(256, 8, 8), (128, 8, 4), (32, 4, 2), (64, 6, 8)]
)
def test_the_busiest_rank_is_that_of_random_routing(experts, per_token, ranks, num_tokens):
    most_experts, most_rows = drawn(experts, per_token, ranks, num_tokens)
    load = Routing(experts, per_token, ranks).load(num_tokens)
    # A normal variable is too symmetric for the few rows of one token.
    assert load.rows == pytest.approx(most_rows, rel=0.05 if num_tokens >= 16 else 0.15)
    assert load.experts == pytest.approx(most_experts, rel=0.1 if num_tokens >= 16 else 0.18)


@settings(deadline=None)
@given(
    tokens=st.integers(1, 4096),
    more=st.integers(1, 512),
    ranks=st.sampled_from([1, 2, 4, 8]),
    skew=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
)
def test_experts_never_take_less_time_for_more_tokens(tokens, more, ranks, skew):
    gemm, routing = Gemm(H100, WEIGHT_FORMATS["none"]), Routing(128, 8, ranks, skew)
    here, there = (gemm.grouped_seconds(routing.load(count), 1536, 2048) for count in (tokens, tokens + more))
    assert there >= here * (1 - 1e-12)


def test_experts_read_weights_from_32_to_256_tokens_as_measured():
    # Measured on H100: 128 experts, 8 per token, 2048 x 768, bf16: 420 to 450 us, flat from 32 to 256 tokens.
    gemm = Gemm(H100, WEIGHT_FORMATS["none"])
    for tokens in (64, 128, 256):
        load = Routing(128, 8).load(tokens)
        up, down = gemm.grouped_seconds(load, 1536, 2048), gemm.grouped_seconds(load, 2048, 768)
        assert 420e-6 * 0.97 <= up + down <= 450e-6 * 1.03
