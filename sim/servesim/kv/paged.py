"""vLLM's paged KV cache: blocks on demand, prefix caching (vllm/v1/core/kv_cache_manager.py)."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

from servesim.kv.base import NO_HIT, PrefixHit, Usage
from servesim.kv.block_pool import BlockPool, Extent, first_copy, parts_of, spans_of
from servesim.kv.content import ContentTree, Node

__all__ = ["PagedAccount", "PagedKVCache", "PagedSequence"]


class PagedAccount(NamedTuple):
    """The classes of a pool of blocks: only the last blocks of a sequence have empty slots.

    A request has its tokens in ``num_groups`` groups of blocks.
    """

    num_blocks: int
    """With the null block."""
    block_size: int
    num_groups: int = 1

    def usage(self, computed_tokens: Any, final_waste: Any, *levels: Any) -> Usage:
        """The pool by class, in slots of one group's tokens; ``levels`` as PagedKVCache gives them."""
        free, cached, logical, null = (count * self.block_size for count in levels)
        written = self.num_groups * computed_tokens - null
        waste = self.num_groups * final_waste
        empty = logical - written
        used = (self.num_blocks - 1) * self.block_size - free
        return Usage(
            tokens=used - empty,
            reserved=empty - waste,
            internal=waste,
            round_up=0 * free,
            holes=0 * free,
            cached=cached,
            free=free - cached,
            logical=written,
        )


class PagedSequence:
    """Blocks of one request: cached ones as (extent, end of its part), then ``num_blank`` without a hash."""

    __slots__ = ("blank_ids", "cursor", "num_blank", "num_cached", "num_null", "path", "pieces")

    def __init__(self, path: list[Node]) -> None:
        self.path = path
        self.pieces: list[tuple[Extent, int]] = []
        self.num_cached = 0  # leading blocks with a hash
        self.num_blank = 0
        self.num_null = 0  # leading blocks that were given back: see kv/window.py
        self.blank_ids: list[int] | None = None
        self.cursor = 0  # index in path of the node in which the next block to be cached ends

    @property
    def num_blocks(self) -> int:
        """Blocks held."""
        return self.num_cached + self.num_blank


class PagedKVCache:
    """KVCacheManager of blocks on demand, with vLLM's prefix caching when it is enabled.

    Blocks that only their own request can look up need no extent while it holds them: one is made when it
    gives them back.
    """

    _makes_extents_late = True

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        enable_prefix_caching: bool,
        blank_blocks_first: bool = True,
        track_ids: bool = False,
        pool: BlockPool | None = None,
        hash_lookahead_tokens: int = 0,
        drop_last_hit: bool = False,
    ) -> None:
        self.block_size = block_size
        self.pool = pool or BlockPool(num_blocks, blank_blocks_first=blank_blocks_first, track_ids=track_ids)
        self.account = PagedAccount(num_blocks, block_size)
        self.num_logical_blocks = 0
        self.num_null_blocks = 0
        self._caching = enable_prefix_caching
        self._makes_extents_late &= not self.pool.tracks_ids
        self._tree = ContentTree()
        self._lookahead = hash_lookahead_tokens  # tokens behind a block that its identity covers
        self._drop_last_hit = drop_last_hit

    @property
    def growth_block_size(self) -> int:
        """A decoding sequence takes a block each time its slots cross a multiple of this."""
        return self.block_size

    @property
    def advances_together(self) -> bool:
        """Growth only counts blocks, so which block a sequence gets must not be asked for."""
        return not self.pool.tracks_ids

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
    ) -> PagedSequence:
        """A sequence without blocks."""
        return PagedSequence(self._tree.path(prompt, prompt_tokens, output_name) if self._caching else [])

    def final_waste(self, sequence: PagedSequence, final_slots: int) -> tuple[int, int]:
        """The empty end of the last block, held from the first slot of that block on."""
        waste = -final_slots % self.block_size
        return waste, final_slots + waste - self.block_size + 1

    def find_hit(self, sequence: PagedSequence, num_tokens: int) -> PrefixHit | None:
        """Longest run of cached blocks from the start, within ``num_tokens``."""
        if not self._caching:
            return None
        if len(sequence.path) == 1 and not sequence.path[0].extents:
            return NO_HIT
        hit = self.find_blocks(sequence, num_tokens // self.block_size)
        if self._drop_last_hit and hit.num_blocks:
            return self.find_blocks(sequence, hit.num_blocks - 1)
        return hit

    def find_blocks(self, sequence: PagedSequence, limit: int) -> PrefixHit:
        """The longest run of cached blocks from the start, of at most ``limit`` blocks."""
        block, evictable = 0, 0
        pieces: list[tuple[Node, int, int]] = []
        path = sequence.path
        for index, node in enumerate(path):
            end = limit
            if index + 1 < len(path):
                end = min(end, (path[index + 1].start - self._lookahead) // self.block_size)
            while block < end:
                extent = first_copy(node, block)
                if extent is None:
                    return PrefixHit(block * self.block_size, block, evictable, tuple(pieces))
                high = min(extent.high, end)
                if len(node.extents) > 1:  # a copy cached earlier wins from where it begins
                    older = node.extents[: node.extents.index(extent)]
                    high = min([high, *(e.low for e in older if block < e.low)])
                pieces.append((node, block, high))
                if not extent.users:
                    evictable += high - block
                block = high
        return PrefixHit(block * self.block_size, block, evictable, tuple(pieces))

    def num_blocks_needed(self, sequence: PagedSequence, num_slots: int, hit: PrefixHit | None) -> int:
        """New blocks for ``num_slots`` slots, and the hit blocks that are in the free queue."""
        blocks = -(-num_slots // self.block_size)
        if hit is None:
            blocks -= sequence.num_cached + sequence.num_blank
            return blocks if blocks > 0 else 0
        return max(blocks - hit.num_blocks, 0) + hit.num_evictable

    # Nothing is freed before a sequence ends, so the whole prompt takes what its slots take.
    num_blocks_to_admit = num_blocks_needed

    def deny(self, num_blocks: int) -> bool:
        """Any free block serves, so too few are free."""
        return False

    def release(self, sequence: PagedSequence, num_processed_tokens: int) -> None:
        """Full attention looks at every token again."""

    def allocate(self, sequence: PagedSequence, num_slots: int, hit: PrefixHit | None) -> None:
        """Take the hit blocks, then new ones from the front of the free queue."""
        if hit is not None:
            for node, low, high in hit.pieces:
                self._acquire(sequence, node, low, high)
            sequence.num_cached = hit.num_blocks
            self.num_logical_blocks += hit.num_blocks
        new = -(-num_slots // self.block_size) - sequence.num_cached - sequence.num_blank
        if new > 0:
            self._extend(sequence, new)

    def cache(self, sequence: PagedSequence, num_tokens: int) -> None:
        """Give the full blocks of the first ``num_tokens`` tokens their hash."""
        full = num_tokens // self.block_size
        if not self._caching or full <= sequence.num_cached:
            return
        path = sequence.path
        if len(path) == 1 and self._makes_extents_late:
            sequence.num_blank -= full - sequence.num_cached
            sequence.num_cached = full
            return
        while sequence.num_cached < full:
            low, high = sequence.num_cached, full
            while sequence.cursor + 1 < len(path):
                next_low = (path[sequence.cursor + 1].start - self._lookahead) // self.block_size
                if next_low > low:
                    high = min(high, next_low)
                    break
                sequence.cursor += 1
            size = high - low
            ids = None
            if sequence.blank_ids is not None:
                ids = sequence.blank_ids[:size]
                del sequence.blank_ids[:size]
            self._register(sequence, path[sequence.cursor], low, high, ids)
            sequence.num_cached = high
            sequence.num_blank -= size

    def grow(self, num_blocks: int) -> None:
        """Take blocks whose holders are named later by settle."""
        self.pool.take(num_blocks)
        self.num_logical_blocks += num_blocks

    def settle(self, sequence: PagedSequence, num_slots: int) -> None:
        """Credit a sequence with the blocks that grow took for it."""
        sequence.num_blank = -(-num_slots // self.block_size) - sequence.num_cached

    def free(self, sequence: PagedSequence) -> None:
        """Give back all blocks, the last first; cached ones stay hit-able until they are reclaimed."""
        cached = sequence.num_cached
        self.num_logical_blocks -= cached + sequence.num_blank
        pieces, sequence.pieces = sequence.pieces, []
        parts = [part for extent, taken in pieces for part in parts_of(extent, taken)] if pieces else []
        if len(sequence.path) == 1 and self._makes_extents_late:
            low = parts[-1].high if parts else 0
            if low < cached:
                node = sequence.path[0]
                node.extents.append(Extent(node, low, cached, None, 1))
                parts.append(node.extents[-1])
        self._give_back(parts, sequence.num_blank, sequence.blank_ids)
        sequence.num_cached = sequence.num_blank = sequence.cursor = 0
        sequence.blank_ids = None

    def block_ids(self, sequence: PagedSequence) -> list[int]:
        """The sequence's block table; needs track_ids."""
        ids = [0] * sequence.num_null
        for extent, taken in sequence.pieces:
            for part in parts_of(extent, taken):
                ids += part.ids or []
        return ids + (sequence.blank_ids or [])

    def spans(self, sequence: PagedSequence) -> list[tuple[int, int]]:
        """Runs of neighbouring blocks; needs track_ids."""
        return spans_of(self.block_ids(sequence), self.block_size)

    def cached_spans(self, sequence: PagedSequence) -> list[tuple[int, int]]:
        """Those that stay hit-able once the sequence has given them back; needs track_ids."""
        return spans_of(self.block_ids(sequence)[: sequence.num_cached], self.block_size)

    def hole_sizes(self) -> list[int]:
        """None: any free block serves."""
        return []

    def levels(self) -> tuple[int, ...]:
        """Blocks that are free, cached, held counting every holder, and given back by live sequences."""
        return self.pool.num_free, self.pool.num_cached, self.num_logical_blocks, self.num_null_blocks

    def _extend(self, sequence: PagedSequence, count: int) -> None:
        ids = self.pool.take(count)
        sequence.num_blank += count
        self.num_logical_blocks += count
        if ids is not None:
            sequence.blank_ids = ids if sequence.blank_ids is None else sequence.blank_ids + ids

    def _give_back(self, parts: list[Extent], num_blank: int, blank_ids: list[int] | None) -> None:
        self.pool.put_blank(num_blank, blank_ids)
        for part in reversed(parts):
            part.users -= 1
            if not part.users:
                self.pool.put_cached(part)

    def _register(
        self, sequence: PagedSequence, node: Node, low: int, high: int, ids: list[int] | None
    ) -> None:
        """Cache blocks in place behind the sequence's own last extent, or as a new extent."""
        if sequence.pieces and len(node.extents) == 1:
            extent, taken = sequence.pieces[-1]
            if (
                extent.node is node
                and extent.users == 1
                and extent.rest is None
                and extent.high == taken == low
            ):
                extent.high = high
                sequence.pieces[-1] = (extent, high)
                if extent.ids is not None and ids is not None:
                    extent.ids += ids
                return
        extent = Extent(node, low, high, ids, 1)
        node.extents.append(extent)
        sequence.pieces.append((extent, high))

    def _acquire(self, sequence: PagedSequence, node: Node, low: int, high: int) -> None:
        """Use the first-cached copy of blocks ``low`` to ``high - 1``, with whoever uses it already."""
        extent = first_copy(node, low)
        assert extent is not None
        if not extent.users:
            extent = self.pool.revive(extent, low, high)
        else:
            if high < extent.high:
                extent.split(high)
            if extent.low < low:
                extent = extent.split(low)
        extent.users += 1
        sequence.pieces.append((extent, high))
