"""The blocks of a paged KV cache that are free or cached, in the order in which they are reclaimed.

Blocks are handled in extents, runs of cached blocks that are taken, freed and reclaimed together, so that
the cost follows the number of segments of a prompt and not its number of blocks. The order in which blocks
are reclaimed is vLLM's, block for block (vllm/v1/core/block_pool.py).
"""

from __future__ import annotations

from collections.abc import Iterable

from servesim.kv.content import Node

__all__ = ["BlockPool", "Extent", "first_copy", "parts_of", "spans_of"]


class Extent:
    """Blocks ``low`` to ``high - 1`` of the sequences that go through ``node``, all with ``users`` users.

    ``node`` None: blocks without a hash. ``ids``: the physical blocks, when they are tracked.
    ``rest``: the upper part that was split off while in use; users that took it all follow the link.
    ``before`` and ``after``: neighbours in the free queue, unset outside it.
    """

    __slots__ = ("after", "before", "high", "ids", "low", "node", "rest", "users")

    before: Extent
    after: Extent

    def __init__(self, node: Node | None, low: int, high: int, ids: list[int] | None, users: int) -> None:
        self.node = node
        self.low = low
        self.high = high
        self.ids = ids
        self.users = users
        self.rest: Extent | None = None

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
        del self.before, self.after  # they would keep neighbours alive that have long been evicted


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
        self._queue.before = self._queue.after = self._queue
        self._blank_blocks_first = blank_blocks_first

    @property
    def tracks_ids(self) -> bool:
        """Whether the physical blocks are known, not only how many there are."""
        return self._blank_ids is not None

    def take(self, count: int) -> list[int] | None:
        """Pop blocks from the front; the ids of blocks, when tracked."""
        self.num_free -= count
        ids = None if self._blank_ids is None else list[int]()
        if self._blank:
            blank = count if count < self._blank else self._blank
            self._blank -= blank
            count -= blank
            if self._blank_ids is not None and ids is not None:
                ids += self._blank_ids[-blank:][::-1]
                del self._blank_ids[-blank:]
        while count:
            extent = self._queue.after
            size, node = extent.high - extent.low, extent.node
            if size > count:
                size = count
                extent.high -= size
            else:
                extent.high = extent.low
                extent.unlink()
                if node is not None:
                    node.extents.remove(extent)
            count -= size
            if node is not None:
                self.evictions += size
                self.num_cached -= size
            if ids is not None and extent.ids is not None:
                popped = extent.ids[-size:][::-1]
                del extent.ids[-size:]
                ids += popped
                if node is not None:
                    self.evicted_ids += popped
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
