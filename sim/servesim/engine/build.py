"""From an engine's settings to its scheduler and KV cache."""

from __future__ import annotations

from typing import Any

from servesim.config.sampling import SamplingConfig
from servesim.config.scenario import EngineConfig, KvEvictionConfig
from servesim.cost.budget import MemoryBudget
from servesim.engine.beams import BeamSearch
from servesim.engine.build_swapping import build_swapping
from servesim.engine.scheduler import Scheduler, SchedulerLimits
from servesim.engine.speculation import Accept, Speculation, SpeculativeScheduler
from servesim.engine.versions import RULES
from servesim.errors import ConfigError, Problem
from servesim.kv.base import KVCacheManager
from servesim.kv.budgeted import BudgetedKVCache, HeavyHitterKVCache, SinkKVCache
from servesim.kv.contiguous import ContiguousKVCache
from servesim.kv.grouped import GroupedKVCache
from servesim.kv.paged import PagedKVCache

__all__ = ["build_scheduler"]


def build_scheduler(
    engine: EngineConfig,
    memory: MemoryBudget,
    windows: tuple[int | None, ...],
    *,
    one_by_one: bool = False,
    accept: Accept | None = None,
    sampling: SamplingConfig | None = None,
    beams: BeamSearch | None = None,
) -> Scheduler:
    """A scheduler over an empty KV cache; ``engine`` must be resolved (config.defaults.resolve_engine).

    ``accept`` says which drafts are accepted; an engine that speculates needs it. ``sampling`` is that of the
    workload, and ``beams`` says which of a request's sequences go on.
    """
    assert engine.max_num_seqs is not None
    assert engine.max_num_batched_tokens is not None
    assert engine.max_model_len is not None
    rules = RULES[engine.version]
    if engine.watermark and not rules.has_watermark:
        raise ConfigError(
            Problem(
                f"vLLM {engine.version} has no watermark",
                path="engine.watermark",
                got=f"{engine.watermark:g}",
                next_step="leave it at 0, or choose a later engine.version",
            )
        )
    speculative = engine.speculative
    max_num_batched_tokens = engine.max_num_batched_tokens
    if speculative is not None and not rules.charges_draft_rows:
        max_num_batched_tokens -= speculative.draft_rows * engine.max_num_seqs
    limits = SchedulerLimits(
        max_num_seqs=engine.max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=engine.max_model_len,
        enable_chunked_prefill=engine.enable_chunked_prefill,
        long_prefill_token_threshold=engine.long_prefill_token_threshold,
        priority_policy=engine.scheduling_policy == "priority",
        watermark_blocks=int(engine.watermark * memory.num_gpu_blocks),
        scheduler_reserve_full_isl=engine.scheduler_reserve_full_isl,
    )
    if engine.preemption_mode == "swap" or sampling is not None:
        return build_swapping(
            engine,
            memory,
            limits,
            rules,
            windows,
            sampling=sampling,
            beams=beams,
            one_by_one=one_by_one,
        )
    reads_ahead = speculative is not None and speculative.reads_hidden_states
    hash_lookahead_tokens = int(reads_ahead and rules.hashes_lookahead)
    drop_last_hit = reads_ahead and not rules.hashes_lookahead
    kv: KVCacheManager[Any]
    if engine.kv_eviction is not None:
        kv, budget = _budgeted(engine.kv_eviction, engine, memory, max_num_batched_tokens)
        windows = tuple(budget if window is None else min(window, budget) for window in windows)
    elif engine.allocator == "contiguous-max":
        kv = ContiguousKVCache(memory.contiguous_tokens, engine.max_model_len)
    elif memory.kv_layout.group_windows != (None,):
        kv = GroupedKVCache(
            memory.num_gpu_blocks,
            engine.block_size,
            memory.kv_layout.group_windows,
            in_flight_tokens=memory.kv_layout.in_flight_tokens,
            max_model_len=engine.max_model_len,
            enable_prefix_caching=engine.enable_prefix_caching,
            blank_blocks_first=rules.blank_blocks_first,
            hash_lookahead_tokens=hash_lookahead_tokens,
            drop_last_hit=drop_last_hit,
        )
    else:
        kv = PagedKVCache(
            memory.num_gpu_blocks,
            engine.block_size,
            enable_prefix_caching=engine.enable_prefix_caching,
            blank_blocks_first=rules.blank_blocks_first,
            hash_lookahead_tokens=hash_lookahead_tokens,
            drop_last_hit=drop_last_hit,
        )
    if speculative is None:
        return Scheduler(limits, rules, kv, windows, one_by_one=one_by_one)
    if accept is None:
        raise ValueError("an engine that speculates needs a law of acceptance")
    speculation = Speculation(
        speculative.num_speculative_tokens,
        speculative.keeps_kv,
        speculative.reads_hidden_states,
        speculative.draft_rows,
    )
    return SpeculativeScheduler(
        limits,
        rules,
        kv,
        windows,
        speculation=speculation,
        accept=accept,
        asynchronous=engine.async_scheduling,
    )


def _budgeted(
    eviction: KvEvictionConfig, engine: EngineConfig, memory: MemoryBudget, chunk_tokens: int
) -> tuple[BudgetedKVCache, int]:
    """The KV cache of an engine that drops tokens, and how many of a request it keeps."""
    if memory.kv_layout.group_windows != (None,):
        raise ConfigError(
            Problem(
                "a model with attention windows drops tokens by itself",
                path="engine.kv_eviction",
                next_step="remove it, or choose a model with full attention in every layer",
            )
        )
    budget = eviction.budget_tokens
    assert budget is not None  # resolved
    if eviction.policy == "heavy-hitters":
        return HeavyHitterKVCache(memory.num_gpu_blocks, engine.block_size, budget), budget
    sinks = eviction.sink_tokens
    return SinkKVCache(memory.num_gpu_blocks, engine.block_size, budget, sinks, chunk_tokens), budget
