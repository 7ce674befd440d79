"""How many KV blocks a GPU's memory leaves, whether or not they can serve a request."""

from __future__ import annotations

from dataclasses import dataclass

from servesim.config.profiles import GpuProfile, ModelProfile
from servesim.config.scenario import EngineConfig
from servesim.cost.drafter import drafter_memory
from servesim.cost.kv_groups import KvLayout, kv_layout
from servesim.cost.memory_parts import memory_parts

__all__ = ["MemoryBudget", "fits", "is_sound", "unchecked_budget"]


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """Memory of one GPU of the engine, in bytes, and the KV cache it leaves.

    ``total_bytes`` is what CUDA reports, ``requested_bytes`` vLLM's share of it.  ``overridden`` says which
    setting gave the KV cache instead of the budget ("" when none did).
    """

    total_bytes: int
    requested_bytes: int
    weights_bytes: int
    activation_peak_bytes: int
    non_torch_bytes: int
    cuda_graphs_bytes: int
    kv_cache_bytes: int
    num_gpu_blocks: int
    """Blocks of the pool, block 0 (never handed out) included."""
    block_bytes: int
    """Of one of them, with the pages of a drafter."""
    kv_cache_tokens: int
    """Token slots of the pool, as vLLM prints them: blocks per group times block_size."""
    max_concurrency: float
    """Requests of max_model_len that fit at once, as vLLM prints it."""
    kv_layout: KvLayout
    contiguous_tokens: int
    """Token slots of the same KV bytes without pages: all layers keep every token."""
    overridden: str = ""
    max_model_len: int = 0
    """Most tokens of the requests that max_concurrency counts."""

    @property
    def used_bytes(self) -> int:
        """Everything that is not KV cache."""
        parts = (self.weights_bytes, self.activation_peak_bytes, self.non_torch_bytes, self.cuda_graphs_bytes)
        return sum(parts)

    @property
    def spare_bytes(self) -> int:
        """What is left of the GPU's memory, utilisation aside; negative when the model alone is too large."""
        return self.total_bytes - self.used_bytes


def is_sound(budget: MemoryBudget, engine: EngineConfig) -> bool:
    """Whether memory holds the model, and the pool one request of max_model_len beside the null block."""
    assert engine.max_model_len is not None
    if budget.overridden == "kv_cache_memory_bytes" and budget.kv_cache_bytes > budget.spare_bytes:
        return False
    return budget.kv_layout.blocks_per_request(engine.max_model_len) <= budget.num_gpu_blocks - 1


def unchecked_budget(
    model: ModelProfile, gpu: GpuProfile, engine: EngineConfig, draft: ModelProfile | None = None
) -> MemoryBudget:
    """The budget whether or not it can serve a request; a shortage shows as fewer than two blocks.

    With pipeline stages it is that of a GPU of the fullest one: all stages have as many blocks as it.
    """
    if engine.max_model_len is None:
        raise ValueError("the engine is not resolved: call config.defaults.resolve_engine first")
    stage = model.pipeline_stage(engine.pipeline_parallel_size)
    parts, layout = memory_parts(stage, gpu, engine), kv_layout(stage, engine)
    drafter = drafter_memory(model, engine, draft)
    block_bytes = layout.block_bytes + layout.block_size * drafter.token_bytes
    overridden = ""
    kv_cache_bytes = max(0, parts.requested_bytes - parts.used_bytes - drafter.weights_bytes)
    if engine.num_gpu_blocks_override is not None:
        overridden = "num_gpu_blocks_override"
        kv_cache_bytes = engine.num_gpu_blocks_override * block_bytes
    elif engine.kv_cache_memory_bytes is not None:
        overridden = "kv_cache_memory_bytes"
        kv_cache_bytes = engine.kv_cache_memory_bytes
    num_blocks = kv_cache_bytes // block_bytes
    return MemoryBudget(
        total_bytes=parts.total_bytes,
        requested_bytes=parts.requested_bytes,
        weights_bytes=parts.weights_bytes + drafter.weights_bytes,
        activation_peak_bytes=parts.activation_peak_bytes,
        non_torch_bytes=parts.non_torch_bytes,
        cuda_graphs_bytes=parts.cuda_graphs_bytes,
        kv_cache_bytes=kv_cache_bytes,
        num_gpu_blocks=num_blocks,
        block_bytes=block_bytes,
        kv_cache_tokens=num_blocks // len(layout.group_windows) * layout.block_size,
        max_concurrency=num_blocks / layout.blocks_per_request(engine.max_model_len),
        kv_layout=layout,
        contiguous_tokens=kv_cache_bytes // layout.token_bytes,
        overridden=overridden,
        max_model_len=engine.max_model_len,
    )


def fits(
    model: ModelProfile, gpu: GpuProfile, engine: EngineConfig, draft: ModelProfile | None = None
) -> bool:
    """Whether ``engine`` could start."""
    return is_sound(unchecked_budget(model, gpu, engine, draft), engine)
