"""The memory budget: against recorded vLLM start-ups, page arithmetic, refusals whose remedies work."""

from __future__ import annotations

import re

import pytest

from servesim.config.defaults import resolve_engine
from servesim.config.profiles import load_gpu, load_model
from servesim.config.scenario import EngineConfig
from servesim.cost.kv_groups import kv_layout
from servesim.cost.memory import memory_budget
from servesim.errors import MemoryDoesNotFitError
from servesim.report.startup import startup_lines

GIB = 2**30


def budget_of(model, gpu, **engine):
    profile, device = load_model(model), load_gpu(gpu)
    return memory_budget(profile, device, resolve_engine(EngineConfig(**engine), profile, device))


# More recorded start-ups, with their residuals: tests/validation and reports/validation/runs/vllm-startups.
# 0.15.1: inference-sim/inference-sim f90a1e3 (from vLLM's logs); 0.19.0: casys-kaist/LLMServingSim (MIT).
@pytest.mark.parametrize(
    ("model", "gpu", "seqs", "blocks", "tolerance"),
    [
        ("llama-2-7b", "h100-sxm", 128, 7463, 0.003),
        ("qwen2.5-7b", "h100-sxm", 128, 65368, 0.01),
        ("llama-3.1-8b", "rtx-4090", 256, 2588, 0.003),
    ],
)
def test_recorded_block_counts(model, gpu, seqs, blocks, tolerance):
    budget = budget_of(
        model, gpu, version="0.19", max_num_seqs=seqs, max_num_batched_tokens=2048, max_model_len=2048
    )
    assert budget.num_gpu_blocks == pytest.approx(blocks, rel=tolerance)


def test_recorded_parts_of_vllm_0_6():
    """vllm-project/vllm PR 10511, whose figure outside PyTorch (1.79 GiB) later versions log as 0.1."""
    budget = budget_of(  # the same matrices as Llama-3-8B
        "llama-3.1-8b", "h100-sxm", version="0.6", max_model_len=8192, max_num_batched_tokens=8192
    )
    assert budget.total_bytes / GIB == pytest.approx(79.22, abs=0.005)
    assert budget.requested_bytes / GIB == pytest.approx(71.29, abs=0.01)
    assert budget.weights_bytes / GIB == pytest.approx(14.96, abs=0.005)
    assert budget.activation_peak_bytes / GIB == pytest.approx(1.26, rel=0.05)
    assert budget.kv_cache_bytes / GIB == pytest.approx(53.29, rel=0.03)
    half = budget_of("llama-3.1-8b", "h100-sxm", tensor_parallel_size=2, max_model_len=8192)
    assert half.weights_bytes / GIB == pytest.approx(7.48, abs=0.005)


def test_versions_profile_differently():
    """V0 sampled with more memory; CUDA graphs are kept free since 0.20.2 only."""
    same = {
        "gpu_memory_utilization": 0.9,
        "max_model_len": 8192,
        "max_num_seqs": 256,
        "max_num_batched_tokens": 2048,
        "async_scheduling": False,
    }
    v0, v1, graphs = (
        budget_of("llama-3.1-8b", "h100-sxm", version=version, **same) for version in ("0.6", "0.19", "0.22")
    )
    assert v0.activation_peak_bytes > v1.activation_peak_bytes == graphs.activation_peak_bytes
    assert v0.cuda_graphs_bytes == v1.cuda_graphs_bytes == 0 < graphs.cuda_graphs_bytes
    assert v1.kv_cache_bytes - graphs.kv_cache_bytes == graphs.cuda_graphs_bytes


def test_the_startup_lines_are_vllms():
    budget = budget_of("gpt-oss-20b", "h100-sxm", version="0.19", num_gpu_blocks_override=10_000)
    assert startup_lines(budget) == (
        "Available KV cache memory: 3.66 GiB",
        "GPU KV cache size: 80,000 tokens",  # two groups of layers draw from one pool
        "Maximum concurrency for 131,072 tokens per request: 1.08x",
    )


def test_the_parts_add_up_to_what_was_requested():
    budget = budget_of("llama-3.1-8b", "h100-sxm", max_model_len=16384)
    assert budget.used_bytes + budget.kv_cache_bytes == budget.requested_bytes
    assert budget.num_gpu_blocks == budget.kv_cache_bytes // (16 * 131_072)
    assert budget.kv_cache_tokens == 16 * budget.num_gpu_blocks
    assert budget.max_concurrency == budget.num_gpu_blocks / 1024
    assert 0 <= budget.contiguous_tokens - budget.kv_cache_tokens < 16
    assert budget.cuda_graphs_bytes > 0
    assert budget_of("llama-3.1-8b", "h100-sxm", enforce_eager=True).cuda_graphs_bytes == 0


def test_fp8_halves_the_cache_and_the_linear_weights():
    plain = budget_of("llama-3.1-8b", "h100-sxm", max_model_len=16384)
    fp8 = budget_of("llama-3.1-8b", "h100-sxm", max_model_len=16384, quantization="fp8", kv_cache_dtype="fp8")
    assert fp8.kv_layout.page_bytes * 2 == plain.kv_layout.page_bytes
    linear = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    assert plain.weights_bytes - fp8.weights_bytes == linear


# Linear weights of Llama-3.1-8B come in groups that every format's block size divides.
@pytest.mark.parametrize(
    ("quantization", "gpu", "scale_bytes", "group"),
    [
        ("fp8_block", "h100-sxm", 4, 128 * 128),
        ("int8", "a100-80gb-sxm", 0, 1),
        ("w4a16", "a100-80gb-sxm", 2, 128),
        ("mxfp4", "h100-sxm", 1, 32),
        ("nvfp4", "b200", 1, 16),
        ("nvfp4", "h100-sxm", 1, 16),  # expanded in the kernel: the memory is that of the format
    ],
)
def test_quantised_weights_and_their_scales_are_counted(quantization, gpu, scale_bytes, group):
    linear = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    rest = 2 * (2 * 128_256 * 4096 + 65 * 4096)
    value_bytes = 1 if quantization in ("fp8_block", "int8") else 0.5
    expected = linear * value_bytes + linear / group * scale_bytes + rest
    for degree in (1, 2):
        budget = budget_of(
            "llama-3.1-8b", gpu, max_model_len=8192, quantization=quantization, tensor_parallel_size=degree
        )
        split = expected if degree == 1 else (expected - 2 * 65 * 4096) / 2 + 2 * 65 * 4096
        assert budget.weights_bytes == pytest.approx(split, abs=1)


@pytest.mark.parametrize("quantization", ["none", "fp8", "w4a16"])
def test_published_mxfp4_experts_stay_as_they_are(quantization):
    """openai/gpt-oss-20b is published as 12.8 GiB, gpt-oss-120b as 60.8; the rest of it may be quantised."""
    for model, published in (("gpt-oss-20b", 12.8), ("gpt-oss-120b", 60.8)):
        weights = budget_of(model, "h200-sxm", quantization=quantization).weights_bytes / GIB
        if quantization == "none":
            assert weights == pytest.approx(published, abs=0.05)
        else:
            moe = load_model(model)
            attention = 2 * moe.layer_totals.attention / GIB
            assert published - attention < weights < published


def test_pipeline_stages_divide_weights_and_cache():
    one = budget_of("llama-3.1-70b", "h100-sxm", tensor_parallel_size=4, max_model_len=8192)
    two = budget_of(
        "llama-3.1-70b", "h100-sxm", tensor_parallel_size=4, pipeline_parallel_size=2, max_model_len=8192
    )
    table = 2 * 128_256 * 8192 / 4
    norm = 2 * 8192
    assert two.weights_bytes == (one.weights_bytes - 2 * table - norm) / 2 + table + norm
    assert two.kv_layout.block_bytes * 2 == one.kv_layout.block_bytes
    assert two.num_gpu_blocks > 2 * one.num_gpu_blocks
    # 131 GiB of weights fit on two GPUs of 80 GiB only when each holds half of them.
    with pytest.raises(MemoryDoesNotFitError):
        budget_of("llama-3.1-70b", "h100-sxm", max_model_len=8192)
    budget_of("llama-3.1-70b", "h100-sxm", pipeline_parallel_size=2, max_model_len=4096)
    budget_of("gemma-3-27b", "h100-sxm", pipeline_parallel_size=16)  # a stage of sliding layers only


@pytest.mark.parametrize(
    ("model", "size", "groups"),
    [
        ("llama-3.1-8b", 32, [None]),
        ("mistral-7b-v0.1", 32, [4096]),
        ("gpt-oss-20b", 12, [128, None]),
        ("gemma-3-27b", 10, [1024] * 6 + [None]),
        ("gemma-2-27b", 23, [4096, None]),
        ("deepseek-v3", 61, [None]),
    ],
)
def test_layers_are_grouped_by_kind(model, size, groups):
    profile = load_model(model)
    layout = kv_layout(profile, resolve_engine(EngineConfig(), profile, load_gpu("h200-sxm")))
    assert (layout.layers_per_group, list(layout.group_windows)) == (size, groups)


def test_pages_split_kv_heads_and_replicate_latents():
    h100 = load_gpu("h100-sxm")

    def page_bytes(model, degree):
        engine = resolve_engine(EngineConfig(tensor_parallel_size=degree), load_model(model), h100)
        return kv_layout(load_model(model), engine).page_bytes

    assert [page_bytes("llama-3.1-70b", d) for d in (1, 2, 8, 16)] == [16 * 4096 // d for d in (1, 2, 8, 8)]
    assert page_bytes("deepseek-v3", 8) == page_bytes("deepseek-v3", 1) == 16 * 576 * 2


def test_a_sliding_group_needs_its_window_and_what_is_in_flight():
    budget = budget_of("gpt-oss-20b", "h100-sxm", max_num_batched_tokens=2048)
    layout = budget.kv_layout
    assert layout.blocks_per_request(131_072) == 8192 + (-(-(127 + 2 * 2048) // 16) + 1)
    sync = budget_of("gpt-oss-20b", "h100-sxm", max_num_batched_tokens=2048, async_scheduling=False).kv_layout
    assert sync.blocks_per_request(131_072) == 8192 + (-(-(127 + 2048) // 16) + 1)
    assert budget.kv_cache_tokens == budget.num_gpu_blocks // 2 * 16


def test_overrides_replace_the_budget():
    blocks = budget_of("llama-3.1-8b", "h100-sxm", num_gpu_blocks_override=601, max_model_len=4096)
    assert (blocks.num_gpu_blocks, blocks.kv_cache_tokens) == (601, 9616)
    assert blocks.kv_cache_bytes == 601 * 16 * 131_072
    given = budget_of("llama-3.1-8b", "h100-sxm", kv_cache_memory_bytes=10 * GIB, max_model_len=4096)
    assert (given.kv_cache_bytes, given.num_gpu_blocks) == (10 * GIB, 5120)
    assert given.overridden == "kv_cache_memory_bytes"


def test_the_pool_must_hold_the_longest_request_beside_the_null_block():
    assert budget_of("llama-3.1-8b", "h100-sxm", num_gpu_blocks_override=257, max_model_len=4096)
    with pytest.raises(MemoryDoesNotFitError) as caught:
        budget_of("llama-3.1-8b", "h100-sxm", num_gpu_blocks_override=256, max_model_len=4096)
    message = str(caught.value)
    assert message.startswith("engine.max_model_len  one request of this length needs 0.50 GiB of KV cache")
    assert "got 4096" in message
    assert "set engine.max_model_len: 4080 or engine.num_gpu_blocks_override: 257" in message


REFUSED = [
    ("llama-3.1-70b", "h100-sxm", {}),
    ("llama-3.1-70b", "a100-80gb-sxm", {}),
    ("llama-3.1-8b", "l4", {}),
    ("llama-3.1-8b", "a10g", {"max_model_len": 65536}),
    ("gemma-3-27b", "h100-sxm", {}),
    ("gpt-oss-120b", "l40s", {}),
    ("qwen3-32b", "h100-sxm", {"gpu_memory_utilization": 0.8}),
    ("llama-3.1-8b", "h100-sxm", {"kv_cache_memory_bytes": 10**12, "max_model_len": 8192}),
    ("mistral-7b-v0.1", "h100-sxm", {"num_gpu_blocks_override": 200}),
]


@pytest.mark.parametrize(("model", "gpu", "engine"), REFUSED)
def test_a_refusal_names_sizes_and_settings_that_work(model, gpu, engine):
    with pytest.raises(MemoryDoesNotFitError) as caught:
        budget_of(model, gpu, **engine)
    message = str(caught.value)
    for part in ("weights", "activations", "CUDA graphs", "GiB", "gpu_memory_utilization"):
        assert part in message
    remedies = message.split("-> set ")[1].split(" or ")
    for remedy in remedies:
        changes = dict(re.findall(r"engine\.(\w+): (\S+)", remedy))
        assert changes
        assert budget_of(model, gpu, **{**engine, **changes}).num_gpu_blocks > 1


def test_a_refusal_counts_the_pages_of_a_drafter():
    """An EAGLE layer's beside the 32 of the model; the number is the smallest that fits."""
    eagle = {"method": "eagle", "num_speculative_tokens": 3, "acceptance": {"law": "iid", "rate": 0.7}}
    asked = {"speculative": eagle, "max_model_len": 8192}
    with pytest.raises(MemoryDoesNotFitError) as caught:
        budget_of("llama-3.1-8b", "h100-sxm", kv_cache_memory_bytes=GIB, **asked)
    size = int(re.search(r"engine\.kv_cache_memory_bytes: (\d+)", str(caught.value)).group(1))
    assert size == 513 * 16 * 131_072 * 33 // 32
    assert f"this length needs {size / GIB:.2f} GiB of KV cache" in str(caught.value)
    assert budget_of("llama-3.1-8b", "h100-sxm", kv_cache_memory_bytes=size, **asked).num_gpu_blocks == 513
    with pytest.raises(MemoryDoesNotFitError):
        budget_of("llama-3.1-8b", "h100-sxm", kv_cache_memory_bytes=size - 1, **asked)


def test_the_suggested_length_and_degree_are_the_best_ones():
    with pytest.raises(MemoryDoesNotFitError) as caught:
        budget_of("llama-3.1-8b", "l4")
    length = int(re.search(r"engine\.max_model_len: (\d+)", str(caught.value)).group(1))
    assert budget_of("llama-3.1-8b", "l4", max_model_len=length)
    with pytest.raises(MemoryDoesNotFitError):
        budget_of("llama-3.1-8b", "l4", max_model_len=length + 1)
    with pytest.raises(MemoryDoesNotFitError) as caught:
        budget_of("llama-3.1-70b", "h100-sxm")
    assert (
        "engine.tensor_parallel_size: 4 or engine.quantization: fp8 with engine.tensor_parallel_size: 2"
        in str(caught.value)
    )
    with pytest.raises(MemoryDoesNotFitError):
        budget_of("llama-3.1-70b", "h100-sxm", tensor_parallel_size=2)


def test_nothing_helps_a_model_that_is_far_too_large():
    with pytest.raises(MemoryDoesNotFitError) as caught:
        budget_of("llama-3.1-405b", "l4")
    assert str(caught.value).endswith("-> choose a GPU with more memory")
    assert "llama-3.1-405b does not fit on l4: weights 755.96 GiB" in str(caught.value)


def test_deepseek_v3_in_fp8_fits_eight_h200_and_not_eight_h100():
    fits = budget_of("deepseek-v3", "h200-sxm", tensor_parallel_size=8, quantization="fp8")
    assert fits.kv_cache_tokens > 163_840
    with pytest.raises(MemoryDoesNotFitError):
        budget_of("deepseek-v3", "h100-sxm", tensor_parallel_size=8, quantization="fp8")
