"""A model whose layers differ in attention: one table of blocks per group of layers, one pool for all."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from servesim.kv.base import PrefixHit
from servesim.kv.block_pool import BlockPool, spans_of
from servesim.kv.paged import PagedAccount, PagedKVCache, PagedSequence
from servesim.kv.window import SlidingKVCache, longest_run

__all__ = ["GroupedKVCache"]

GroupedSequence = tuple[PagedSequence, ...]


class GroupedKVCache:
    """KVCacheManager of several groups (window None: full attention), as vLLM's hybrid coordinator.

    A hit is a length that every group accepts. Source: vllm/v1/core/kv_cache_coordinator.py.
    """

    advances_together = False

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        windows: Sequence[int | None],
        *,
        in_flight_tokens: int,
        max_model_len: int,
        enable_prefix_caching: bool,
        blank_blocks_first: bool = True,
        track_ids: bool = False,
        hash_lookahead_tokens: int = 0,
        drop_last_hit: bool = False,
    ) -> None:
        self.pool = BlockPool(num_blocks, blank_blocks_first=blank_blocks_first, track_ids=track_ids)
        self.block_size = self.growth_block_size = block_size
        self.account = PagedAccount(num_blocks, block_size, len(windows))
        self._caching = enable_prefix_caching
        self._drop_last_hit = drop_last_hit
        self._groups = [
            PagedKVCache(
                num_blocks,
                block_size,
                enable_prefix_caching=enable_prefix_caching,
                pool=self.pool,
                hash_lookahead_tokens=hash_lookahead_tokens,
            )
            if window is None
            else SlidingKVCache(
                self.pool,
                block_size,
                window,
                in_flight_tokens=in_flight_tokens,
                max_model_len=max_model_len,
                enable_prefix_caching=enable_prefix_caching,
                hash_lookahead_tokens=hash_lookahead_tokens,
            )
            for window in windows
        ]
        # Groups of one window must hit together; full attention is looked up first.
        distinct = sorted(dict.fromkeys(windows), key=lambda window: window is not None)
        self._families = [[i for i, w in enumerate(windows) if w == window] for window in distinct]
        self._full_families = {i for i, window in enumerate(distinct) if window is None}  # looked up once

    @property
    def num_free_blocks(self) -> int:
        """Blocks in the free queue, cached ones included."""
        return self.pool.num_free

    @property
    def evictions(self) -> int:
        """Cached blocks reclaimed so far."""
        return self.pool.evictions

    def new_sequence(
        self,
        prompt: Sequence[tuple[Hashable | None, int]],
        prompt_tokens: int,
        output_name: Hashable | None,
        output_tokens: int | None = None,
    ) -> GroupedSequence:
        """A sequence without blocks."""
        return tuple(group.new_sequence(prompt, prompt_tokens, output_name) for group in self._groups)

    def final_waste(self, sequence: GroupedSequence, final_slots: int) -> tuple[int, int]:
        """The empty end of the last block, in one group."""
        return self._groups[0].final_waste(sequence[0], final_slots)

    def find_hit(self, sequence: GroupedSequence, num_tokens: int) -> PrefixHit | None:
        """The longest prefix that every group holds; each may shorten it, until none does."""
        if not self._caching:
            return None
        length = num_tokens
        dropped: set[int] = set()  # families that have given up their last block at the present length
        while True:
            candidate = length
            for index, family in enumerate(self._families):
                drops = self._drop_last_hit and index not in dropped
                limit = min(candidate + self.block_size, num_tokens) if drops else candidate
                found = min(self._family_length(family, sequence, limit, drops), candidate)
                if drops:
                    dropped.add(index)
                elif found < candidate:
                    dropped.clear()
                    dropped.update(self._full_families)
                candidate = found
            if candidate >= length:
                break
            length = candidate
        hits = tuple(self._hit(i, part, length) for i, part in enumerate(sequence))
        evictable = sum(hit.num_evictable for hit in hits)
        return PrefixHit(hits[0].num_tokens, hits[0].num_blocks, evictable, hits)

    def _family_length(
        self, family: list[int], sequence: GroupedSequence, num_tokens: int, drops: bool
    ) -> int:
        first = self._groups[family[0]]
        if not isinstance(first, SlidingKVCache):
            lengths = [self._hit(i, sequence[i], num_tokens).num_tokens for i in family]
            return max(min(lengths) - drops * self.block_size, 0)
        blocks = num_tokens // self.block_size
        found = []
        for i in family:
            group = self._groups[i]
            assert isinstance(group, SlidingKVCache)
            found.append(group.copies(sequence[i], blocks))
        everywhere = [all_found[0] if all(all_found) else None for all_found in zip(*found, strict=True)]
        return max(longest_run(everywhere, first.blocks_for_hit + drops) - drops, 0) * self.block_size

    def _hit(self, index: int, part: PagedSequence, num_tokens: int) -> PrefixHit:
        group = self._groups[index]
        blocks = num_tokens // self.block_size
        if isinstance(group, SlidingKVCache):
            return group.hit(part, group.copies(part, blocks), blocks)
        hit = group.find_hit(part, num_tokens)
        assert hit is not None
        return hit

    def num_blocks_needed(self, sequence: GroupedSequence, num_slots: int, hit: PrefixHit | None) -> int:
        """New blocks of all groups."""
        hits = hit.pieces if hit else (None,) * len(sequence)
        groups = zip(self._groups, sequence, hits, strict=True)
        return sum(group.num_blocks_needed(part, num_slots, of) for group, part, of in groups)

    def num_blocks_to_admit(self, sequence: GroupedSequence, num_tokens: int, hit: PrefixHit | None) -> int:
        """Blocks of all groups; a window's group never needs more than the window spans."""
        hits = hit.pieces if hit else (None,) * len(sequence)
        groups = zip(self._groups, sequence, hits, strict=True)
        return sum(group.num_blocks_to_admit(part, num_tokens, of) for group, part, of in groups)

    def deny(self, num_blocks: int) -> bool:
        """Any free block serves, so too few are free."""
        return False

    def release(self, sequence: GroupedSequence, num_processed_tokens: int) -> None:
        """Free what has left the windows."""
        for group, part in zip(self._groups, sequence, strict=True):
            group.release(part, num_processed_tokens)

    def allocate(self, sequence: GroupedSequence, num_slots: int, hit: PrefixHit | None) -> None:
        """Take the hit blocks of every group before new blocks could evict them."""
        if hit is not None:
            for group, part, of in zip(self._groups, sequence, hit.pieces, strict=True):
                group.allocate(part, of.num_tokens, of)
        for group, part in zip(self._groups, sequence, strict=True):
            group.allocate(part, num_slots, None)

    def cache(self, sequence: GroupedSequence, num_tokens: int) -> None:
        """Make full blocks hit-able in every group."""
        for group, part in zip(self._groups, sequence, strict=True):
            group.cache(part, num_tokens)

    def grow(self, num_blocks: int) -> None:
        """Never asked for: see advances_together."""
        raise NotImplementedError

    def settle(self, sequence: GroupedSequence, num_slots: int) -> None:
        """Never asked for: see advances_together."""
        raise NotImplementedError

    def free(self, sequence: GroupedSequence) -> None:
        """Give back all blocks, group by group."""
        for group, part in zip(self._groups, sequence, strict=True):
            group.free(part)

    def block_ids(self, sequence: GroupedSequence) -> list[list[int]]:
        """The sequence's block tables by group; needs track_ids."""
        return [group.block_ids(part) for group, part in zip(self._groups, sequence, strict=True)]

    def spans(self, sequence: GroupedSequence) -> list[tuple[int, int]]:
        """Runs of neighbouring blocks, group by group; needs track_ids."""
        return [span for ids in self.block_ids(sequence) for span in spans_of(ids, self.block_size)]

    def cached_spans(self, sequence: GroupedSequence) -> list[tuple[int, int]]:
        """Those that stay hit-able once the sequence has given them back; needs track_ids."""
        groups = zip(self._groups, sequence, strict=True)
        return [span for group, part in groups for span in group.cached_spans(part)]

    def hole_sizes(self) -> list[int]:
        """None: any free block serves."""
        return []

    def levels(self) -> tuple[int, ...]:
        """As PagedKVCache.levels, the last two summed over the groups."""
        logical = sum(group.num_logical_blocks for group in self._groups)
        null = sum(group.num_null_blocks for group in self._groups)
        return self.pool.num_free, self.pool.num_cached, logical, null
