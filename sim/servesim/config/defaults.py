"""An engine's defaults: what vLLM's API server fills in, and what it refuses."""

from __future__ import annotations

import math
from typing import NamedTuple

from servesim.config.gpu_profile import GpuProfile
from servesim.config.model_profile import ModelProfile
from servesim.config.scenario import EngineConfig
from servesim.errors import ConfigError, Problem

__all__ = ["resolve_engine", "tensor_parallel_problems", "with_whole_tables"]

_GIB = 2**30


class _Limits(NamedTuple):
    max_num_batched_tokens: int
    max_num_seqs: int


def resolve_engine(engine: EngineConfig, model: ModelProfile, gpu: GpuProfile) -> EngineConfig:
    """``engine`` with every empty value filled as vLLM's API server fills it for this model and GPU.

    Raises ConfigError with everything that vLLM would refuse at start-up.
    Source: vLLM 0.26 and 0.33, engine arguments and scheduler configuration.
    """
    engine = _whole_prompts(_old_defaults(engine))
    if engine.preemption_mode == "swap":
        engine = with_whole_tables(engine)
    max_model_len = engine.max_model_len or model.max_position_embeddings
    engine = _with_budget(engine, max_model_len)
    limits = _default_limits(gpu, engine)
    max_num_seqs = engine.max_num_seqs or limits.max_num_seqs
    max_num_batched_tokens = engine.max_num_batched_tokens
    if max_num_batched_tokens is None:
        max_num_batched_tokens = limits.max_num_batched_tokens
        if not engine.enable_chunked_prefill:
            max_num_batched_tokens = max(max_num_batched_tokens, max_model_len)
        max_num_batched_tokens = min(max_num_batched_tokens, max_num_seqs * max_model_len)
    if engine.max_num_seqs is None:
        max_num_seqs = min(max_num_seqs, max_num_batched_tokens)
    speculative = engine.speculative
    unsaid = "async_scheduling" not in engine.model_fields_set
    if speculative is not None and unsaid and not speculative.async_by_default(engine.version):
        engine = engine.model_copy(update={"async_scheduling": False})
    resolved = engine.model_copy(
        update={
            "max_model_len": max_model_len,
            "max_num_seqs": max_num_seqs,
            "max_num_batched_tokens": max_num_batched_tokens,
        }
    )
    problems = [
        *_limit_problems(resolved, model, max_model_len, max_num_seqs, max_num_batched_tokens),
        *tensor_parallel_problems(model, engine.tensor_parallel_size),
        *_other_parallel_problems(engine, model),
        *_draft_problems(resolved, max_num_seqs, max_num_batched_tokens),
    ]
    if problems:
        raise ConfigError(problems)
    return resolved


def _with_budget(engine: EngineConfig, max_model_len: int) -> EngineConfig:
    """``engine`` with the budget of its KV eviction in tokens, and without prefix caching beside it."""
    eviction = engine.kv_eviction
    if eviction is None:
        return engine
    if eviction.budget_fraction is not None:
        tokens = max(math.ceil(eviction.budget_fraction * max_model_len), eviction.sink_tokens + 1)
        eviction = eviction.model_copy(update={"budget_tokens": tokens})
    return engine.model_copy(update={"kv_eviction": eviction, "enable_prefix_caching": False})


def with_whole_tables(engine: EngineConfig) -> EngineConfig:
    """``engine`` without what vLLM's V0 engine did not have beside swapping and forked sequences."""
    return engine.model_copy(update={"async_scheduling": False, "enable_prefix_caching": False})


def _old_defaults(engine: EngineConfig) -> EngineConfig:
    """``engine`` with the defaults of an older version in place of those of 0.22, where nothing is said.

    0.9 of the memory before 0.20; no async scheduling before 0.14 (source: vLLM's release notes and the
    command lines of recorded runs).
    """
    older: dict[str, object] = {}
    if engine.version in ("0.6", "0.11", "0.19"):
        older["gpu_memory_utilization"] = 0.9
    if engine.version in ("0.6", "0.11"):
        older["async_scheduling"] = False
    unsaid = {key: value for key, value in older.items() if key not in engine.model_fields_set}
    return engine.model_copy(update=unsaid) if unsaid else engine


def _whole_prompts(engine: EngineConfig) -> EngineConfig:
    """``engine`` as the schedulers before chunked prefill worked: whole prompts, one step at a time."""
    if engine.batching == "continuous":
        return engine
    return engine.model_copy(update={"enable_chunked_prefill": False, "async_scheduling": False})


def _default_limits(gpu: GpuProfile, engine: EngineConfig) -> _Limits:
    """vLLM's limits by the memory that CUDA reports; it treats every A100 as a small GPU."""
    if engine.version == "0.6":
        return _Limits(2048, 256)
    memory_gib = gpu.cuda_memory_bytes / _GIB
    if engine.version in ("0.32", "0.33") and memory_gib >= 160:
        return _Limits(16384, 1024)
    if memory_gib >= 70 and "a100" not in f"{gpu.name} {gpu.label}".lower():
        return _Limits(8192, 1024)
    return _Limits(2048, 256)


def _limit_problems(
    engine: EngineConfig,
    model: ModelProfile,
    max_model_len: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
) -> list[Problem]:
    problems = []
    if max_model_len > model.max_position_embeddings:
        problems.append(
            Problem(
                f"{model.name} was trained for {model.max_position_embeddings} positions",
                path="engine.max_model_len",
                got=str(max_model_len),
                next_step=f"set engine.max_model_len to at most {model.max_position_embeddings}",
            )
        )
    if max_num_batched_tokens < max_num_seqs:
        problems.append(
            Problem(
                "a step must have room for one token of every sequence",
                path="engine.max_num_batched_tokens",
                got=f"{max_num_batched_tokens} with max_num_seqs {max_num_seqs}",
                next_step=f"raise it to at least {max_num_seqs}, "
                f"or set engine.max_num_seqs: {max_num_batched_tokens}",
            )
        )
    if not engine.enable_chunked_prefill and max_num_batched_tokens < max_model_len:
        chunks = engine.batching == "continuous"
        problems.append(
            Problem(
                "without chunked prefill a step must have room for the longest prompt",
                path="engine.max_num_batched_tokens",
                got=f"{max_num_batched_tokens} with max_model_len {max_model_len}",
                next_step=f"raise it to at least {max_model_len}, lower engine.max_model_len, or set "
                + ("engine.enable_chunked_prefill: true" if chunks else "engine.batching: continuous"),
            )
        )
    return problems


def _draft_problems(engine: EngineConfig, max_num_seqs: int, max_num_batched_tokens: int) -> list[Problem]:
    """Room that drafting needs in a step: vLLM keeps the rows of a draft model free for every sequence."""
    if engine.speculative is None:
        return []
    rows = engine.speculative.draft_rows * max_num_seqs
    least = max(rows, engine.speculative.num_speculative_tokens) + 1
    if max_num_batched_tokens >= least:
        return []
    return [
        Problem(
            "a step has no room for a token beside what drafting takes",
            path="engine.max_num_batched_tokens",
            got=f"{max_num_batched_tokens} with max_num_seqs {max_num_seqs}",
            next_step=f"raise it to at least {least}, or lower engine.max_num_seqs",
        )
    ]


def tensor_parallel_problems(model: ModelProfile, degree: int) -> list[Problem]:
    """Why ``model`` cannot be split over ``degree`` GPUs; empty when it can."""
    reasons = _uneven(model, degree)
    if not reasons:
        return []
    possible = [str(d) for d in (1, 2, 4, 8, 16) if not _uneven(model, d)]
    return [
        Problem(
            f"{model.name} has {' and '.join(reasons)}, which this many GPUs cannot share evenly",
            path="engine.tensor_parallel_size",
            got=str(degree),
            next_step=f"choose one of {', '.join(possible)}",
        )
    ]


def _uneven(model: ModelProfile, degree: int) -> list[str]:
    """What ``degree`` GPUs cannot share evenly."""
    reasons = []
    if model.num_attention_heads % degree:
        reasons.append(f"{model.num_attention_heads} attention heads")
    if model.mla is None and model.num_kv_heads % degree and degree % model.num_kv_heads:
        reasons.append(f"{model.num_kv_heads} KV heads")
    widths = {model.intermediate_size} if model.num_dense_layers else set()
    if model.moe:
        widths.add(model.moe.intermediate_size)
    return reasons + [f"an MLP width of {width}" for width in sorted(widths) if width % degree]


def _other_parallel_problems(engine: EngineConfig, model: ModelProfile) -> list[Problem]:
    problems = []
    if engine.enable_expert_parallel and model.moe is None:
        problems.append(
            Problem(
                f"{model.name} has no experts to share out",
                path="engine.enable_expert_parallel",
                got="true",
                next_step="remove it, or set it to false",
            )
        )
    if engine.pipeline_parallel_size > model.num_layers:
        problems.append(
            Problem(
                f"{model.name} has {model.num_layers} layers for this many stages",
                path="engine.pipeline_parallel_size",
                got=str(engine.pipeline_parallel_size),
                next_step=f"set engine.pipeline_parallel_size to at most {model.num_layers}",
            )
        )
    return problems
