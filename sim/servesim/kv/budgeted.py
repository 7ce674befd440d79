"""Paged KV with a budget of tokens per request: what is over it is dropped, and its blocks are freed.

Which tokens are dropped changes what the model says, and that is not modelled; here only memory counts.
Sources: StreamingLLM (arXiv 2309.17453) keeps the first tokens and a window of the newest; H2O (2306.14048)
keeps the tokens that got most attention, and needs the whole prompt to know them.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

from servesim.kv.base import PrefixHit, Usage
from servesim.kv.block_pool import spans_of

__all__ = ["BudgetedKVCache", "BudgetedSequence", "HeavyHitterKVCache", "SinkKVCache"]


class BudgetedAccount(NamedTuple):
    """The classes of a pool in which every request keeps a budget; slots of dropped tokens are internal."""

    num_blocks: int
    """With the null block."""
    block_size: int

    def usage(self, computed_tokens: Any, final_waste: Any, *levels: Any) -> Usage:
        """The pool by class; ``levels`` as BudgetedKVCache gives them."""
        free_blocks, tokens, stale = levels
        free, lost = free_blocks * self.block_size, final_waste + stale
        empty = (self.num_blocks - 1) * self.block_size - free - tokens
        # While a prompt is computed, its last block may have less room than the budget's last one will.
        internal = (lost + empty - abs(lost - empty)) // 2
        return Usage(
            tokens=tokens,
            reserved=empty - internal,
            internal=internal,
            round_up=0 * free,
            holes=0 * free,
            cached=0 * free,
            free=free,
            logical=tokens,
        )


class BudgetedSequence:
    """The blocks of a request, of which there would be ``end`` had none been dropped."""

    __slots__ = ("blocks", "end", "num_slots", "processed", "prompt_tokens")

    def __init__(self, prompt_tokens: int) -> None:
        self.prompt_tokens = prompt_tokens
        self.num_slots = 0  # tokens computed, dropped ones included
        self.processed = 0  # of them, those with which attention was done when tokens were dropped last
        self.blocks: list[int] = []
        self.end = 0


class BudgetedKVCache:
    """KVCacheManager that counts blocks; a subclass says which it keeps. ``budget``: tokens of a request."""

    advances_together = False
    evictions = 0
    _sink_blocks = 0  # leading blocks that are never dropped

    def __init__(self, num_blocks: int, block_size: int, budget: int) -> None:
        """Block 0 is vLLM's null block and never handed out."""
        self.block_size = self.growth_block_size = block_size
        self.budget = budget
        self.account = BudgetedAccount(num_blocks, block_size)
        self._free = list(range(num_blocks - 1, 0, -1))  # top of the stack last
        self._tokens = 0  # kept by all requests
        self._stale = 0  # slots in held blocks whose token was dropped

    @property
    def num_free_blocks(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    # ---- which blocks a request keeps -----------------------------------------------------------

    def kept(self, sequence: BudgetedSequence) -> int:
        """Tokens that a request keeps."""
        raise NotImplementedError

    def stale(self, sequence: BudgetedSequence) -> int:
        """Slots in held blocks whose token was dropped and that no new one will take."""
        return 0

    def last_slot(self, final_slots: int) -> int:
        """Slots counted from the first block, dropped blocks included, when ``final_slots`` are computed."""
        return final_slots

    def end_for(self, sequence: BudgetedSequence, num_slots: int) -> int:
        """``end`` that ``num_slots`` slots need."""
        raise NotImplementedError

    def dropped(self, sequence: BudgetedSequence) -> tuple[int, int]:
        """The range of places in the table whose blocks ``processed`` has made useless."""
        raise NotImplementedError

    def most_blocks(self, num_tokens: int) -> int:
        """Blocks that a request of ``num_tokens`` tokens may hold while they are computed."""
        raise NotImplementedError

    # ---- KVCacheManager -------------------------------------------------------------------------

    def new_sequence(
        self,
        prompt: Sequence[tuple[Hashable | None, int]],
        prompt_tokens: int,
        output_name: Hashable | None,
        output_tokens: int | None = None,
    ) -> BudgetedSequence:
        """A sequence without blocks."""
        return BudgetedSequence(prompt_tokens)

    def final_waste(self, sequence: BudgetedSequence, final_slots: int) -> tuple[int, int]:
        """The empty end of the last block, held from the first slot of that block on."""
        last = self.last_slot(final_slots)
        waste = -last % self.block_size
        return waste, last + waste - self.block_size + 1

    def find_hit(self, sequence: BudgetedSequence, num_tokens: int) -> PrefixHit | None:
        """A prompt of which tokens are missing helps nobody else."""
        return None

    def num_blocks_needed(self, sequence: BudgetedSequence, num_slots: int, hit: PrefixHit | None) -> int:
        """New blocks for ``num_slots`` slots."""
        return max(self.end_for(sequence, num_slots) - sequence.end, 0)

    def num_blocks_to_admit(self, sequence: BudgetedSequence, num_tokens: int, hit: PrefixHit | None) -> int:
        """The most that computing ``num_tokens`` tokens takes at once."""
        return self.most_blocks(num_tokens)

    def deny(self, num_blocks: int) -> bool:
        """Any free block serves, so too few are free."""
        return False

    def release(self, sequence: BudgetedSequence, num_processed_tokens: int) -> None:
        """Drop what is over the budget."""
        self._count(sequence, -1)
        sequence.processed = num_processed_tokens
        first, last = self.dropped(sequence)
        self._free += sequence.blocks[first:last][::-1]
        del sequence.blocks[first:last]
        self._count(sequence, 1)

    def allocate(self, sequence: BudgetedSequence, num_slots: int, hit: PrefixHit | None) -> None:
        """Take blocks for ``num_slots`` slots."""
        self._count(sequence, -1)
        new = self.num_blocks_needed(sequence, num_slots, None)
        sequence.blocks += [self._free.pop() for _ in range(new)]
        sequence.end += new
        sequence.num_slots = max(num_slots, sequence.num_slots)
        self._count(sequence, 1)

    def cache(self, sequence: BudgetedSequence, num_tokens: int) -> None:
        """Nothing is found by content."""

    def grow(self, num_blocks: int) -> None:
        """Never asked for: see advances_together."""
        raise NotImplementedError

    def settle(self, sequence: BudgetedSequence, num_slots: int) -> None:
        """Never asked for: see advances_together."""
        raise NotImplementedError

    def free(self, sequence: BudgetedSequence) -> None:
        """Give back all blocks."""
        self._count(sequence, -1)
        self._free += sequence.blocks[::-1]
        sequence.blocks = []
        sequence.num_slots = sequence.processed = sequence.end = 0

    def spans(self, sequence: BudgetedSequence) -> list[tuple[int, int]]:
        """Runs of neighbouring blocks, with null blocks in the place of dropped ones."""
        sinks, dropped = self._sink_blocks, sequence.end - len(sequence.blocks)
        table = [*sequence.blocks[:sinks], *[0] * dropped, *sequence.blocks[sinks:]]
        return spans_of(table, self.block_size)

    def hole_sizes(self) -> list[int]:
        """None: any free block serves."""
        return []

    def levels(self) -> tuple[int, ...]:
        """Free blocks; tokens kept; slots of dropped tokens in blocks that are held."""
        return len(self._free), self._tokens, self._stale

    def _count(self, sequence: BudgetedSequence, sign: int) -> None:
        self._tokens += sign * self.kept(sequence)
        self._stale += sign * self.stale(sequence)


class HeavyHitterKVCache(BudgetedKVCache):
    """Keeps any ``budget`` tokens, packed into leading blocks; a new token takes a dropped one's slot."""

    def kept(self, sequence: BudgetedSequence) -> int:
        """The whole prompt until it is computed; never more than fits into the blocks held."""
        if sequence.processed >= sequence.prompt_tokens:
            return min(sequence.num_slots, self.budget)
        return sequence.num_slots

    def last_slot(self, final_slots: int) -> int:
        """A new token takes a slot that is there."""
        return min(final_slots, self.budget)

    def end_for(self, sequence: BudgetedSequence, num_slots: int) -> int:
        """Blocks of the prompt, and after that of the budget."""
        tokens = num_slots
        if sequence.processed >= sequence.prompt_tokens:
            tokens = min(tokens, self.budget)
        return -(-tokens // self.block_size)

    def dropped(self, sequence: BudgetedSequence) -> tuple[int, int]:
        """The last ones, once the prompt is computed and what is kept is packed into the first."""
        last = sequence.end
        if sequence.processed >= sequence.prompt_tokens:
            sequence.end = min(last, -(-self.budget // self.block_size))
        return sequence.end, last

    def most_blocks(self, num_tokens: int) -> int:
        """All tokens that are computed before any is dropped."""
        return -(-num_tokens // self.block_size)


class SinkKVCache(BudgetedKVCache):
    """Keeps ``sink_tokens`` first tokens and the newest; a block goes when its last token leaves the window.

    ``chunk_tokens``: most tokens computed in a step, which the window must hold besides.
    """

    def __init__(
        self, num_blocks: int, block_size: int, budget: int, sink_tokens: int, chunk_tokens: int
    ) -> None:
        super().__init__(num_blocks, block_size, budget)
        self._sinks, self._window = sink_tokens, budget - sink_tokens
        self._sink_blocks = -(-sink_tokens // block_size)
        kept = (
            -(-(self._window - 1 + chunk_tokens) // block_size) + 1
        )  # neither end need be at a block's edge
        self._most_blocks = self._sink_blocks + kept

    def kept(self, sequence: BudgetedSequence) -> int:
        """The sinks, the window before what the last step computed, and that."""
        first = max(self._sinks, sequence.processed + 1 - self._window)
        return min(sequence.num_slots, self._sinks) + max(sequence.num_slots - first, 0)

    def stale(self, sequence: BudgetedSequence) -> int:
        """Between the sinks and the window, in their blocks."""
        ahead = sequence.end * self.block_size - sequence.num_slots
        return len(sequence.blocks) * self.block_size - self.kept(sequence) - ahead

    def end_for(self, sequence: BudgetedSequence, num_slots: int) -> int:
        """Blocks of all tokens: those before the window count as gone, not as free."""
        return -(-num_slots // self.block_size)

    def dropped(self, sequence: BudgetedSequence) -> tuple[int, int]:
        """Those behind the sinks that lie wholly before the window."""
        sinks, held = min(self._sink_blocks, sequence.end), len(sequence.blocks)
        first = (sequence.processed + 1 - self._window) // self.block_size
        window = min(sequence.end - max(first, sinks), held - sinks)
        return sinks, held - max(window, 0)

    def most_blocks(self, num_tokens: int) -> int:
        """Never more than sinks, window and one step's tokens span."""
        return min(-(-num_tokens // self.block_size), self._most_blocks)
