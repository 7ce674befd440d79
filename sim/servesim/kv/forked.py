"""Paged KV of requests with several sequences: blocks are shared by reference and copied on the first write.

The PagedAttention paper's mechanism (arXiv 2309.06180, section 4.4), as vLLM had it up to its V0 engine. The
n sequences of a request grow in step. Each is known by its last block, and every block by the one before it,
so that a request is a tree: forking, pruning and freeing cost nothing per shared block.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import Any, NamedTuple

from servesim.kv.base import PrefixHit, Usage
from servesim.kv.block_pool import spans_of

__all__ = ["ForkedKVCache", "ForkedSequence"]


class ForkedAccount(NamedTuple):
    """The classes of a pool that requests of several sequences share, by what they were allocated."""

    num_blocks: int
    """With the null block."""
    block_size: int

    def usage(self, computed_tokens: Any, final_waste: Any, *levels: Any) -> Usage:
        """The pool by class; ``levels`` as ForkedKVCache gives them. Scheduled slots are in use."""
        free_blocks, empty, logical = levels
        free = free_blocks * self.block_size
        return Usage(
            tokens=(self.num_blocks - 1) * self.block_size - free - empty,
            reserved=empty - final_waste,
            internal=final_waste,
            round_up=0 * free,
            holes=0 * free,
            cached=0 * free,
            free=free,
            logical=logical,
        )


class _Block:
    """A block behind ``before``; ``users`` counts the sequences that end in it and the blocks behind it."""

    __slots__ = ("before", "id", "users")

    def __init__(self, block_id: int, before: _Block | None) -> None:
        self.id = block_id
        self.before = before
        self.users = 1


class ForkedSequence:
    """The blocks of one request: a single table until its prompt is computed, ``width`` tables from then on.

    ``num_blocks`` counts physical blocks; they have no place in the pool while the request is ``suspended``.
    """

    __slots__ = ("leaves", "num_blocks", "num_slots", "prompt_tokens", "suspended")

    def __init__(self, prompt_tokens: int) -> None:
        self.prompt_tokens = prompt_tokens
        self.num_slots = 0  # of one sequence
        self.num_blocks = 0
        self.leaves: list[_Block] = []  # the last block of each sequence
        self.suspended = False

    def blocks(self) -> Iterator[_Block]:
        """Every physical block once."""
        seen: set[int] = set()
        for leaf in self.leaves:
            block: _Block | None = leaf
            while block is not None and id(block) not in seen:
                seen.add(id(block))
                yield block
                block = block.before


class ForkedKVCache:
    """KVCacheManager of requests that each hold ``width`` sequences. Nothing is shared between requests."""

    advances_together = False
    evictions = 0

    def __init__(self, num_blocks: int, block_size: int, width: int) -> None:
        """Block 0 is vLLM's null block and never handed out."""
        self.block_size = self.growth_block_size = block_size
        self.width = width
        self.account = ForkedAccount(num_blocks, block_size)
        self.num_copies = 0
        """Blocks copied because a sequence was about to write into a shared one."""
        self._free = list(range(num_blocks - 1, 0, -1))  # top of the stack last
        self._empty = 0  # allocated slots that hold nothing yet
        self._logical = 0  # slots in use, shared ones once per sequence

    @property
    def num_free_blocks(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    def new_sequence(
        self,
        prompt: Sequence[tuple[Hashable | None, int]],
        prompt_tokens: int,
        output_name: Hashable | None,
        output_tokens: int | None = None,
    ) -> ForkedSequence:
        """A request without blocks."""
        return ForkedSequence(prompt_tokens)

    def final_waste(self, sequence: ForkedSequence, final_slots: int) -> tuple[int, int]:
        """The empty ends of the last blocks, one for each sequence."""
        waste = -final_slots % self.block_size
        return waste * self.width, final_slots + waste - self.block_size + 1

    def find_hit(self, sequence: ForkedSequence, num_tokens: int) -> PrefixHit | None:
        """Nothing is found by content."""
        return None

    def num_blocks_needed(self, sequence: ForkedSequence, num_slots: int, hit: PrefixHit | None) -> int:
        """New blocks and copies for ``num_slots`` slots of every sequence; all blocks of a suspended one."""
        returning = sequence.num_blocks if sequence.suspended else 0
        slots, size, prompt = sequence.num_slots, self.block_size, sequence.prompt_tokens
        if num_slots <= slots:
            return returning
        if slots >= prompt:  # the tables are forked, or are about to be
            behind, copies = slots, self.width - len({id(leaf) for leaf in sequence.leaves})
        else:
            behind, copies = min(num_slots, prompt), self.width - 1
            returning += -(-behind // size) - -(-slots // size)
        if num_slots > behind:
            returning += self.width * (-(-num_slots // size) - -(-behind // size))
            returning += copies if behind % size else 0
        return returning

    def num_blocks_to_admit(self, sequence: ForkedSequence, num_tokens: int, hit: PrefixHit | None) -> int:
        """As for any slots."""
        return self.num_blocks_needed(sequence, num_tokens, hit)

    def deny(self, num_blocks: int) -> bool:
        """Any free block serves, so too few are free."""
        return False

    def release(self, sequence: ForkedSequence, num_processed_tokens: int) -> None:
        """Full attention looks at every token again."""

    def allocate(self, sequence: ForkedSequence, num_slots: int, hit: PrefixHit | None) -> None:
        """Grow to ``num_slots`` slots a sequence: the prompt once, what follows for each on its own."""
        self._count(sequence, -1)
        if sequence.suspended:
            self._resume(sequence)
        slots, prompt = sequence.num_slots, sequence.prompt_tokens
        if slots < prompt:
            self._extend(sequence, min(num_slots, prompt))
        if num_slots > max(slots, prompt):
            self._fork(sequence)
            self._extend(sequence, num_slots)
        self._count(sequence, 1)

    def branch(self, sequence: ForkedSequence, parents: Sequence[int]) -> None:
        """Let sequence i go on from what sequence ``parents[i]`` holds; blocks without a user are freed."""
        self._count(sequence, -1)
        dropped = sequence.leaves
        sequence.leaves = [dropped[parent] for parent in parents]
        for leaf in sequence.leaves:
            leaf.users += 1
        for leaf in dropped:
            self._drop(sequence, leaf)
        self._count(sequence, 1)

    def cache(self, sequence: ForkedSequence, num_tokens: int) -> None:
        """Nothing is found by content."""

    def grow(self, num_blocks: int) -> None:
        """Never asked for: see advances_together."""
        raise NotImplementedError

    def settle(self, sequence: ForkedSequence, num_slots: int) -> None:
        """Never asked for: see advances_together."""
        raise NotImplementedError

    def free(self, sequence: ForkedSequence) -> None:
        """Give back all blocks."""
        self._count(sequence, -1)
        for leaf in [] if sequence.suspended else sequence.leaves:
            self._drop(sequence, leaf)
        sequence.leaves, sequence.num_slots, sequence.num_blocks = [], 0, 0
        sequence.suspended = False

    def suspend(self, sequence: ForkedSequence) -> int:
        """Give back the place of all blocks, which live on elsewhere as they are; returns how many."""
        self._count(sequence, -1)
        self._free += [block.id for block in sequence.blocks()]
        sequence.suspended = True
        return sequence.num_blocks

    def block_ids(self, sequence: ForkedSequence) -> list[list[int]]:
        """The block table of every sequence."""
        tables = []
        for leaf in sequence.leaves:
            table = list[int]()
            block: _Block | None = leaf
            while block is not None:
                table.append(block.id)
                block = block.before
            tables.append(table[::-1])
        return tables

    def spans(self, sequence: ForkedSequence) -> list[tuple[int, int]]:
        """Runs of neighbouring blocks, shared ones once."""
        if sequence.suspended:
            return []
        return spans_of(sorted(block.id for block in sequence.blocks()), self.block_size)

    def hole_sizes(self) -> list[int]:
        """None: any free block serves."""
        return []

    def levels(self) -> tuple[int, ...]:
        """Free blocks; slots held and empty; slots in use, shared ones once per sequence."""
        return len(self._free), self._empty, self._logical

    def _count(self, sequence: ForkedSequence, sign: int) -> None:
        """Add a request to the pool's sums, or take it out; its sequences share the prompt from the start."""
        if not sequence.suspended:
            ends = len({id(leaf) for leaf in sequence.leaves})
            self._empty += sign * ends * (-sequence.num_slots % self.block_size)
            self._logical += sign * self.width * sequence.num_slots

    def _resume(self, sequence: ForkedSequence) -> None:
        for block in sequence.blocks():
            block.id = self._free.pop()
        sequence.suspended = False

    def _fork(self, sequence: ForkedSequence) -> None:
        """Give every sequence a last block of its own, if that block is partly filled."""
        if len(sequence.leaves) == 1:
            leaf = sequence.leaves[0]
            leaf.users += self.width - 1
            sequence.leaves = [leaf] * self.width
        if sequence.num_slots % self.block_size:
            for i, leaf in enumerate(sequence.leaves):
                if leaf.users > 1:
                    leaf.users -= 1
                    sequence.leaves[i] = self._take(sequence, leaf.before)
                    if leaf.before is not None:
                        leaf.before.users += 1
                    self.num_copies += 1

    def _extend(self, sequence: ForkedSequence, num_slots: int) -> None:
        size = self.block_size
        count = -(-num_slots // size) - -(-sequence.num_slots // size)
        if not sequence.leaves:
            sequence.leaves, count = [self._take(sequence, None)], count - 1
        for _ in range(count):  # a sequence's use of its last block becomes that of the block behind it
            sequence.leaves = [self._take(sequence, leaf) for leaf in sequence.leaves]
        sequence.num_slots = num_slots

    def _take(self, sequence: ForkedSequence, before: _Block | None) -> _Block:
        sequence.num_blocks += 1
        return _Block(self._free.pop(), before)

    def _drop(self, sequence: ForkedSequence, leaf: _Block) -> None:
        """Take away one use of a block; a block without uses takes its use of the one before along."""
        block: _Block | None = leaf
        while block is not None:
            block.users -= 1
            if block.users:
                return
            self._free.append(block.id)
            sequence.num_blocks -= 1
            block = block.before
