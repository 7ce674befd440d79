"""vLLM's paged KV cache: blocks on demand, prefix caching, least recently used blocks reclaimed first.

Blocks are handled in extents, runs of cached blocks that are taken, freed and reclaimed together, so that
the cost follows the number of segments of a prompt and not its number of blocks. The order in which blocks
are reclaimed is vLLM's, block for block (vllm/v1/core/block_pool.py, kv_cache_manager.py).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Any, NamedTuple

from servesim.kv.base import NO_HIT, PrefixHit, Usage
from servesim.kv.content import ContentTree, Node

__all__ = [
    "BlockPool",
    "Extent",
    "PagedAccount",
    "PagedKVCache",
    "PagedSequence",
    "first_copy",
    "parts_of",
    "spans_of",
]


class Extent:
    """Blocks ``low`` to ``high - 1`` of the sequences that go through ``node``, all with ``users`` users.

    ``node`` None: blocks without a hash. ``ids``: the physical blocks, when they are tracked.
    ``rest``: the upper part that was split off while in use; users that took it all follow the link.
    ``before`` and ``after``: neighbours in the free queue.
    """

    __slots__ = ("after", "before", "high", "ids", "low", "node", "rest", "users")

    def __init__(self, node: Node | None, low: int, high: int, ids: list[int] | None, users: int) -> None:
        self.node = node
        self.low = low
        self.high = high
        self.ids = ids
        self.users = users
        self.rest: Extent | None = None
        self.before = self.after = self

    def split(self, block: int) -> Extent:
        """Cut at ``block``: this extent keeps the lower part; returns the upper one, with as many users."""
        ids = None
        if self.ids is not None:
            ids = self.ids[block - self.low :]
            del self.ids[block - self.low :]
        upper = Extent(self.node, block, self.high, ids, self.users)
        self.high = block
        upper.rest, self.rest = self.rest, upper
        if self.node is not None:
            self.node.extents.insert(self.node.extents.index(self) + 1, upper)
        return upper

    def link(self, before: Extent) -> None:
        """Enter the free queue behind ``before``."""
        self.before, self.after = before, before.after
        before.after.before = self
        before.after = self

    def unlink(self) -> None:
        """Leave the free queue."""
        self.before.after, self.after.before = self.after, self.before


def parts_of(extent: Extent, end: int) -> list[Extent]:
    """The extents into which a user's extent has been split since, up to block ``end``."""
    parts = [extent]
    while extent.high < end and extent.rest is not None:
        extent = extent.rest
        parts.append(extent)
    return parts


def first_copy(node: Node, block: int) -> Extent | None:
    """The copy of a block that was cached first, as vLLM looks it up."""
    for extent in node.extents:
        if extent.low <= block < extent.high:
            return extent
    return None


def spans_of(ids: Iterable[int], block_size: int) -> list[tuple[int, int]]:
    """Blocks of consecutive numbers as runs of (first slot, slots); (-1, slots) for null blocks."""
    spans: list[tuple[int, int]] = []
    end = 0
    for number in ids:
        first = (number - 1) * block_size if number else -1
        if spans and (first == end if number else spans[-1][0] < 0):
            spans[-1] = (spans[-1][0], spans[-1][1] + block_size)
        else:
            spans.append((first, block_size))
        end = first + block_size if number else -1
    return spans


class BlockPool:
    """The free queue: blocks without a hash first, then cached blocks from the least recently used.

    ``blank_blocks_first`` False is the rule of vLLM before 0.24: every freed block goes to the back.
    Block 0 is vLLM's null block and never handed out.
    """

    def __init__(self, num_blocks: int, *, blank_blocks_first: bool, track_ids: bool) -> None:
        self.num_blocks = num_blocks
        self.num_free = num_blocks - 1
        self.num_cached = 0
        self.evictions = 0
        self.evicted_ids: list[int] = []
        self._blank = num_blocks - 1
        self._blank_ids = list(range(num_blocks - 1, 0, -1)) if track_ids else None  # top of the stack last
        self._queue = Extent(None, 0, 0, None, 0)  # head of a ring
        self._blank_blocks_first = blank_blocks_first

    @property
    def tracks_ids(self) -> bool:
        """Whether the physical blocks are known, not only how many there are."""
        return self._blank_ids is not None

    def take(self, count: int) -> list[int] | None:
        """Pop blocks from the front; the ids of blocks, when tracked."""
        self.num_free -= count
        blank = self._blank
        if count <= blank and self._blank_ids is None:
            self._blank -= count
            return None
        blank = min(count, blank)
        self._blank -= blank
        ids: list[int] | None = None
        if self._blank_ids is not None:
            ids = self._blank_ids[-blank:][::-1] if blank else []
            del self._blank_ids[len(self._blank_ids) - blank :]
        count -= blank
        while count:
            extent = self._queue.after
            size = extent.high - extent.low
            if size > count:
                size = count
            extent.high -= size
            count -= size
            if ids is not None and extent.ids is not None:
                popped = extent.ids[-size:][::-1]
                del extent.ids[-size:]
                ids += popped
                if extent.node is not None:
                    self.evicted_ids += popped
            if extent.node is not None:
                self.evictions += size
                self.num_cached -= size
            if extent.high == extent.low:
                extent.unlink()
                if extent.node is not None:
                    extent.node.extents.remove(extent)
        return ids

    def put_blank(self, count: int, ids: list[int] | None) -> None:
        """Free blocks without a hash, the last of ``ids`` first."""
        if not count:
            return
        self.num_free += count
        if not self._blank_blocks_first:
            Extent(None, 0, count, ids, 0).link(self._queue.before)
            return
        self._blank += count
        if self._blank_ids is not None and ids is not None:
            self._blank_ids += ids

    def put_cached(self, extent: Extent) -> None:
        """Append an extent that nobody uses any more; its last block is reclaimed first."""
        extent.link(self._queue.before)
        extent.rest = None
        size = extent.high - extent.low
        self.num_free += size
        self.num_cached += size

    def revive(self, extent: Extent, low: int, high: int) -> Extent:
        """Take blocks ``low`` to ``high - 1`` of an extent out of the queue; the others keep their place."""
        if high < extent.high:
            extent.split(high).link(extent.before)  # reclaimed before the blocks below it
        if extent.low < low:
            lower, extent = extent, extent.split(low)
            lower.rest = None
        else:
            extent.unlink()
        extent.rest = None
        self.num_free -= high - low
        self.num_cached -= high - low
        return extent


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
    """KVCacheManager of blocks on demand, with vLLM's prefix caching when it is enabled."""

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
            return max(blocks - sequence.num_blocks, 0)
        return max(blocks - hit.num_blocks, 0) + hit.num_evictable

    def num_blocks_to_admit(self, sequence: PagedSequence, num_tokens: int, hit: PrefixHit | None) -> int:
        """As for any slots: nothing is freed before the sequence ends."""
        return self.num_blocks_needed(sequence, num_tokens, hit)

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
        new = -(-num_slots // self.block_size) - sequence.num_blocks
        if new > 0:
            self._extend(sequence, new)

    def cache(self, sequence: PagedSequence, num_tokens: int) -> None:
        """Give the full blocks of the first ``num_tokens`` tokens their hash."""
        full = num_tokens // self.block_size
        if not self._caching or full <= sequence.num_cached:
            return
        path = sequence.path
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
        self.num_logical_blocks -= sequence.num_blocks
        parts = [part for extent, taken in sequence.pieces for part in parts_of(extent, taken)]
        self._give_back(parts, sequence.num_blank, sequence.blank_ids)
        sequence.pieces = []
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
