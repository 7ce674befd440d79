"""From an engine's settings to its scheduler and KV cache."""

from __future__ import annotations

from typing import Any, Literal, cast

from servesim.config.kv_options import KvEvictionConfig
from servesim.config.sampling import SamplingConfig
from servesim.config.scenario import EngineConfig
from servesim.cost.budget import MemoryBudget
from servesim.engine.beams import BeamSearch
from servesim.engine.build_swapping import build_swapping
from servesim.engine.disaggregation import DecodeScheduler, PrefillScheduler
from servesim.engine.orca import OrcaScheduler
from servesim.engine.prefill_first import PrefillFirstScheduler
from servesim.engine.scheduler import Scheduler, SchedulerLimits
from servesim.engine.speculation import Accept, Propose, Speculation, SpeculativeScheduler
from servesim.engine.static_batching import StaticScheduler
from servesim.engine.versions import RULES, Rules
from servesim.errors import ConfigError, MemoryDoesNotFitError, Problem
from servesim.kv.address_space import build_address_space
from servesim.kv.base import KVCacheManager
from servesim.kv.budgeted import BudgetedKVCache, HeavyHitterKVCache, SinkKVCache
from servesim.kv.contiguous import ContiguousKVCache, Reservation
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
    propose: Propose | None = None,
    sampling: SamplingConfig | None = None,
    beams: BeamSearch | None = None,
    serves: Literal["all", "prefill", "decode"] = "all",
) -> Scheduler:
    """A scheduler over an empty KV cache; ``engine`` must be resolved (config.defaults.resolve_engine).

    ``track_ids`` lets a paged cache know which block is which, and not only how many there are.
    ``accept`` says which drafts are accepted; an engine that speculates needs it. ``propose`` says how many
    come, empty: always as many as may. ``sampling`` is that of the
    workload, and ``beams`` says which of a request's sequences go on.
    """
    rules = RULES[engine.version]
    limits = _limits(engine, memory, rules, 1 if sampling is None else sampling.n)
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
            track_ids=track_ids,
        )
    if serves != "all":
        return _disaggregated(engine, memory, limits, rules, windows, serves == "decode", one_by_one)
    kv, speculative = _kv_cache(engine, memory, rules, track_ids), engine.speculative
    if engine.kv_eviction is not None:
        budget = engine.kv_eviction.budget_tokens or 0
        windows = tuple(budget if window is None else min(window, budget) for window in windows)
    if speculative is not None:
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
            propose=propose,
        )
    match engine.batching:
        case "static":
            return StaticScheduler(limits, rules, kv, windows)
        case "orca":
            return OrcaScheduler(limits, rules, kv, windows, one_by_one=one_by_one)
        case "prefill-first":
            return PrefillFirstScheduler(limits, rules, kv, windows, one_by_one=one_by_one)
        case "continuous":
            return Scheduler(limits, rules, kv, windows, one_by_one=one_by_one)


def _disaggregated(
    engine: EngineConfig,
    memory: MemoryBudget,
    limits: SchedulerLimits,
    rules: Rules,
    windows: tuple[int | None, ...],
    decodes: bool,
    one_by_one: bool,
) -> Scheduler:
    """A scheduler that computes prompts for others, or decodes what others have computed."""
    if memory.kv_layout.group_windows != (None,):
        raise ConfigError(
            Problem(
                "a model with attention windows cannot be served by prefill and decode pools",
                path="fleet.pools",
                next_step="let the pools serve all, or choose a model with full attention in every layer",
            )
        )
    kind = DecodeScheduler if decodes else PrefillScheduler
    return kind(limits, rules, _kv_cache(engine, memory, rules, False), windows, one_by_one=one_by_one)


def _limits(engine: EngineConfig, memory: MemoryBudget, rules: Rules, num_sequences: int) -> SchedulerLimits:
    assert engine.max_num_seqs is not None
    assert engine.max_num_batched_tokens is not None
    assert engine.max_model_len is not None
    if engine.watermark and not rules.has_watermark and engine.batching != "prefill-first":
        raise ConfigError(
            Problem(
                f"vLLM {engine.version} has no watermark",
                path="engine.watermark",
                got=f"{engine.watermark:g}",
                next_step="leave it at 0, or choose a later engine.version",
            )
        )
    draft_rows = engine.speculative.draft_rows if engine.speculative else 0
    kept_rows = 0 if rules.charges_draft_rows else draft_rows * engine.max_num_seqs
    _check_longest_prompt(engine, kept_rows or draft_rows or num_sequences - 1)
    return SchedulerLimits(
        max_num_seqs=engine.max_num_seqs,
        max_num_batched_tokens=engine.max_num_batched_tokens - kept_rows,
        max_model_len=engine.max_model_len,
        enable_chunked_prefill=engine.enable_chunked_prefill,
        long_prefill_token_threshold=engine.long_prefill_token_threshold,
        priority_policy=engine.scheduling_policy == "priority",
        watermark_blocks=int(engine.watermark * memory.num_gpu_blocks),
        scheduler_reserve_full_isl=engine.scheduler_reserve_full_isl,
    )


def _check_longest_prompt(engine: EngineConfig, other_rows: int) -> None:
    """Raise ConfigError where a whole prompt could never start; vLLM lets it wait, and all behind it."""
    assert engine.max_num_batched_tokens is not None
    assert engine.max_model_len is not None
    longest = engine.max_model_len - 1
    if engine.enable_chunked_prefill or longest + other_rows <= engine.max_num_batched_tokens:
        return
    what = "other sequences of its request" if engine.speculative is None else "drafting"
    raise ConfigError(
        Problem(
            f"without chunked prefill a step must have room for the longest prompt beside the {other_rows:,} "
            f"tokens that {what} may take: else it waits for ever, and all behind it",
            path="engine.max_num_batched_tokens",
            got=f"{engine.max_num_batched_tokens} with max_model_len {engine.max_model_len}",
            next_step=f"raise it to at least {longest + other_rows}, lower engine.max_model_len, or set "
            "engine.enable_chunked_prefill: true",
        )
    )


def _kv_cache(
    engine: EngineConfig, memory: MemoryBudget, rules: Rules, track_ids: bool
) -> KVCacheManager[Any]:
    if engine.allocator != "paged":
        return _contiguous(engine, memory)
    if engine.kv_eviction is not None:
        return _budgeted(engine.kv_eviction, engine, memory)
    assert engine.max_model_len is not None
    reads_ahead = engine.speculative is not None and engine.speculative.reads_hidden_states
    hash_lookahead_tokens = int(reads_ahead and rules.hashes_lookahead)
    drop_last_hit = reads_ahead and not rules.hashes_lookahead
    if memory.kv_layout.group_windows != (None,):
        return GroupedKVCache(
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
    return PagedKVCache(
        memory.num_gpu_blocks,
        engine.block_size,
        enable_prefix_caching=engine.enable_prefix_caching,
        blank_blocks_first=rules.blank_blocks_first,
        track_ids=track_ids,
        hash_lookahead_tokens=hash_lookahead_tokens,
        drop_last_hit=drop_last_hit,
    )


def _contiguous(engine: EngineConfig, memory: MemoryBudget) -> ContiguousKVCache:
    """Memory in one piece; raises MemoryDoesNotFitError when the longest request could never be admitted."""
    most, slots, fit = engine.max_model_len or 0, memory.contiguous_tokens, engine.contiguous_fit
    space = build_address_space(fit, slots)
    longest = space.granted(most)
    if longest > space.largest_hole:
        what = "contiguous slots" if fit != "buddy" else "slots, the next power of two,"
        raise MemoryDoesNotFitError(
            Problem(
                f"a request of this length needs {longest:,} {what} and the largest piece of the pool of "
                f"{slots:,} has {space.largest_hole:,}",
                path="engine.max_model_len",
                got=str(most),
                next_step=f"set engine.max_model_len to at most {space.largest_hole}",
            )
        )
    policy = cast(Reservation, engine.allocator.removeprefix("contiguous-"))
    return ContiguousKVCache(slots, most, policy, fit)


def _budgeted(eviction: KvEvictionConfig, engine: EngineConfig, memory: MemoryBudget) -> BudgetedKVCache:
    """The KV cache of an engine that drops tokens."""
    if memory.kv_layout.group_windows != (None,):
        raise ConfigError(
            Problem(
                "a model with attention windows drops tokens by itself",
                path="engine.kv_eviction",
                next_step="remove it, or choose a model with full attention in every layer",
            )
        )
    blocks, size, budget = memory.num_gpu_blocks, engine.block_size, eviction.budget_tokens
    assert budget is not None  # resolved
    if eviction.policy == "heavy-hitters":
        return HeavyHitterKVCache(blocks, size, budget)
    return SinkKVCache(blocks, size, budget, eviction.sink_tokens, memory.kv_layout.in_flight_tokens)
