"""From an engine's settings to a scheduler that swaps, or whose requests have several sequences."""

from __future__ import annotations

from servesim.config.sampling import SamplingConfig
from servesim.config.scenario import EngineConfig
from servesim.cost.budget import MemoryBudget
from servesim.engine.beams import BeamSearch
from servesim.engine.branching import BranchingScheduler
from servesim.engine.scheduler import Scheduler, SchedulerLimits
from servesim.engine.swapping import SwappingScheduler
from servesim.engine.versions import Rules
from servesim.errors import ConfigError, MemoryDoesNotFitError, Problem
from servesim.kv.forked import ForkedKVCache
from servesim.kv.host import SwappableKVCache, SwapSpace

__all__ = ["build_swapping"]

_GIB = 2**30


def build_swapping(
    engine: EngineConfig,
    memory: MemoryBudget,
    limits: SchedulerLimits,
    rules: Rules,
    windows: tuple[int | None, ...],
    *,
    sampling: SamplingConfig | None,
    beams: BeamSearch | None,
    one_by_one: bool,
    track_ids: bool = False,
) -> Scheduler:
    """A scheduler over empty KV and an empty swap space, which has no room unless preemption_mode is swap.

    ``track_ids`` as for build_scheduler; forked sequences always know their blocks.
    """
    if memory.kv_layout.group_windows != (None,):
        raise ConfigError(
            Problem(
                "a model with attention windows cannot swap, nor decode several sequences of a request",
                path="workload.sampling" if sampling else "engine.preemption_mode",
                next_step="remove it, or choose a model with full attention in every layer",
            )
        )
    block_bytes = memory.kv_layout.block_bytes
    sizes_gib = (engine.swap_space_gib, engine.swap.disk_gib) if engine.preemption_mode == "swap" else (0, 0)
    space = SwapSpace(*(int(gib * _GIB) // block_bytes for gib in sizes_gib))
    if sampling is not None:
        _check_room(engine, memory, sampling)
        forked = ForkedKVCache(memory.num_gpu_blocks, engine.block_size, sampling.n)
        return BranchingScheduler(limits, rules, forked, windows, space=space, beams=beams)
    kv = SwappableKVCache(
        memory.num_gpu_blocks,
        engine.block_size,
        enable_prefix_caching=False,
        blank_blocks_first=rules.blank_blocks_first,
        track_ids=track_ids,
    )
    return SwappingScheduler(limits, rules, kv, windows, space=space, one_by_one=one_by_one)


def _check_room(engine: EngineConfig, memory: MemoryBudget, sampling: SamplingConfig) -> None:
    """Raise MemoryDoesNotFitError when the longest request could never be finished, however alone it runs."""
    assert engine.max_model_len is not None
    blocks = memory.num_gpu_blocks - 1
    needed = sampling.n * memory.kv_layout.blocks_per_request(engine.max_model_len)
    if needed > blocks:
        longest = blocks // sampling.n * engine.block_size
        raise MemoryDoesNotFitError(
            Problem(
                f"{sampling.n} sequences of this length need {needed:,} blocks and the pool has {blocks:,}",
                path="engine.max_model_len",
                got=str(engine.max_model_len),
                next_step=f"set engine.max_model_len to at most {longest}, or lower workload.sampling.n",
            )
        )
