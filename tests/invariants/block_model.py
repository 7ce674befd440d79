"""vLLM's block pool written block by block, with nothing saved: what the extents of servesim.kv must equal.

A block is an object with a reference count and a hash; the hash is all tokens up to the block's end. Facts
from vllm/v1/core/block_pool.py and kv_cache_manager.py: blocks are taken from the front of one free queue,
a taken block loses its hash, a hit takes a block back out of the queue, freed blocks are put back last first.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import count

__all__ = ["Block", "BlockModel", "SequenceModel"]

Token = tuple[Hashable, int]
_serials = count()


class Block:
    """One physical block."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.users = 0
        self.hash: tuple[Token, ...] | None = None


class SequenceModel:
    """A request's tokens, without end, and its table of blocks."""

    def __init__(self, prompt: Sequence[tuple[Hashable | None, int]], output_name: Hashable | None) -> None:
        self.tokens: list[Token] = []
        for name, length in prompt:
            unique = ("private", next(_serials)) if name is None else name
            self.tokens += [(unique, position) for position in range(length)]
        self.num_prompt_tokens = len(self.tokens)
        self._output = ("private", next(_serials)) if output_name is None else output_name
        self.table: list[Block] = []
        self.num_hashed = 0
        self.num_slots = 0

    def prefix(self, num_tokens: int) -> tuple[Token, ...]:
        """The first tokens, generated ones included."""
        missing = num_tokens - len(self.tokens)
        if missing > 0:
            first = len(self.tokens) - self.num_prompt_tokens
            self.tokens += [(self._output, first + j) for j in range(missing)]
        return tuple(self.tokens[:num_tokens])


class BlockModel:
    """The pool, the free queue and the map from hashes to blocks."""

    def __init__(self, num_blocks: int, block_size: int, *, caching: bool, blank_blocks_first: bool) -> None:
        self.block_size = block_size
        self.caching = caching
        self.blank_blocks_first = blank_blocks_first
        self.blocks = [Block(number) for number in range(1, num_blocks)]
        self.free_queue = list(self.blocks)
        self.cached: dict[tuple[Token, ...], dict[int, Block]] = {}
        self.evicted: list[int] = []

    @property
    def num_cached(self) -> int:
        """Blocks in the free queue that a hit could take."""
        return sum(block.hash is not None for block in self.free_queue)

    def find_hit(self, sequence: SequenceModel, num_tokens: int) -> list[Block]:
        """Cached blocks of the longest prefix."""
        hit: list[Block] = []
        if not self.caching:
            return hit
        for index in range(num_tokens // self.block_size):
            copies = self.cached.get(sequence.prefix((index + 1) * self.block_size))
            if not copies:
                break
            hit.append(next(iter(copies.values())))
        return hit

    def allocate(self, sequence: SequenceModel, num_slots: int, hit: Sequence[Block] = ()) -> None:
        """Take the hit blocks, then new ones."""
        for block in hit:
            if not block.users:
                self.free_queue.remove(block)
            block.users += 1
        sequence.table += hit
        sequence.num_hashed += len(hit)
        while len(sequence.table) * self.block_size < num_slots:
            sequence.table.append(self._take())
        sequence.num_slots = max(sequence.num_slots, num_slots)

    def _take(self) -> Block:
        block = self.free_queue.pop(0)
        assert block.users == 0
        if block.hash is not None:
            copies = self.cached[block.hash]
            del copies[block.number]
            if not copies:
                del self.cached[block.hash]
            block.hash = None
            self.evicted.append(block.number)
        block.users = 1
        return block

    def cache(self, sequence: SequenceModel, num_tokens: int) -> None:
        """Give full blocks their hash."""
        if not self.caching:
            return
        for index in range(sequence.num_hashed, num_tokens // self.block_size):
            block = sequence.table[index]
            assert block.hash is None
            block.hash = sequence.prefix((index + 1) * self.block_size)
            self.cached.setdefault(block.hash, {})[block.number] = block
            sequence.num_hashed = index + 1

    def free(self, sequence: SequenceModel) -> None:
        """Give all blocks back, the last first."""
        blank: list[Block] = []
        back: list[Block] = []
        for block in reversed(sequence.table):
            block.users -= 1
            if not block.users:
                to_front = self.blank_blocks_first and block.hash is None
                (blank if to_front else back).append(block)
        self.free_queue = blank + self.free_queue + back
        sequence.table = []
        sequence.num_hashed = sequence.num_slots = 0
