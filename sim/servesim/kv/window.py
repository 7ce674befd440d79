"""The blocks of layers with a sliding attention window: those that have left it are freed at once."""

from __future__ import annotations

from servesim.kv.base import PrefixHit
from servesim.kv.block_pool import BlockPool, Extent, first_copy, parts_of
from servesim.kv.paged import PagedKVCache, PagedSequence

__all__ = ["SlidingKVCache"]


class SlidingKVCache(PagedKVCache):
    """One group of layers with a window, over a pool that other groups may share.

    The table of a sequence keeps its length: blocks that left the window stay in it as null blocks, counted
    in ``num_cached`` like cached ones. ``in_flight_tokens``: tokens that may be computed before old blocks
    are freed. Source: vllm/v1/core/single_type_kv_cache_manager.py, SlidingWindowManager.
    """

    _makes_extents_late = False

    def __init__(
        self,
        pool: BlockPool,
        block_size: int,
        window: int,
        *,
        in_flight_tokens: int,
        max_model_len: int,
        enable_prefix_caching: bool,
        hash_lookahead_tokens: int = 0,
    ) -> None:
        super().__init__(
            pool.num_blocks,
            block_size,
            enable_prefix_caching=enable_prefix_caching,
            pool=pool,
            hash_lookahead_tokens=hash_lookahead_tokens,
        )
        self.window = window
        kept = min(window - 1 + in_flight_tokens, max_model_len)
        self._most_blocks = -(-kept // block_size) + 1  # neither end need be at a block's edge

    @property
    def advances_together(self) -> bool:
        """A step may free a sequence's first block, so each is looked at."""
        return False

    @property
    def blocks_for_hit(self) -> int:
        """Cached blocks in a row that a hit needs at its end."""
        return -(-(self.window - 1) // self.block_size)

    def copies(self, sequence: PagedSequence, num_blocks: int) -> list[Extent | None]:
        """The first cached copy of each of the leading blocks."""
        found: list[Extent | None] = []
        path = sequence.path
        for index, node in enumerate(path):
            end = num_blocks
            if index + 1 < len(path):
                end = min(end, (path[index + 1].start - self._lookahead) // self.block_size)
            found += [first_copy(node, block) for block in range(len(found), end)]
        return found

    def find_hit(self, sequence: PagedSequence, num_tokens: int) -> PrefixHit | None:
        """The longest prefix whose last blocks, as many as the window spans, are all cached."""
        if not self._caching:
            return None
        found = self.copies(sequence, num_tokens // self.block_size)
        return self.hit(sequence, found, longest_run(found, self.blocks_for_hit))

    def hit(self, sequence: PagedSequence, found: list[Extent | None], num_blocks: int) -> PrefixHit:
        """A hit of ``num_blocks`` blocks, of which only those in the window are taken."""
        pieces = []
        evictable = 0
        for block in range(self._num_skipped(num_blocks * self.block_size), num_blocks):
            extent = found[block]
            assert extent is not None
            assert extent.node is not None
            pieces.append((extent.node, block, block + 1))
            evictable += not extent.users
        return PrefixHit(num_blocks * self.block_size, num_blocks, evictable, tuple(pieces))

    def num_blocks_to_admit(self, sequence: PagedSequence, num_tokens: int, hit: PrefixHit | None) -> int:
        """Never more than the window and the tokens in flight span."""
        return self._needed(min(-(-num_tokens // self.block_size), self._most_blocks), hit)

    def num_blocks_needed(self, sequence: PagedSequence, num_slots: int, hit: PrefixHit | None) -> int:
        """New blocks for ``num_slots`` slots, and the hit blocks that are in the free queue."""
        blocks = -(-num_slots // self.block_size)
        return max(blocks - sequence.num_blocks, 0) if hit is None else self._needed(blocks, hit)

    def _needed(self, blocks: int, hit: PrefixHit | None) -> int:
        return blocks if hit is None else max(blocks - hit.num_blocks, 0) + hit.num_evictable

    def allocate(self, sequence: PagedSequence, num_slots: int, hit: PrefixHit | None) -> None:
        """Take the hit blocks of the window, then new ones."""
        if hit is not None:
            sequence.num_null = self._num_skipped(hit.num_tokens)
            self.num_null_blocks += sequence.num_null
        super().allocate(sequence, num_slots, hit)
        if hit is not None:
            self.num_logical_blocks -= sequence.num_null

    def release(self, sequence: PagedSequence, num_processed_tokens: int) -> None:
        """Free the blocks that lie wholly before the window of the next token."""
        skipped = min(self._num_skipped(num_processed_tokens), sequence.num_blocks)
        count = skipped - sequence.num_null
        if count <= 0:
            return
        released: list[Extent] = []
        while sequence.pieces and sequence.pieces[0][0].low < skipped:
            extent, end = sequence.pieces.pop(0)
            parts = parts_of(extent, end)
            if parts[-1].high > skipped:
                last = next(part for part in parts if part.high > skipped)
                if last.low < skipped:
                    last.split(skipped)
                    sequence.pieces.insert(0, (last.rest or last, end))
                    released += [*parts[: parts.index(last)], last]
                else:
                    sequence.pieces.insert(0, (last, end))
                    released += parts[: parts.index(last)]
            else:
                released += parts
        blank = max(skipped - sequence.num_cached, 0)
        ids = None
        if sequence.blank_ids is not None:
            ids = sequence.blank_ids[:blank]
            del sequence.blank_ids[:blank]
        sequence.num_blank -= blank
        sequence.num_cached += blank
        sequence.num_null = skipped
        self.num_logical_blocks -= count
        self.num_null_blocks += count
        self._give_back(released, blank, ids)

    def free(self, sequence: PagedSequence) -> None:
        """Give back all blocks; null blocks belong to nobody."""
        self.num_logical_blocks += sequence.num_null
        self.num_null_blocks -= sequence.num_null
        super().free(sequence)
        sequence.num_null = 0

    def _num_skipped(self, num_tokens: int) -> int:
        return max(0, num_tokens - self.window + 1) // self.block_size


def longest_run(found: list[Extent | None], needed: int) -> int:
    """Where the last run of ``needed`` cached blocks ends; else the length of the run at the very start."""
    run = 0
    for block in range(len(found) - 1, -1, -1):
        run = run + 1 if found[block] is not None else 0
        if run >= needed:
            return block + run
    return run
