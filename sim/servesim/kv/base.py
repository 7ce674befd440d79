"""What a scheduler asks of a KV-cache manager, whatever its layout."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

__all__ = ["NO_HIT", "Account", "KVCacheManager", "PrefixHit", "Usage"]

SequenceT = TypeVar("SequenceT")
"""What a manager keeps about one request; opaque to everybody else."""


class PrefixHit(NamedTuple):
    """Leading tokens of a sequence whose KV the cache already holds.

    ``num_evictable`` is how many of the blocks nobody uses at this moment: taking them also shrinks
    the free queue. ``pieces`` is the manager's own.
    """

    num_tokens: int
    num_blocks: int
    num_evictable: int
    pieces: tuple[Any, ...]


NO_HIT = PrefixHit(0, 0, 0, ())
"""The cache has nothing of a sequence."""


class Usage(NamedTuple):
    """The pool in token slots by class; all but ``logical`` add up to the pool.

    tokens: written (or being written in this step) and still needed, a shared slot counted once.
    reserved: allocated, empty, will be filled by its request. internal: allocated, never to be filled.
    round_up: allocated beyond what was asked for. holes: free, but in pieces too small to be used.
    cached: reclaimable prefix-cache blocks. free: the rest.
    logical: as tokens, a shared slot counted once per sharer.
    """

    tokens: int
    reserved: int
    internal: int
    round_up: int
    holes: int
    cached: int
    free: int
    logical: int


class Account(Protocol):
    """How a manager's counts become the classes of its pool, of numbers or of whole columns."""

    def usage(self, computed_tokens: Any, final_waste: Any, *levels: Any) -> Usage:
        """The pool by class.

        ``computed_tokens`` sums, over live sequences, the tokens written; ``final_waste`` sums the slots
        that they hold and will never fill; ``levels`` as KVCacheManager.levels. Numbers, or arrays of equal
        shape.
        """
        ...


class KVCacheManager(Protocol[SequenceT]):
    """Owner of the KV pool. Every can_ question is asked before the act it speaks of."""

    @property
    def account(self) -> Account:
        """What turns ``levels`` into the classes of the pool."""
        ...

    @property
    def growth_block_size(self) -> int | None:
        """Slots between two allocations of a decoding sequence; None when it never allocates again."""
        ...

    @property
    def advances_together(self) -> bool:
        """Whether decoding sequences may grow through grow and settle; else each is allocated for."""
        ...

    @property
    def num_free_blocks(self) -> int:
        """Allocation units that are free, reclaimable ones included."""
        ...

    @property
    def evictions(self) -> int:
        """Prefix-cache blocks reclaimed so far."""
        ...

    def new_sequence(
        self,
        prompt: Sequence[tuple[Hashable | None, int]],
        prompt_tokens: int,
        output_name: Hashable | None,
        output_tokens: int | None = None,
    ) -> SequenceT:
        """A sequence with no memory yet, described by the content of its prompt.

        ``output_tokens`` is the length of its output, for managers that reserve; None when nobody knows it.
        """
        ...

    def final_waste(self, sequence: SequenceT, final_slots: int) -> tuple[int, int]:
        """Slots that a sequence of ``final_slots`` slots in the end never fills, and from which slot on."""
        ...

    def find_hit(self, sequence: SequenceT, num_tokens: int) -> PrefixHit | None:
        """The longest cached prefix within the first ``num_tokens`` tokens; None when caching is off.

        Asked for sequences that hold nothing: a request is looked up when it waits.
        """
        ...

    def num_blocks_needed(self, sequence: SequenceT, num_slots: int, hit: PrefixHit | None) -> int:
        """Free blocks that holding ``num_slots`` slots would take, reclaimed hit blocks included."""
        ...

    def num_blocks_to_admit(self, sequence: SequenceT, num_tokens: int, hit: PrefixHit | None) -> int:
        """Free blocks that a new sequence of ``num_tokens`` tokens must find before any is computed."""
        ...

    def deny(self, num_blocks: int) -> bool:
        """Note that the head of the queue waits for so many blocks.

        Returns whether as many are free, so that only their places are wrong.
        """
        ...

    def release(self, sequence: SequenceT, num_processed_tokens: int) -> None:
        """Free what attention will not look at again, once ``num_processed_tokens`` tokens are computed."""
        ...

    def allocate(self, sequence: SequenceT, num_slots: int, hit: PrefixHit | None) -> None:
        """Give the sequence its hit blocks and memory for ``num_slots`` slots in all."""
        ...

    def cache(self, sequence: SequenceT, num_tokens: int) -> None:
        """Make the full blocks of the first ``num_tokens`` tokens hit-able."""
        ...

    def grow(self, num_blocks: int) -> None:
        """Take blocks for decoding sequences that advance together; ``settle`` says later who has them."""
        ...

    def settle(self, sequence: SequenceT, num_slots: int) -> None:
        """Tell a sequence that grew through ``grow`` how many slots it has come to."""
        ...

    def free(self, sequence: SequenceT) -> None:
        """Give back all memory of the sequence, its last blocks first."""
        ...

    def spans(self, sequence: SequenceT) -> list[tuple[int, int]]:
        """(first slot, slots) of the runs of consecutive slots of a sequence, in the order of its tokens.

        A first slot of -1 stands for slots that were given back. A paged manager knows them only when it
        tracks block ids.
        """
        ...

    def hole_sizes(self) -> list[int]:
        """Slots of every run of free slots, by address; empty where any free block serves as well."""
        ...

    def levels(self) -> tuple[int, ...]:
        """The manager's own counts at this moment, as many at any moment; its account knows their meaning."""
        ...
