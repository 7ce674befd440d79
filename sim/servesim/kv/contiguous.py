"""The KV cache before paging: one run of consecutive slots per request, reserved when it is admitted."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, Literal

from servesim.kv.address_space import Fit, build_address_space
from servesim.kv.base import PrefixHit, Usage

__all__ = ["ContiguousAccount", "ContiguousKVCache", "ContiguousSequence", "Reservation", "reserved_slots"]

Reservation = Literal["max", "pow2", "oracle"]


def reserved_slots(
    policy: Reservation, prompt_tokens: int, output_tokens: int | None, max_model_len: int
) -> int:
    """Slots reserved for a request: all it may ever have, a guess from its output length, or what it needs.

    pow2 takes the next power of two of the output; oracle leaves out the last token, whose KV is never
    written. Without an output length both fall back to max. Source: the baselines Max, Pow2 and Oracle of
    the PagedAttention paper (arXiv 2309.06180, section 6.1).
    """
    if policy == "max" or output_tokens is None:
        return max_model_len
    if policy == "oracle":
        return min(prompt_tokens + output_tokens, max_model_len) - 1
    return min(prompt_tokens + (1 << (output_tokens - 1).bit_length()), max_model_len)


class ContiguousSequence:
    """The reservation of one request: ``wanted`` slots; once admitted ``num_slots`` from ``address`` on."""

    __slots__ = ("address", "num_slots", "wanted")

    def __init__(self, wanted: int) -> None:
        self.wanted = wanted
        self.address = -1
        self.num_slots = 0


class ContiguousAccount:
    """The classes of a pool of slots."""

    def usage(self, computed_tokens: Any, final_waste: Any, *levels: Any) -> Usage:
        """The pool by class; ``levels`` as ContiguousKVCache gives them."""
        allocated, round_up, free, holes = levels
        return Usage(
            tokens=computed_tokens,
            reserved=allocated - round_up - computed_tokens - final_waste,
            internal=final_waste,
            round_up=round_up,
            holes=holes,
            cached=0 * free,
            free=free - holes,
            logical=computed_tokens,
        )


class ContiguousKVCache:
    """KVCacheManager that reserves at admission everything a request will ever hold.

    Its allocation unit ("block") is one slot. ``policy`` says how much is reserved, ``fit`` where.
    """

    growth_block_size: int | None = None
    advances_together = True
    evictions = 0

    def __init__(
        self, num_slots: int, max_model_len: int, policy: Reservation = "max", fit: Fit = "first"
    ) -> None:
        self.num_slots = num_slots
        self.account = ContiguousAccount()
        self.max_model_len = max_model_len
        self.policy = policy
        self.space = build_address_space(fit, num_slots)
        self._allocated = 0  # slots
        self._round_up = 0  # of those, given but not asked for
        self._denied = 0  # slots that the head of the queue waits for
        self._holes: int | None = None  # free slots that are useless; None: to be counted

    @property
    def num_free_blocks(self) -> int:
        """Slots that one more request could be given: the largest hole."""
        return self.space.largest_hole

    def new_sequence(
        self,
        prompt: Sequence[tuple[Hashable | None, int]],
        prompt_tokens: int,
        output_name: Hashable | None,
        output_tokens: int | None = None,
    ) -> ContiguousSequence:
        """A sequence without slots."""
        return ContiguousSequence(
            reserved_slots(self.policy, prompt_tokens, output_tokens, self.max_model_len)
        )

    def final_waste(self, sequence: ContiguousSequence, final_slots: int) -> tuple[int, int]:
        """The part of the reservation that is never used, held from the start."""
        return sequence.wanted - final_slots, 0

    def find_hit(self, sequence: ContiguousSequence, num_tokens: int) -> PrefixHit | None:
        """Nothing is shared in contiguous memory."""
        return None

    def num_blocks_needed(self, sequence: ContiguousSequence, num_slots: int, hit: PrefixHit | None) -> int:
        """A whole reservation for a new sequence, nothing afterwards."""
        return 0 if sequence.num_slots else self.space.granted(sequence.wanted)

    def num_blocks_to_admit(
        self, sequence: ContiguousSequence, num_tokens: int, hit: PrefixHit | None
    ) -> int:
        """A whole reservation."""
        return self.num_blocks_needed(sequence, num_tokens, hit)

    def deny(self, num_blocks: int) -> bool:
        """Holes below ``num_blocks`` slots are useless until memory is freed."""
        self._denied, self._holes = num_blocks, None
        return num_blocks <= self.space.num_free

    def release(self, sequence: ContiguousSequence, num_processed_tokens: int) -> None:
        """A reservation is kept whole to the end."""

    def allocate(self, sequence: ContiguousSequence, num_slots: int, hit: PrefixHit | None) -> None:
        """Reserve, if that has not been done yet."""
        if sequence.num_slots:
            return
        sequence.num_slots = self.space.granted(sequence.wanted)
        sequence.address = self.space.allocate(sequence.wanted)
        self._count(sequence, 1)

    def cache(self, sequence: ContiguousSequence, num_tokens: int) -> None:
        """Nothing is shared in contiguous memory."""

    def grow(self, num_blocks: int) -> None:
        """The reservation already covers every token to come."""

    def settle(self, sequence: ContiguousSequence, num_slots: int) -> None:
        """The reservation already covers every token to come."""

    def free(self, sequence: ContiguousSequence) -> None:
        """Return the whole reservation."""
        if not sequence.num_slots:
            return
        self.space.free(sequence.address, sequence.wanted)
        self._count(sequence, -1)
        sequence.address, sequence.num_slots = -1, 0

    def spans(self, sequence: ContiguousSequence) -> list[tuple[int, int]]:
        """The one run that the sequence holds, round-up included."""
        return [(sequence.address, sequence.num_slots)] if sequence.num_slots else []

    def hole_sizes(self) -> list[int]:
        """Slots of every free run, by address."""
        return [size for _, size in sorted(self.space.holes())]

    def levels(self) -> tuple[int, ...]:
        """Slots that are given, of those not asked for, that are free, and of those useless.

        A free run is a hole when the head of the queue was denied and it is too small for it, or, where
        all reservations are equal, as far as no whole reservation fits into it.
        """
        if self._holes is None:
            self._holes = self._useless()
        return self._allocated, self._round_up, self.space.num_free, self._holes

    def _useless(self) -> int:
        if self._denied:
            return sum(size for _, size in self.space.holes() if size < self._denied)
        if self.policy != "max":
            return 0
        whole = self.space.granted(self.max_model_len)
        return sum(size % whole for _, size in self.space.holes())

    def _count(self, sequence: ContiguousSequence, sign: int) -> None:
        self._allocated += sign * sequence.num_slots
        self._round_up += sign * (sequence.num_slots - sequence.wanted)
        self._denied, self._holes = 0, None
