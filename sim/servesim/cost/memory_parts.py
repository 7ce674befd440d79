"""What a GPU's memory holds besides the KV cache."""

from __future__ import annotations

import math
from dataclasses import dataclass

from servesim.config.profiles import GpuProfile, ModelProfile
from servesim.config.scenario import EngineConfig
from servesim.cost.cuda_graphs import captured_sizes

__all__ = ["MemoryParts", "memory_parts"]

_GIB = 2**30
_MIB = 2**20
_ACTIVATION_BYTES = 2

_SAMPLER_BYTES_PER_LOGIT = 28
"""Peak of top-k/top-p sampling per row and vocabulary entry, fitted (see memory_parts)."""
_NON_TORCH_BYTES = int(0.285 * _GIB)
"""Growth outside PyTorch's allocator while vLLM profiles, fitted (see memory_parts)."""
_NCCL_BYTES = 367 * _MIB
"""Communication buffers with several GPUs: 342 to 392 MiB in aiconfigurator's system files."""
_CUDA_GRAPH_BYTES_PER_LAYER = int(0.2 * _MIB)
"""Of one captured graph: vllm-project/vllm PR 23184 logs 6 to 8 MiB each, taken to be of 32 layers."""
_CUDA_GRAPH_MODES = 2  # FULL_AND_PIECEWISE captures every size twice


@dataclass(frozen=True, slots=True)
class MemoryParts:
    """One GPU's memory, vLLM's share of it, and what is taken from that before the KV cache."""

    total_bytes: int
    requested_bytes: int
    weights_bytes: int
    activation_peak_bytes: int
    non_torch_bytes: int
    cuda_graphs_bytes: int

    @property
    def used_bytes(self) -> int:
        """All parts together."""
        return self.weights_bytes + self.activation_peak_bytes + self.non_torch_bytes + self.cuda_graphs_bytes


def memory_parts(model: ModelProfile, gpu: GpuProfile, engine: EngineConfig) -> MemoryParts:
    """Everything that is not KV cache.

    Two numbers are fitted to recorded vLLM start-ups (model, GPU, max_num_seqs / max_num_batched_tokens,
    utilisation 0.9, no CUDA graphs subtracted by these versions): 28 bytes per logit of the sampler and
    0.285 GiB outside PyTorch.  KV bytes against the record: 0.15.1 Llama-2-7B fp16, H100, 128 / 2048: 0.0 %;
    0.15.1 Qwen2.5-7B, H100, 128 / 2048: +0.8 %; 0.19.0 Llama-3.1-8B, RTX 4090, 256 / 2048: -0.1 % (the
    points the numbers come from, so no proof).  0.6, Llama-3-8B, H100, 256 / 8192: +3.5 %, because that
    version kept 1.3 GiB for activations and counted 1.8 GiB outside PyTorch (3.6 GiB with two GPUs); it is
    not modelled.  Versions before 0.6 profiled differently.  The 512 or 1024 sampler rows of newer defaults
    extrapolate the fit; CUDA-graph and communication memory are estimates, not fitted.
    """
    if engine.max_num_seqs is None or engine.max_num_batched_tokens is None:
        raise ValueError("the engine is not resolved: call config.defaults.resolve_engine first")
    degree = engine.tensor_parallel_size
    linear_bytes = 1.0 if engine.quantization == "fp8" else 2.0
    weights = model.weight_bytes(linear_bytes, 2.0, degree)
    if model.mla is not None and engine.quantization == "fp8":
        # Beside the quantised expansion of the latent, vLLM keeps an unquantised copy for decoding.
        expansion = model.mla.qk_nope_head_dim + model.mla.v_head_dim
        copied = model.num_layers * model.mla.kv_lora_rank * model.num_attention_heads * expansion
        weights += 2.0 * copied / degree
    graphs = len(captured_sizes(gpu, engine)) * _CUDA_GRAPH_MODES
    return MemoryParts(
        total_bytes=gpu.cuda_memory_bytes,
        requested_bytes=math.ceil(gpu.cuda_memory_bytes * engine.gpu_memory_utilization),
        weights_bytes=math.ceil(weights),
        activation_peak_bytes=_activation_peak_bytes(
            model,
            degree,
            engine.max_num_batched_tokens,
            min(engine.max_num_seqs, engine.max_num_batched_tokens),
        ),
        non_torch_bytes=_NON_TORCH_BYTES + (_NCCL_BYTES if degree > 1 else 0),
        cuda_graphs_bytes=graphs * model.num_layers * _CUDA_GRAPH_BYTES_PER_LAYER,
    )


def _activation_peak_bytes(model: ModelProfile, degree: int, num_tokens: int, num_rows: int) -> int:
    """Largest of a layer's phases on ``num_tokens`` tokens, and of sampling ``num_rows`` rows afterwards.

    In a layer the hidden state and the residual stay; MLP: gate, up and their product; experts: the same for
    every routed copy of a token, and its output; attention: query, key, value and output.  The sampler works
    on the whole vocabulary on every GPU while the last hidden states are kept.
    """
    hidden, up_matrices = model.hidden_size, 2 if model.gated_mlp else 1
    phases = []
    if model.num_dense_layers:
        phases.append((up_matrices + 1) * model.intermediate_size // degree)
    if model.moe is not None:
        width = model.moe.intermediate_size // degree
        shared = (up_matrices + 1) * width * model.moe.num_shared_experts
        routed = max(up_matrices * width, hidden) + width
        phases.append(shared + hidden + model.moe.experts_per_token * routed)
    heads = model.num_attention_heads // degree
    if model.mla is None:
        kv_heads = max(1, model.num_kv_heads // degree)
        phases.append((2 * heads + 2 * kv_heads) * model.head_dim)
    else:
        query = model.mla.qk_nope_head_dim + model.mla.qk_rope_head_dim
        phases.append(heads * (2 * query + 2 * model.mla.v_head_dim) + model.head_dim)
    layer = num_tokens * (2 * hidden + max(phases)) * _ACTIVATION_BYTES
    sampler = num_tokens * hidden * _ACTIVATION_BYTES + num_rows * model.vocab_size * _SAMPLER_BYTES_PER_LOGIT
    return max(layer, sampler)
