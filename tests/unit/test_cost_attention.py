"""Laws of attention: hand-computed values, monotony, what shared memory and the standard kernel change."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from servesim.config.defaults import resolve_engine
from servesim.config.load import list_data
from servesim.config.profiles import load_gpu, load_model
from servesim.config.scenario import EngineConfig, OperatorStepTime
from servesim.cost.attention import (
    AttentionKernel,
    AttentionShape,
    DecodeAttention,
    LatentKernels,
    PrefillAttention,
    causal_pairs,
)
from servesim.cost.attention_io import flash_bytes, l2_hit, standard_bytes, tile_rows
from servesim.cost.layers import shard
from servesim.cost.operators import OperatorLaw
from servesim.cost.step_time import StepShape
from servesim.errors import ConfigError

GPUS = {name: load_gpu(name) for name in list_data("gpus")}
MEASURED = ["a100-80gb-sxm", "h100-sxm", "h200-sxm", "b200"]
H100 = GPUS["h100-sxm"]
LLAMA = AttentionShape(32, 8, 2048, 4 * 32 * 128, 4 * 32 * 128)
STANDARD = AttentionKernel("standard")


def with_sram(gpu, share):
    return AttentionKernel("flash", int(gpu.shared_memory_per_sm_bytes * share))


@settings(deadline=None)
@given(new=st.integers(1, 200), cached=st.integers(0, 300), window=st.none() | st.integers(1, 250))
def test_causal_pairs_are_those_of_the_mask(new, cached, window):
    exact = sum(min(cached + i, window or math.inf) for i in range(1, new + 1))
    # The law halves the diagonal: it counts at most half a pair per token less than the mask does.
    assert exact - new <= causal_pairs(new, cached, window) <= exact


KERNELS = st.sampled_from([AttentionKernel(), STANDARD, with_sram(H100, 0.25), with_sram(H100, 0.1)])


@settings(deadline=None, max_examples=300)
@given(
    name=st.sampled_from(sorted(GPUS)),
    kernel=KERNELS,
    window=st.sampled_from([None, 128]),
    new=st.integers(1, 8192),
    cached=st.integers(0, 100_000),
    more=st.integers(1, 5000),
)
def test_prefill_attention_grows_with_chunk_and_prefix(name, kernel, window, new, cached, more):
    law = PrefillAttention(GPUS[name], "bf16", LLAMA, kernel)
    here = law.chunk_s(new, cached, window) * (1 - 1e-12)
    assert law.chunk_s(new + more, cached, window) >= here
    assert law.chunk_s(new, cached + more, window) >= here
    assert law.base_s(cached + more) >= law.base_s(cached)


def test_prefill_attention_of_a_long_prompt_and_of_a_short_chunk():
    law, rates = PrefillAttention(H100, "bf16", LLAMA), H100.efficiency.prefill_attention["bf16"]
    flops = 4 * 32 * 128 * 8192**2 / 2
    long = flops / (989.4e12 * rates.compute) * (1 + rates.short_tokens / 8192)
    assert law.chunk_s(8192, 0, None) == pytest.approx(long)
    assert law.base_s(8192) == pytest.approx(rates.launch_s + 8192 * rates.per_key_s)
    # One token on a long prefix is bound by reading the prefix's keys and values.
    read = 100_001 * 4096 / (3.35e12 * H100.efficiency.decode_attention["bf16"].memory)
    assert law.chunk_s(1, 100_000, None) == pytest.approx(read)


# Time of heads of 64 over that of heads of 128: medians of 2,048 and more tokens (aiconfigurator-core).
@pytest.mark.parametrize(("name", "measured"), [("h100-sxm", 0.664), ("h200-sxm", 0.666), ("b200", 0.855)])
def test_small_heads_gain_less_than_their_products(name, measured):
    def seconds(head_dim):
        shape = AttentionShape(32, 8, 16 * head_dim, 128 * head_dim, 128 * head_dim)
        return PrefillAttention(GPUS[name], "bf16", shape).chunk_s(8192, 0, None)

    assert seconds(64) / seconds(128) == pytest.approx(measured, abs=0.01)
    assert seconds(256) / seconds(128) == pytest.approx(2.0)  # not measured: products alone


def test_no_kernel_beats_the_units_for_exponentials():
    """16 a clock and SM: heads of 16 do an eighth of the products for the same exponentials."""
    tiny = AttentionShape(64, 8, 256, 4 * 64 * 16, 4 * 64 * 16)
    a100, rates = GPUS["a100-80gb-sxm"], GPUS["a100-80gb-sxm"].efficiency.prefill_attention["bf16"]
    exponentials = 64 / (16 * 108 * 1.41e9) * 4096**2 / 2 * (1 + rates.short_tokens / 4096)
    assert PrefillAttention(a100, "bf16", tiny).chunk_s(4096, 0, None) == pytest.approx(exponentials)


# vLLM 0.24's attention module of DeepSeek-V3 in block-scaled fp8 with 16 heads, microseconds per layer
# (aiconfigurator-core): 64 prompts of 128 tokens, 4 of 2,048.
@pytest.mark.parametrize(
    ("name", "prompts", "measured_us"),
    [
        ("h200-sxm", ((128, 0),) * 64, 1275),
        ("h200-sxm", ((2048, 0),) * 4, 1281),
        ("h100-sxm", ((128, 0),) * 64, 1373),
        ("h100-sxm", ((2048, 0),) * 4, 1359),
    ],
)
def test_a_layer_of_latent_attention_takes_what_its_module_was_measured_to(name, prompts, measured_us):
    model, gpu = load_model("deepseek-v3"), GPUS[name]
    config = EngineConfig(
        quantization="fp8_block", tensor_parallel_size=8, step_time=OperatorStepTime(host="none")
    )
    law = OperatorLaw(model, gpu, resolve_engine(config, model, gpu))
    parts = law.breakdown(StepShape(0, (0,), prompts, len(prompts)))
    names = ("qkv", "latent_expansion", "prefill_attention", "attention_output")
    tokens = sum(new for new, _ in prompts)
    latent_s = LatentKernels(gpu, shard(model, 8).attention).seconds(tokens)
    layer_s = sum(parts[name] for name in names) / model.num_layers + latent_s
    assert layer_s * 1e6 == pytest.approx(measured_us, rel=0.12)
    assert LatentKernels(GPUS["b200"], shard(model, 8).attention).seconds(tokens) == 0.0
    assert LatentKernels(gpu, LLAMA).seconds(tokens) == 0.0


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_decode_attention_is_launch_plus_sequences_plus_bytes(dtype):
    law, rates = DecodeAttention(H100, dtype, LLAMA), H100.efficiency.decode_attention[dtype]
    assert law.base_s(64) == pytest.approx(rates.launch_s + rates.per_seq_kv_head_s * 64 * 8)
    size = {"bf16": 4096, "fp8": 2048}[dtype]
    assert law.per_context_token_s == pytest.approx(size / (3.35e12 * rates.memory))


def test_latent_attention_with_many_heads_is_bound_by_compute():
    # 128 heads: 278,528 operations on 1,152 bytes per cached token, 242 a byte.
    flops = 2 * 128 * 1088
    law = DecodeAttention(H100, "bf16", AttentionShape(128, 1, 576, flops, 2 * 128 * 320, latent=True))
    assert law.per_context_token_s == pytest.approx(flops / (989.4e12 * 0.60))
    # Measured together: 578 to 610 TFLOP/s and 2.4 to 2.5 TB/s.
    assert 570e12 <= flops / law.per_context_token_s <= 620e12
    assert 2.3e12 <= 1152 / law.per_context_token_s <= 2.55e12


def test_a_gpu_without_an_fp8_cache_refuses_it():
    with pytest.raises(ConfigError, match=r"engine\.kv_cache_dtype .* got fp8  it has: bf16  -> set"):
        DecodeAttention(GPUS["a100-80gb-sxm"], "fp8", LLAMA)


# ---- shared memory: the counts ---------------------------------------------------------------------


def ratio(num_tokens, head_dim, rows):
    """HBM bytes of standard over flash attention, forward, without a mask."""
    flash = flash_bytes(num_tokens, num_tokens**2, head_dim, rows)
    return standard_bytes(num_tokens, num_tokens, head_dim) / flash


def test_standard_over_flash_bytes_at_published_sizes():
    assert ratio(1024, 64, 128) == pytest.approx(3.8, abs=0.05)
    assert ratio(1024, 64, 256) == pytest.approx(6.8, abs=0.05)
    for rows in (128, 192, 256, 320):
        assert 3 <= ratio(1024, 64, rows) <= 10


@given(st.lists(st.integers(20 * 1024, 2**21), min_size=2, max_size=2).map(sorted))
def test_the_ratio_grows_with_shared_memory(sizes):
    rows = [tile_rows(size, 64) for size in sizes]
    assert 16 <= rows[0] <= rows[1]
    assert ratio(1024, 64, rows[0]) <= ratio(1024, 64, rows[1])


def test_flash_bytes_go_with_one_over_the_shared_memory_until_one_tile_holds_all():
    sizes = [2**exponent for exponent in range(17, 25)]  # 128 KiB to 16 MiB
    rows = [tile_rows(size, 128) for size in sizes]
    streamed = [
        flash_bytes(65_536, 65_536**2, 128, each) - flash_bytes(65_536, 0, 128, each) for each in rows
    ]
    for size, more in pairwise(sizes[2:]):
        fall = streamed[sizes.index(size)] / streamed[sizes.index(more)]
        assert more / size == pytest.approx(fall, rel=0.2)
    whole = flash_bytes(1024, 1024**2, 128, 1024)
    assert flash_bytes(1024, 1024**2, 128, 100_000) == whole == 4 * 1024 * 128 * 2


def test_tiles_of_the_measured_gpus_are_those_of_their_kernels():
    # FlashAttention 2 on A100 and 3 on H100 take 128 rows at a head size of 128.
    for name in MEASURED:
        gpu = GPUS[name]
        found = tile_rows(
            gpu.shared_memory_per_sm_bytes, 128, register_file_bytes=gpu.register_file_per_sm_bytes
        )
        assert found == 128
    assert tile_rows(8 * 1024, 128) == 0


def test_l2_serves_most_of_the_stream_until_a_head_outgrows_it():
    assert l2_hit(50 * 2**20, 8192, 128) == 0.8
    assert l2_hit(50 * 2**20, 200_000, 128) == pytest.approx(0.8 * 50 * 2**20 / (200_000 * 512))


# ---- shared memory: the times ----------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(GPUS))
def test_the_gpus_own_shared_memory_is_what_was_measured(name):
    gpu = GPUS[name]
    for share in (1, 4):
        explored = PrefillAttention(gpu, "bf16", LLAMA, with_sram(gpu, share))
        for shape in [(128, 0), (2048, 0), (8192, 30_000), (131_072, 0)]:
            assert explored.chunk_s(*shape, None) == PrefillAttention(gpu, "bf16", LLAMA).chunk_s(
                *shape, None
            )


@pytest.mark.parametrize("name", MEASURED)
def test_a_quarter_of_the_shared_memory_slows_long_prompts_and_leaves_decode(name):
    gpu = GPUS[name]
    quarter, own = with_sram(gpu, 0.25), AttentionKernel()
    tokens = 4 * gpu.l2_bytes // (2 * 128 * 2)  # keys and values of one head outgrow the L2 cache four times
    long, short = (
        [PrefillAttention(gpu, "bf16", LLAMA, kernel).chunk_s(size, 0, None) for kernel in (quarter, own)]
        for size in (tokens, 4096)
    )
    assert long[0] > 1.3 * long[1]
    assert short[0] == short[1]
    explored, measured = (DecodeAttention(gpu, "bf16", LLAMA, kernel) for kernel in (quarter, own))
    assert explored.per_context_token_s == measured.per_context_token_s
    assert explored.base_s(64) == measured.base_s(64)


@pytest.mark.parametrize("name", sorted(GPUS))
def test_less_shared_memory_is_never_faster(name):
    gpu = GPUS[name]
    for shape in [(512, 0), (16_384, 0), (200_000, 0), (8192, 500_000)]:
        times = [
            PrefillAttention(gpu, "bf16", LLAMA, with_sram(gpu, share)).chunk_s(*shape, None)
            for share in (0.5, 0.65, 0.8, 1.0)
        ]
        assert times == sorted(times, reverse=True)


def test_too_little_shared_memory_for_a_tile_is_refused():
    with pytest.raises(ConfigError, match=r"step_time\.shared_memory_per_sm_kib  no tile .* got 8 .*has 228"):
        PrefillAttention(H100, "bf16", LLAMA, AttentionKernel("flash", 8 * 1024))


@settings(deadline=None)
@given(name=st.sampled_from(sorted(GPUS)), new=st.integers(1, 9000), cached=st.integers(0, 60_000))
def test_the_standard_kernel_is_never_faster_than_flash(name, new, cached):
    gpu = GPUS[name]
    flash, standard = (
        PrefillAttention(gpu, "bf16", LLAMA, kernel) for kernel in (AttentionKernel(), STANDARD)
    )
    assert standard.chunk_s(new, cached, None) >= flash.chunk_s(new, cached, None) * (1 - 1e-12)
    assert standard.base_s(new) > flash.base_s(new)
    flash, standard = (
        DecodeAttention(gpu, "bf16", LLAMA, kernel) for kernel in (AttentionKernel(), STANDARD)
    )
    assert standard.per_context_token_s > flash.per_context_token_s


def test_the_standard_kernel_moves_its_scores():
    law = PrefillAttention(H100, "bf16", LLAMA, STANDARD)
    moved = 32 * (4 * 8192**2 + 4 * 8192 * 128) * 2
    seconds = moved / (3.35e12 * H100.efficiency.gemm["bf16"].memory)
    assert law.chunk_s(8192, 0, None) == pytest.approx(seconds)
    decode = DecodeAttention(H100, "bf16", LLAMA, STANDARD)
    extra = decode.per_context_token_s - DecodeAttention(H100, "bf16", LLAMA).per_context_token_s
    assert extra == pytest.approx(32 * 4 * 2 / (3.35e12 * H100.efficiency.gemm["bf16"].memory))


# ---- kernels of mixed steps, and of attention sinks ------------------------------------------------


def test_flash_attention_2_computes_a_tile_for_each_decode_beside_a_chunk():
    """64 query rows for every head, at the rate of prompts; FlashAttention 3 packs the heads of a KV head."""
    a100 = GPUS["a100-80gb-sxm"]
    law = DecodeAttention(a100, "bf16", LLAMA)
    rate = a100.peak_flops_per_s["bf16"] * a100.efficiency.prefill_attention["bf16"].compute
    assert law.mixed_per_context_token_s == pytest.approx(64 * 4 * 32 * 128 / rate)
    assert law.mixed_per_context_token_s > 2 * law.per_context_token_s
    for name in ("h100-sxm", "h200-sxm", "b200", "mi300x"):
        hopper = DecodeAttention(GPUS[name], "bf16", LLAMA)
        assert hopper.mixed_per_context_token_s == hopper.per_context_token_s
    standard = DecodeAttention(a100, "bf16", LLAMA, STANDARD)
    assert standard.mixed_per_context_token_s == standard.per_context_token_s


@pytest.mark.parametrize("name", sorted(GPUS))
@pytest.mark.parametrize("sinks", [False, True])
def test_a_decode_beside_a_chunk_is_never_faster_than_alone(name, sinks):
    law = DecodeAttention(GPUS[name], "bf16", LLAMA._replace(sinks=sinks))
    assert law.mixed_per_context_token_s >= law.per_context_token_s


def test_sinks_take_a_slower_kernel_where_flash_attention_3_does_not_run():
    """233 operations per SM and clock: 61 TFLOP/s on an H100, on which vLLM pull request 20690 timed it."""
    sinks = LLAMA._replace(sinks=True)

    def seconds(name, shape):
        return PrefillAttention(GPUS[name], "bf16", shape).chunk_s(2048, 16_000, None)

    assert seconds("h100-sxm", sinks) == seconds("h100-sxm", LLAMA)
    pairs = causal_pairs(2048, 16_000, None)
    rate = 233 * 108 * 1.41e9
    assert seconds("a100-80gb-sxm", sinks) == pytest.approx(pairs * 4 * 32 * 128 / rate, rel=0.04)
    assert seconds("a100-80gb-sxm", sinks) > 4 * seconds("a100-80gb-sxm", LLAMA)
