"""The KV cache before paging: one run of consecutive slots per request, reserved for its longest form."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from servesim.kv.base import PrefixHit, Usage

__all__ = ["ContiguousKVCache", "ContiguousSequence"]


class ContiguousSequence:
    """The slots of one request: ``num_slots`` from ``address`` on, or none yet."""

    __slots__ = ("address", "num_slots")

    def __init__(self) -> None:
        self.address = -1
        self.num_slots = 0


class ContiguousKVCache:
    """KVCacheManager that reserves ``max_model_len`` slots at admission, first fit, as was done before vLLM.

    Its allocation unit ("block") is one slot. Source of the policy: the "Max" baseline of the PagedAttention
    paper (arXiv 2309.06180, section 3.1).
    """

    growth_block_size: int | None = None
    advances_together = True
    evictions = 0

    def __init__(self, num_slots: int, max_model_len: int) -> None:
        self.num_slots = num_slots
        self.max_model_len = max_model_len
        self._holes: list[tuple[int, int]] = [(0, num_slots)]  # (address, size), by address
        self._num_live = 0

    @property
    def num_free_blocks(self) -> int:
        """Slots that a new request could still be given: whole reservations only."""
        return sum(size // self.max_model_len for _, size in self._holes) * self.max_model_len

    def new_sequence(
        self, prompt: Sequence[tuple[Hashable | None, int]], prompt_tokens: int, output_name: Hashable | None
    ) -> ContiguousSequence:
        """A sequence without slots."""
        return ContiguousSequence()

    def final_waste(self, final_slots: int) -> tuple[int, int]:
        """The part of the reservation that is never used, held from the start."""
        return self.max_model_len - final_slots, 0

    def find_hit(self, sequence: ContiguousSequence, num_tokens: int) -> PrefixHit | None:
        """Nothing is shared in contiguous memory."""
        return None

    def num_blocks_needed(self, sequence: ContiguousSequence, num_slots: int, hit: PrefixHit | None) -> int:
        """A whole reservation for a new sequence, nothing afterwards."""
        return 0 if sequence.num_slots else self.max_model_len

    def num_blocks_to_admit(
        self, sequence: ContiguousSequence, num_tokens: int, hit: PrefixHit | None
    ) -> int:
        """A whole reservation."""
        return self.num_blocks_needed(sequence, num_tokens, hit)

    def release(self, sequence: ContiguousSequence, num_processed_tokens: int) -> None:
        """A reservation is kept whole to the end."""

    def allocate(self, sequence: ContiguousSequence, num_slots: int, hit: PrefixHit | None) -> None:
        """Reserve in the first hole that is large enough."""
        if sequence.num_slots:
            return
        size = self.max_model_len
        index = next(i for i, (_, hole) in enumerate(self._holes) if hole >= size)
        address, hole = self._holes[index]
        if hole == size:
            del self._holes[index]
        else:
            self._holes[index] = (address + size, hole - size)
        sequence.address, sequence.num_slots = address, size
        self._num_live += 1

    def cache(self, sequence: ContiguousSequence, num_tokens: int) -> None:
        """Nothing is shared in contiguous memory."""

    def grow(self, num_blocks: int) -> None:
        """The reservation already covers every token to come."""

    def settle(self, sequence: ContiguousSequence, num_slots: int) -> None:
        """The reservation already covers every token to come."""

    def free(self, sequence: ContiguousSequence) -> None:
        """Return the slots and join them with the holes beside them."""
        if not sequence.num_slots:
            return
        low, high = sequence.address, sequence.address + sequence.num_slots
        kept = []
        for address, size in self._holes:
            if address + size == low:
                low = address
            elif address == high:
                high = address + size
            else:
                kept.append((address, size))
        self._holes = sorted([*kept, (low, high - low)])
        sequence.address, sequence.num_slots = -1, 0
        self._num_live -= 1

    def spans(self, sequence: ContiguousSequence) -> list[tuple[int, int]]:
        """The one run of slots, when there is one."""
        return [(sequence.address, sequence.num_slots)] if sequence.num_slots else []

    def usage(self, computed_tokens: int, final_waste: int) -> Usage:
        """The pool by class; a hole too small for a reservation is external fragmentation."""
        allocated = self._num_live * self.max_model_len
        free = self.num_free_blocks
        return Usage(
            tokens=computed_tokens,
            reserved=allocated - computed_tokens - final_waste,
            internal=final_waste,
            external=self.num_slots - allocated - free,
            cached=0,
            free=free,
            logical=computed_tokens,
        )
