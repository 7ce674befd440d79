"""Where a GPU's memory goes, and how many KV blocks are left."""

from __future__ import annotations

from servesim.config.profiles import GpuProfile, ModelProfile
from servesim.config.scenario import EngineConfig
from servesim.cost.budget import MemoryBudget, is_sound, unchecked_budget
from servesim.cost.remedies import does_not_fit
from servesim.errors import MemoryDoesNotFitError

__all__ = ["MemoryBudget", "memory_budget"]


def memory_budget(
    model: ModelProfile, gpu: GpuProfile, engine: EngineConfig, draft: ModelProfile | None = None
) -> MemoryBudget:
    """The memory of one GPU under ``engine``, which must be resolved (config.defaults.resolve_engine).

    ``num_gpu_blocks_override`` replaces the block count whatever the memory, ``kv_cache_memory_bytes`` the KV
    bytes whatever the utilisation; the first wins.
    ``draft`` is the profile of the draft model, where the engine speculates with one.
    Raises MemoryDoesNotFitError with the sizes and the settings that would fit.
    """
    budget = unchecked_budget(model, gpu, engine, draft)
    if not is_sound(budget, engine):
        raise MemoryDoesNotFitError(does_not_fit(model, gpu, engine, budget, draft))
    return budget
