"""From an engine's settings to its scheduler and KV cache."""

from __future__ import annotations

from typing import Any

from servesim.config.scenario import EngineConfig
from servesim.cost.budget import MemoryBudget
from servesim.engine.scheduler import Scheduler, SchedulerLimits
from servesim.engine.speculation import Accept, Speculation, SpeculativeScheduler
from servesim.engine.versions import RULES
from servesim.errors import ConfigError, Problem
from servesim.kv.base import KVCacheManager
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
    track_ids: bool = False,
    accept: Accept | None = None,
) -> Scheduler:
    """A scheduler over an empty KV cache; ``engine`` must be resolved (config.defaults.resolve_engine).

    ``track_ids`` lets a paged cache know which block is which, and not only how many there are.
    ``accept`` says which drafts are accepted; an engine that speculates needs it.
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
    reads_ahead = speculative is not None and speculative.reads_hidden_states
    hash_lookahead_tokens = int(reads_ahead and rules.hashes_lookahead)
    drop_last_hit = reads_ahead and not rules.hashes_lookahead
    kv: KVCacheManager[Any]
    if engine.allocator == "contiguous-max":
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
            track_ids=track_ids,
            hash_lookahead_tokens=hash_lookahead_tokens,
            drop_last_hit=drop_last_hit,
        )
    else:
        kv = PagedKVCache(
            memory.num_gpu_blocks,
            engine.block_size,
            enable_prefix_caching=engine.enable_prefix_caching,
            blank_blocks_first=rules.blank_blocks_first,
            track_ids=track_ids,
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
