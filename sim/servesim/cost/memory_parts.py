"""What a GPU's memory holds besides the KV cache."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from servesim.config.profiles import GpuProfile, ModelProfile
from servesim.config.scenario import EngineConfig, EngineVersion
from servesim.config.weight_formats import WEIGHT_FORMATS
from servesim.cost.cuda_graphs import captured_sizes

__all__ = ["MemoryParts", "memory_parts"]

_GIB = 2**30
_MIB = 2**20
_ACTIVATION_BYTES = 2

_NON_TORCH_BYTES = int(0.285 * _GIB)
"""Growth outside PyTorch's allocator while vLLM profiles, fitted (see memory_parts)."""
_NCCL_BYTES = 367 * _MIB
"""Communication buffers with several GPUs: 342 to 392 MiB in aiconfigurator's system files."""
_CUDA_GRAPH_BYTES_PER_LAYER = int(0.2 * _MIB)
"""Of one captured graph: vllm-project/vllm PR 23184 logs 6 to 8 MiB each, taken to be of 32 layers."""
_CUDA_GRAPHS_PER_SIZE = {"full_and_piecewise": 2}  # the other modes capture one


class _Profiling(NamedTuple):
    """How a version of vLLM measures at start-up."""

    sampler_bytes_per_logit: int
    """Peak of top-k/top-p sampling per row and vocabulary entry, fitted (see memory_parts)."""
    subtracts_cuda_graphs: bool
    """CUDA graphs are estimated and kept free; before, they grew into what the utilisation leaves."""


_V0 = _Profiling(38, False)
_V1 = _Profiling(28, False)
_V1_WITH_GRAPHS = _Profiling(28, True)  # by default since 0.20.2 (its own text says 0.21)
_PROFILING: dict[EngineVersion, _Profiling] = {
    "0.6": _V0,
    "0.11": _V1,
    "0.19": _V1,
    "0.22": _V1_WITH_GRAPHS,
    "0.26": _V1_WITH_GRAPHS,
    "0.32": _V1_WITH_GRAPHS,
    "0.33": _V1_WITH_GRAPHS,
}


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
    """Everything that is not KV cache, for the layers of ``model``: with pipeline stages those of one stage.

    Three numbers are fitted to start-ups that other people recorded: 28 bytes per logit (V1) and 0.285 GiB
    outside PyTorch to the block counts of Llama-2-7B (0.15.1) and Llama-3.1-8B (0.19.0), 38 bytes per logit
    (V0) to activation peaks of 1.19 and 1.26 GiB of Llama-3-8B (0.6).  All read-outs and their residuals:
    reports/validation/runs/vllm-startups.  Versions before 0.6 profiled differently and are not modelled.
    More sampler rows than 256 extrapolate the fit; CUDA-graph and communication memory are estimates, not
    fitted.
    """
    if engine.max_num_seqs is None or engine.max_num_batched_tokens is None:
        raise ValueError("the engine is not resolved: call config.defaults.resolve_engine first")
    degree = engine.tensor_parallel_size
    linear_bytes = WEIGHT_FORMATS[engine.quantization].bytes_per_weight
    weights = model.weight_bytes(linear_bytes, 2.0, degree)
    if model.mla is not None and engine.quantization != "none":
        # Beside the quantised expansion of the latent, vLLM keeps an unquantised copy for decoding.
        expansion = model.mla.qk_nope_head_dim + model.mla.v_head_dim
        copied = model.num_layers * model.mla.kv_lora_rank * model.num_attention_heads * expansion
        weights += 2.0 * copied / degree
    profiling = _PROFILING[engine.version]
    graphs = 0
    if profiling.subtracts_cuda_graphs:
        graphs = len(captured_sizes(gpu, engine)) * _CUDA_GRAPHS_PER_SIZE.get(engine.cudagraph_mode, 1)
    return MemoryParts(
        total_bytes=gpu.cuda_memory_bytes,
        requested_bytes=math.ceil(gpu.cuda_memory_bytes * engine.gpu_memory_utilization),
        weights_bytes=math.ceil(weights),
        activation_peak_bytes=_activation_peak_bytes(
            model,
            degree,
            engine.max_num_batched_tokens,
            min(engine.max_num_seqs, engine.max_num_batched_tokens),
            profiling.sampler_bytes_per_logit,
        ),
        non_torch_bytes=_NON_TORCH_BYTES + (_NCCL_BYTES if degree * engine.pipeline_parallel_size > 1 else 0),
        cuda_graphs_bytes=graphs * model.num_layers * _CUDA_GRAPH_BYTES_PER_LAYER,
    )


def _activation_peak_bytes(
    model: ModelProfile, degree: int, num_tokens: int, num_rows: int, bytes_per_logit: int
) -> int:
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
    sampler = num_tokens * hidden * _ACTIVATION_BYTES + num_rows * model.vocab_size * bytes_per_logit
    return max(layer, sampler)
