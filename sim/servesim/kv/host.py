"""Where the blocks of preempted requests wait: host memory first, then disk."""

from __future__ import annotations

from typing import Any, NamedTuple

from servesim.kv.paged import PagedKVCache, PagedSequence

__all__ = ["SwapSpace", "SwappableKVCache", "Traffic"]


class Traffic(NamedTuple):
    """Blocks that a step moves, in either direction, by where they wait."""

    host: int = 0
    disk: int = 0


class SwappableKVCache(PagedKVCache):
    """A paged cache, without prefix caching, whose sequences can give up their place for a while."""

    _makes_extents_late = False

    def suspend(self, sequence: PagedSequence) -> int:
        """Give back the place of all blocks, whose content lives on elsewhere; returns how many."""
        blocks = sequence.num_blocks
        self.free(sequence)
        return blocks


class SwapSpace:
    """Two stores of blocks; each holder lies in one of them."""

    def __init__(self, host_blocks: int, disk_blocks: int) -> None:
        self.size = Traffic(host_blocks, disk_blocks)
        self.used = Traffic()
        self._held: dict[Any, Traffic] = {}

    def has_room(self, blocks: int) -> bool:
        """Whether one of the stores can take so many."""
        return any(used + blocks <= size for used, size in zip(self.used, self.size, strict=True))

    def put(self, holder: Any, blocks: int) -> Traffic:
        """Take a holder's blocks in, into host memory if they fit; ask has_room first."""
        moved = Traffic(blocks, 0)
        if self.used.host + blocks > self.size.host:
            moved = Traffic(0, blocks)
        self._held[holder] = moved
        self.used = Traffic(self.used.host + moved.host, self.used.disk + moved.disk)
        return moved

    def take(self, holder: Any) -> Traffic:
        """Give a holder's blocks back."""
        moved = self._held.pop(holder)
        self.used = Traffic(self.used.host - moved.host, self.used.disk - moved.disk)
        return moved
