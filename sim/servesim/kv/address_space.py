"""Runs of consecutive slots, handed out and taken back: first fit, best fit and buddy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left, insort
from typing import Literal, Protocol

__all__ = ["FITS", "AddressSpace", "BestFit", "Buddy", "FirstFit", "Fit", "build_address_space"]

Fit = Literal["first", "best", "buddy"]


class AddressSpace(Protocol):
    """Slots 0 to num_slots - 1, of which some are free."""

    @property
    def num_free(self) -> int:
        """Free slots, wherever they lie."""
        ...

    @property
    def largest_hole(self) -> int:
        """The most slots that can be allocated at once."""
        ...

    def granted(self, num_slots: int) -> int:
        """Slots that an allocation of ``num_slots`` takes."""
        ...

    def allocate(self, num_slots: int) -> int:
        """First slot of a run of ``granted(num_slots)`` slots; a hole of that size must be there."""
        ...

    def free(self, address: int, num_slots: int) -> None:
        """Take back what ``allocate(num_slots)`` gave, and join it with its free neighbours."""
        ...

    def holes(self) -> list[tuple[int, int]]:
        """Free runs as (first slot, slots), in no order; for buddy, its free chunks."""
        ...


class _HoleList(ABC):
    """Holes that never touch one another, in the order in which they are tried."""

    def __init__(self, num_slots: int) -> None:
        self.num_free = num_slots
        self._size_at = {0: num_slots}  # by first slot
        self._start_of = {num_slots: 0}  # by the slot behind the last
        self._order = [self._key(0, num_slots)]
        self._largest: int | None = num_slots

    @staticmethod
    @abstractmethod
    def _key(address: int, size: int) -> tuple[int, int]:
        """What holes are ordered by."""

    @abstractmethod
    def _choose(self, num_slots: int) -> int:
        """First slot of the hole to be cut."""

    @property
    def largest_hole(self) -> int:
        """Slots of the largest hole."""
        if self._largest is None:
            self._largest = max(self._size_at.values(), default=0)
        return self._largest

    def granted(self, num_slots: int) -> int:
        """As many as asked for."""
        return num_slots

    def allocate(self, num_slots: int) -> int:
        """The low end of the hole that is chosen."""
        address = self._choose(num_slots)
        size = self._remove(address)
        if size > num_slots:
            self._insert(address + num_slots, size - num_slots)
        self.num_free -= num_slots
        self._largest = None
        return address

    def free(self, address: int, num_slots: int) -> None:
        """Join the slots with the holes on both sides."""
        self.num_free += num_slots
        if address in self._start_of:
            below = self._start_of[address]
            num_slots += self._remove(below)
            address = below
        if address + num_slots in self._size_at:
            num_slots += self._remove(address + num_slots)
        self._insert(address, num_slots)
        self._largest = None

    def holes(self) -> list[tuple[int, int]]:
        """Free runs."""
        return list(self._size_at.items())

    def _insert(self, address: int, size: int) -> None:
        self._size_at[address] = size
        self._start_of[address + size] = address
        insort(self._order, self._key(address, size))

    def _remove(self, address: int) -> int:
        size = self._size_at.pop(address)
        del self._start_of[address + size]
        del self._order[bisect_left(self._order, self._key(address, size))]
        return size


class FirstFit(_HoleList):
    """The lowest hole that is large enough (Knuth, The Art of Computer Programming 1, 2.5, method A)."""

    @staticmethod
    def _key(address: int, size: int) -> tuple[int, int]:
        return address, size

    def _choose(self, num_slots: int) -> int:
        return next(address for address, size in self._order if size >= num_slots)


class BestFit(_HoleList):
    """The smallest hole that is large enough, the lowest of equal ones (the same source)."""

    @staticmethod
    def _key(address: int, size: int) -> tuple[int, int]:
        return size, address

    @property
    def largest_hole(self) -> int:
        """Slots of the largest hole."""
        return self._order[-1][0] if self._order else 0

    def _choose(self, num_slots: int) -> int:
        return self._order[bisect_left(self._order, (num_slots, -1))][1]


class Buddy:
    """Chunks of 2^k slots that are halved on demand and joined with their other half when both are free.

    A pool that is no power of two begins as one chunk for each of its binary digits, the largest first, so
    that every chunk lies at a multiple of its size. Of several chunks the lowest is taken.
    Source: Knowlton, A fast storage allocator, CACM 8(10), 1965; Orca as measured in the PagedAttention
    paper (arXiv 2309.06180, section 6.1) uses it.
    """

    def __init__(self, num_slots: int) -> None:
        self.num_free = num_slots
        self._free: list[list[int]] = [[] for _ in range(num_slots.bit_length())]  # addresses by k, ascending
        self._levels = num_slots  # bit k: there is a free chunk of 2^k slots
        address = 0
        for level in reversed(range(num_slots.bit_length())):
            if num_slots >> level & 1:
                self._free[level].append(address)
                address += 1 << level

    @property
    def largest_hole(self) -> int:
        """Slots of the largest free chunk."""
        return 1 << self._levels.bit_length() >> 1

    def granted(self, num_slots: int) -> int:
        """The next power of two."""
        return 1 << (num_slots - 1).bit_length()

    def allocate(self, num_slots: int) -> int:
        """The low end of the smallest chunk that is large enough; its rest becomes halves of halves."""
        level = (num_slots - 1).bit_length()
        larger = self._levels >> level
        found = level + (larger & -larger).bit_length() - 1
        address = self._free[found].pop(0)
        if not self._free[found]:
            self._levels ^= 1 << found
        for half in range(found - 1, level - 1, -1):
            self._put(address + (1 << half), half)
        self.num_free -= 1 << level
        return address

    def free(self, address: int, num_slots: int) -> None:
        """Join the chunk with its buddy as long as that one is free."""
        level = (num_slots - 1).bit_length()
        self.num_free += 1 << level
        while level + 1 < len(self._free) and self._take(address ^ (1 << level), level):
            address &= ~(1 << level)
            level += 1
        self._put(address, level)

    def holes(self) -> list[tuple[int, int]]:
        """Free chunks."""
        return [(address, 1 << level) for level, chunks in enumerate(self._free) for address in chunks]

    def _put(self, address: int, level: int) -> None:
        insort(self._free[level], address)
        self._levels |= 1 << level

    def _take(self, address: int, level: int) -> bool:
        """Remove a certain chunk, if it is free."""
        chunks = self._free[level]
        place = bisect_left(chunks, address)
        if place == len(chunks) or chunks[place] != address:
            return False
        del chunks[place]
        if not chunks:
            self._levels ^= 1 << level
        return True


FITS: dict[Fit, type[FirstFit] | type[BestFit] | type[Buddy]] = {
    "first": FirstFit,
    "best": BestFit,
    "buddy": Buddy,
}


def build_address_space(fit: Fit, num_slots: int) -> AddressSpace:
    """An empty address space of that kind."""
    return FITS[fit](num_slots)
