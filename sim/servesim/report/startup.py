"""What vLLM's log says about memory when an engine starts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from servesim.units import GIB

if TYPE_CHECKING:
    from servesim.cost.memory import MemoryBudget

__all__ = ["startup_lines"]


def startup_lines(memory: MemoryBudget) -> tuple[str, ...]:
    """The three lines by which one knows a pool, in vLLM's words and rounding.

    Source: vLLM 0.26, gpu_worker and kv_cache_utils.
    """
    return (
        f"Available KV cache memory: {memory.kv_cache_bytes / GIB:.2f} GiB",
        f"GPU KV cache size: {memory.kv_cache_tokens:,} tokens",
        f"Maximum concurrency for {memory.max_model_len:,} tokens per request: {memory.max_concurrency:.2f}x",
    )
