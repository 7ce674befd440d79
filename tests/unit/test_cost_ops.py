"""Laws of single operations: hand-computed values, monotony, refusals."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from servesim.config.profiles import load_gpu
from servesim.cost.ops import (
    AllReduce,
    DecodeAttention,
    Elementwise,
    Gemm,
    PrefillAttention,
    causal_pairs,
    expected_distinct_experts,
)
from servesim.errors import ConfigError

A100 = load_gpu("a100-80gb-sxm")
H100 = load_gpu("h100-sxm")
H200 = load_gpu("h200-sxm")
B200 = load_gpu("b200")
MEASURED = [A100, H100, H200, B200]
IDS = [gpu.name for gpu in MEASURED]


def decode_attention(gpu, dtype="bf16", *, flops=0.0, latent=False):
    return DecodeAttention(
        gpu,
        dtype,
        num_kv_heads=8,
        kv_elements=2048,
        flops_per_context_token=flops,
        latent=latent,
    )


def test_gemm_is_the_law_written_out():
    rows, n, k = 200, 6144, 4096  # 2 x 48 tiles on 132 SMs: one wave, 96 of 132 SMs busy
    compute = 2 * 256 * n * k / (989.4e12 * 0.83) * (1 + 0.19 * (132 / 96 - 1))
    memory = (2 * (n * k + rows * k) + 2 * rows * n) / (3.35e12 * 0.88)
    expected = 3.6e-6 + (compute**4.5 + memory**4.5) ** (1 / 4.5)
    assert Gemm(H100, "bf16").seconds(rows, n, k) == pytest.approx(expected, rel=1e-9)


def test_a_small_product_streams_weights_and_a_large_one_computes():
    gemm = Gemm(H100, "bf16")
    streaming = 2 * 28672 * 4096 / (3.35e12 * 0.88)
    assert gemm.seconds(1, 28672, 4096) == pytest.approx(3.6e-6 + streaming, rel=0.001)
    computing = 2 * 8192 * 28672 * 4096 / (989.4e12 * 0.83)
    assert gemm.seconds(8192, 28672, 4096) == pytest.approx(computing, rel=0.01)


@pytest.mark.parametrize("gpu", MEASURED, ids=IDS)
@settings(deadline=None)
@given(
    rows=st.integers(1, 9000),
    more=st.integers(1, 600),
    n=st.sampled_from([576, 4096, 6144, 14336, 128256]),
    k=st.sampled_from([512, 4096, 14336]),
    data=st.data(),
)
def test_gemm_never_takes_less_time_for_more_rows(gpu, rows, more, n, k, data):
    gemm = Gemm(gpu, data.draw(st.sampled_from(sorted(gpu.efficiency.gemm))))
    assert gemm.seconds(rows + more, n, k) >= gemm.seconds(rows, n, k)


def test_the_wave_penalty_alone_would_not_be_monotone():
    # What the running maximum in Gemm.seconds is for: a half-empty wave that one more row of tiles fills.
    gemm, n, k = Gemm(H100, "fp8"), 66 * 128, 4096
    assert gemm._compute_s(129, n, k) < gemm._compute_s(128, n, k)
    assert gemm.seconds(129, n, k) >= gemm.seconds(128, n, k)


@settings(deadline=None)
@given(tokens=st.integers(1, 4096), more=st.integers(1, 512))
def test_experts_never_take_less_time_for_more_tokens(tokens, more):
    gemm = Gemm(H100, "bf16")

    def seconds(num_tokens):
        touched = expected_distinct_experts(128, 8, num_tokens)
        return gemm.grouped_seconds(8 * num_tokens, touched, 1536, 2048)

    assert seconds(tokens + more) >= seconds(tokens)


def test_experts_read_weights_from_32_to_256_tokens_as_measured():
    # Measured on H100: 128 experts, 8 per token, 2048 x 768, bf16: 420 to 450 us, flat from 32 to 256 tokens.
    gemm = Gemm(H100, "bf16")
    for tokens in (64, 128, 256):
        touched = expected_distinct_experts(128, 8, tokens)
        up = gemm.grouped_seconds(8 * tokens, touched, 1536, 2048)
        down = gemm.grouped_seconds(8 * tokens, touched, 2048, 768)
        assert 420e-6 * 0.97 <= up + down <= 450e-6 * 1.03


def test_expected_distinct_experts():
    assert expected_distinct_experts(8, 2, 1) == pytest.approx(2)
    assert expected_distinct_experts(128, 8, 64) == pytest.approx(126, abs=0.1)
    assert expected_distinct_experts(4, 4, 1) == 4


@settings(deadline=None)
@given(new=st.integers(1, 200), cached=st.integers(0, 300), window=st.none() | st.integers(1, 250))
def test_causal_pairs_are_those_of_the_mask(new, cached, window):
    exact = sum(min(cached + i, window or math.inf) for i in range(1, new + 1))
    # The law halves the diagonal: it counts at most half a pair per token less than the mask does.
    assert exact - new <= causal_pairs(new, cached, window) <= exact


@pytest.mark.parametrize("window", [None, 128])
@settings(deadline=None)
@given(new=st.integers(1, 8192), cached=st.integers(0, 100_000), more=st.integers(1, 5000))
def test_prefill_attention_grows_with_chunk_and_prefix(window, new, cached, more):
    law = PrefillAttention(H100, "bf16", kv_elements=2048, flops_per_pair=4 * 32 * 128)
    here = law.chunk_s(new, cached, window) * (1 - 1e-12)
    assert law.chunk_s(new + more, cached, window) >= here
    assert law.chunk_s(new, cached + more, window) >= here


def test_prefill_attention_of_a_long_prompt_and_of_a_short_chunk():
    law = PrefillAttention(H100, "bf16", kv_elements=2048, flops_per_pair=4 * 32 * 128)
    long = 4 * 32 * 128 * 8192**2 / 2 / (989.4e12 * 0.66) * (1 + 898 / 8192)
    assert law.chunk_s(8192, 0, None) == pytest.approx(long)
    # One token on a long prefix is bound by reading the prefix's keys and values.
    assert law.chunk_s(1, 100_000, None) == pytest.approx(100_001 * 4096 / (3.35e12 * 0.93))


def test_decode_attention_is_launch_plus_sequences_plus_bytes():
    law = decode_attention(H100)
    assert law.base_s(64) == pytest.approx(11.5e-6 + 23.5e-9 * 64 * 8)
    assert law.per_context_token_s == pytest.approx(4096 / (3.35e12 * 0.93))
    fp8 = decode_attention(H100, "fp8")
    assert fp8.per_context_token_s == pytest.approx(2048 / (3.35e12 * 0.80))


def test_latent_attention_with_many_heads_is_bound_by_compute():
    # 128 heads: 278,528 operations on 1,152 bytes per cached token, 242 a byte.
    law = DecodeAttention(
        H100,
        "bf16",
        num_kv_heads=1,
        kv_elements=576,
        flops_per_context_token=2 * 128 * 1088,
        latent=True,
    )
    assert law.per_context_token_s == pytest.approx(2 * 128 * 1088 / (989.4e12 * 0.60))
    # Measured together: 578 to 610 TFLOP/s and 2.4 to 2.5 TB/s.
    assert 570e12 <= 2 * 128 * 1088 / law.per_context_token_s <= 620e12
    assert 2.3e12 <= 1152 / law.per_context_token_s <= 2.55e12


def test_all_reduce_takes_the_faster_algorithm():
    law = AllReduce(H100, 4)
    small, large = 64 * 1024, 64 * 2**20
    assert law.seconds(small) == pytest.approx(4.6e-6 + small / 87e9)
    assert law.seconds(large) == pytest.approx(20e-6 + 1.5 * large / 338e9)
    assert law.gather_seconds(large) < law.seconds(large)
    assert AllReduce(H100, 1).seconds(large) == 0


def test_elementwise_is_a_launch_until_its_bytes_take_longer():
    law = Elementwise(H100)
    assert law.seconds(1000) == pytest.approx(2.5e-6)
    assert law.seconds(1e9) == pytest.approx(1e9 / (3.35e12 * 0.88))


def test_a_gpu_without_fp8_refuses_it():
    with pytest.raises(ConfigError, match=r"engine\.quantization  a100-80gb-sxm has no fp8 matrix products"):
        Gemm(A100, "fp8")
    with pytest.raises(ConfigError, match=r"engine\.kv_cache_dtype .* got fp8  it has: bf16  -> set"):
        decode_attention(A100, "fp8")


def test_an_unknown_degree_of_parallelism_is_refused():
    with pytest.raises(ConfigError, match=r"engine\.tensor_parallel_size .* got 3 "):
        AllReduce(H100, 3)
