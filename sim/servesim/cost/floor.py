"""The least time physics allows a step: what no law of step time may undercut."""

from __future__ import annotations

from servesim.config.kv_formats import KV_FORMATS
from servesim.config.profiles import GpuProfile, ModelProfile
from servesim.config.scenario import EngineConfig, OperatorStepTime
from servesim.config.weight_formats import PEAK_OF_PRODUCT, WEIGHT_FORMATS
from servesim.cost.step_time import StepShape

__all__ = ["floor_s"]

_BYTES = 2.0  # activations and unquantised weights


def floor_s(model: ModelProfile, gpu: GpuProfile, engine: EngineConfig, shape: StepShape) -> float:
    """Seconds below which one GPU cannot finish ``shape`` at its nominal peaks.

    The longest of: every weight that is needed and every cached key and value read once from HBM; every
    operation at the peak of its type; every sum between GPUs sent once over the link.  Pipeline stages hold
    the model in turn, so that they change nothing; expert parallelism can at best share the experts' work
    evenly.  Counted from the model's parameters, not from the laws of cost.ops, so that one checks the other.
    """
    memory_s = _bytes_moved(model, engine, shape) / gpu.hbm_bandwidth_bytes_per_s
    link_s = 0.0
    degree = engine.tensor_parallel_size
    if degree > 1:
        sums = 2 * model.num_layers * shape.num_tokens * model.hidden_size * _BYTES
        link_s = sums / gpu.peer_bandwidth_bytes_per_s(degree)
    return max(memory_s, _compute_s(model, gpu, engine, shape), link_s)


def _bytes_moved(model: ModelProfile, engine: EngineConfig, shape: StepShape) -> float:
    degree, linear_bytes = engine.tensor_parallel_size, WEIGHT_FORMATS[engine.quantization].bytes_per_weight
    vocabulary = model.vocab_size * model.hidden_size / degree * _BYTES
    weights = model.weight_bytes(linear_bytes, _BYTES, degree)
    weights -= _BYTES * model.num_learned_positions * model.hidden_size  # a few rows are read, not the table
    if not model.tie_word_embeddings:
        weights -= vocabulary  # of the embedding too
    if not shape.num_sampled:
        weights -= vocabulary
    moe = model.moe
    if moe is not None:
        expert_bytes = moe.routed_weight_bits / 8 if moe.routed_weight_bits else linear_bytes
        if _routes_evenly(engine):
            untouched = (1 - moe.experts_per_token / moe.num_experts) ** shape.num_tokens
        else:  # all tokens may choose the same ones
            untouched = 1 - moe.experts_per_token / moe.num_experts
        weights -= untouched * model.layer_totals.routed_experts / degree * expert_bytes
    kv_bytes = model.kv_bytes_per_token_and_layer(
        KV_FORMATS[engine.kv_cache_dtype].bytes_per_element(model.head_dim)
    )
    kv_bytes /= min(degree, model.num_kv_heads)
    windows = tuple(dict.fromkeys(model.windows))
    read_tokens = 0
    for index, window in enumerate(windows):
        tokens = shape.decode_context_tokens[index]
        tokens += sum(cached if window is None else min(cached, window - 1) for _, cached in shape.chunks)
        read_tokens += tokens * model.windows.count(window)
    return weights + read_tokens * kv_bytes


def _routes_evenly(engine: EngineConfig) -> bool:
    law = engine.step_time
    return not isinstance(law, OperatorStepTime) or law.expert_popularity_skew == 0


def _compute_s(model: ModelProfile, gpu: GpuProfile, engine: EngineConfig, shape: StepShape) -> float:
    peak, totals, tokens = gpu.peak_flops_per_s, model.layer_totals, shape.num_tokens
    plain_flops_per_s = peak["bf16"]
    product = WEIGHT_FORMATS[engine.quantization].product
    linear_flops_per_s = peak.get(PEAK_OF_PRODUCT[product], plain_flops_per_s)
    linear = 2.0 * tokens * (totals.attention + totals.dense_mlp + totals.shared_experts)
    plain = 2.0 * tokens * totals.router + 2.0 * shape.num_sampled * model.vocab_size * model.hidden_size
    moe = model.moe
    if moe is not None:
        routed = 2.0 * tokens * totals.routed_experts * moe.experts_per_token / moe.num_experts
        if moe.routed_weight_bits:
            plain += routed
        else:
            linear += routed
    plain += _attention_flops(model, shape)
    return (linear / linear_flops_per_s + plain / plain_flops_per_s) / engine.tensor_parallel_size


def _attention_flops(model: ModelProfile, shape: StepShape) -> float:
    """Operations of attention on all GPUs: two products of every query with every key it may see."""
    heads, mla = model.num_attention_heads, model.mla
    if mla is None:
        decode = prefill = 4.0 * heads * model.head_dim
    else:
        decode = 2.0 * heads * (2 * mla.kv_lora_rank + mla.qk_rope_head_dim)
        prefill = 2.0 * heads * (mla.qk_nope_head_dim + mla.qk_rope_head_dim + mla.v_head_dim)
    flops = 0.0
    for index, window in enumerate(dict.fromkeys(model.windows)):
        layers = model.windows.count(window)
        pairs = sum(_pairs(new, cached, window) for new, cached in shape.chunks)
        flops += layers * (decode * shape.decode_context_tokens[index] + prefill * pairs)
    return flops


def _pairs(num_new: int, num_cached: int, window: int | None) -> int:
    """Query-key pairs under a causal mask, counted exactly."""
    if window is None:
        return num_new * num_cached + num_new * (num_new + 1) // 2
    growing = max(0, min(num_new, window - num_cached))  # queries that still see everything before them
    return growing * num_cached + growing * (growing + 1) // 2 + (num_new - growing) * window
