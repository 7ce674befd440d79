"""What to change when a model does not fit: only settings that were tried and do fit."""

from __future__ import annotations

import math

from servesim.config.defaults import tensor_parallel_problems
from servesim.config.profiles import GpuProfile, ModelProfile
from servesim.config.scenario import EngineConfig, OperatorStepTime
from servesim.cost.budget import MemoryBudget, fits
from servesim.errors import Problem

__all__ = ["does_not_fit"]

_DEGREES = (2, 4, 8, 16, 32)
_HIGHEST_UTILIZATION = 0.98


def does_not_fit(
    model: ModelProfile,
    gpu: GpuProfile,
    engine: EngineConfig,
    budget: MemoryBudget,
    draft: ModelProfile | None = None,
) -> Problem:
    """The message of a model that leaves no KV cache, or too small a one for a request of max_model_len."""
    degree = engine.tensor_parallel_size
    where = f"{degree} x {gpu.name}" if degree > 1 else gpu.name
    sizes = _sizes(budget, engine)
    remedies = _remedies(model, gpu, engine, budget, draft)
    next_step = f"set {' or '.join(remedies)}" if remedies else "choose a GPU with more memory"
    if budget.used_bytes >= budget.requested_bytes and not budget.overridden:
        return Problem(
            f"{model.name} does not fit on {where}: {sizes}",
            path="engine.tensor_parallel_size",
            got=str(degree),
            next_step=next_step,
        )
    if budget.overridden == "kv_cache_memory_bytes" and budget.kv_cache_bytes > budget.spare_bytes:
        return Problem(
            f"{model.name} and this KV cache do not fit on {where}: {sizes}",
            path="engine.kv_cache_memory_bytes",
            got=f"{_gib(budget.kv_cache_bytes)}, and {_gib(max(0, budget.spare_bytes))} are left",
            next_step=next_step,
        )
    needed = _needed_blocks(budget, engine) * budget.block_bytes
    return Problem(
        f"one request of this length needs {_gib(needed)} of KV cache on each GPU, "
        f"{_gib(budget.kv_cache_bytes)} are left on {where}: {sizes}",
        path="engine.max_model_len",
        got=str(engine.max_model_len),
        next_step=next_step,
    )


def _needed_blocks(budget: MemoryBudget, engine: EngineConfig) -> int:
    """Blocks of a request of max_model_len, and the one that is never handed out."""
    return budget.kv_layout.blocks_per_request(engine.max_model_len or 0) + 1


def _sizes(budget: MemoryBudget, engine: EngineConfig) -> str:
    parts = {
        "weights": budget.weights_bytes,
        "activations": budget.activation_peak_bytes,
        "CUDA graphs": budget.cuda_graphs_bytes,
        "other": budget.non_torch_bytes,
    }
    listed = " + ".join(f"{name} {_gib(size)}" for name, size in parts.items())
    limit = f"gpu_memory_utilization {engine.gpu_memory_utilization:g} allows {_gib(budget.requested_bytes)}"
    return f"{listed} = {_gib(budget.used_bytes)}, where {limit} of {_gib(budget.total_bytes)} per GPU"


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"


def _remedies(
    model: ModelProfile,
    gpu: GpuProfile,
    engine: EngineConfig,
    budget: MemoryBudget,
    draft: ModelProfile | None,
) -> list[str]:
    """Settings that each make ``engine`` fit, changed alone (fp8 weights also with more GPUs)."""
    remedies = []
    degree = _smallest_degree(model, gpu, engine, draft)
    if degree:
        remedies.append(f"engine.tensor_parallel_size: {degree}")
    fp8 = engine.model_copy(update={"quantization": "fp8"})
    if engine.quantization == "none" and "fp8" in gpu.efficiency.gemm:
        if fits(model, gpu, fp8, draft):
            remedies.append("engine.quantization: fp8")
        else:
            fp8_degree = _smallest_degree(model, gpu, fp8, draft)
            if fp8_degree and (degree is None or fp8_degree < degree):
                remedies.append(f"engine.quantization: fp8 with engine.tensor_parallel_size: {fp8_degree}")
    fp8_kv = engine.model_copy(update={"kv_cache_dtype": "fp8"})
    has_fp8_kv = "fp8" in gpu.efficiency.decode_attention
    if engine.kv_cache_dtype == "auto" and has_fp8_kv and fits(model, gpu, fp8_kv, draft):
        remedies.append("engine.kv_cache_dtype: fp8")
    length = budget.kv_layout.largest_request_tokens(budget.num_gpu_blocks - 1, engine.max_model_len or 0)
    if length and fits(model, gpu, engine.model_copy(update={"max_model_len": length}), draft):
        remedies.append(f"engine.max_model_len: {length}")
    return remedies + _memory_setting(model, gpu, engine, budget, draft)


def _smallest_degree(
    model: ModelProfile, gpu: GpuProfile, engine: EngineConfig, draft: ModelProfile | None
) -> int | None:
    """The smallest larger number of GPUs that fits and that the step-time law knows."""
    known = gpu.efficiency.all_reduce if isinstance(engine.step_time, OperatorStepTime) else _DEGREES
    for degree in _DEGREES:
        if degree <= engine.tensor_parallel_size or degree not in known:
            continue
        split = engine.model_copy(update={"tensor_parallel_size": degree})
        if not tensor_parallel_problems(model, degree) and fits(model, gpu, split, draft):
            return degree
    return None


def _memory_setting(
    model: ModelProfile,
    gpu: GpuProfile,
    engine: EngineConfig,
    budget: MemoryBudget,
    draft: ModelProfile | None,
) -> list[str]:
    """The KV setting to raise: the overriding one if there is one, else the utilisation."""
    needed_blocks = _needed_blocks(budget, engine)
    if budget.overridden == "num_gpu_blocks_override":
        return [f"engine.num_gpu_blocks_override: {needed_blocks}"]
    if budget.overridden == "kv_cache_memory_bytes":
        size = needed_blocks * budget.block_bytes
        enough = engine.model_copy(update={"kv_cache_memory_bytes": size})
        return [f"engine.kv_cache_memory_bytes: {size}"] if fits(model, gpu, enough, draft) else []
    first = math.floor(engine.gpu_memory_utilization * 100) + 1
    for percent in range(first, int(_HIGHEST_UTILIZATION * 100) + 1):
        if fits(model, gpu, engine.model_copy(update={"gpu_memory_utilization": percent / 100}), draft):
            return [f"engine.gpu_memory_utilization: {percent / 100:g}"]
    return []
