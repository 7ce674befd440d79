"""A paged KV cache and its block-by-block model, put through the same operations and compared after each."""

from __future__ import annotations

from itertools import pairwise, takewhile
from typing import Any

from block_model import BlockModel, SequenceModel

from servesim.kv.paged import PagedKVCache, PagedSequence

__all__ = ["Known", "Pair", "Prompt"]

Prompt = list[tuple[Any, int]]


class Known:
    """A sequence on both sides."""

    def __init__(self, kv: PagedKVCache, prompt: Prompt, output_name: Any) -> None:
        self.num_tokens = sum(length for _, length in prompt)  # prompt and accepted output
        self.prompt, self.output_name = prompt, output_name
        self.model = SequenceModel(prompt, output_name)
        self.real: PagedSequence = kv.new_sequence(prompt, self.num_tokens, output_name)
        self.unsettled = False


class Pair:
    """Both sides of one pool. ``known``: sequences that hold blocks or may come back."""

    def __init__(
        self, num_blocks: int, block_size: int, *, caching: bool, blank_blocks_first: bool, track_ids: bool
    ) -> None:
        self.kv = PagedKVCache(
            num_blocks,
            block_size,
            enable_prefix_caching=caching,
            blank_blocks_first=blank_blocks_first,
            track_ids=track_ids,
        )
        self.model = BlockModel(
            num_blocks, block_size, caching=caching, blank_blocks_first=blank_blocks_first
        )
        self.track_ids = track_ids
        self.known: list[Known] = []

    # ---- operations ------------------------------------------------------------------------

    def arrive(self, prompt: Prompt, output_name: Any) -> Known:
        known = Known(self.kv, prompt, output_name)
        self.known.append(known)
        return known

    def next_turn(self, known: Known, kept: int, more: Prompt) -> Known:
        """Another's prompt as far as it has names, ``kept`` tokens of its output, and new text."""
        history = list(takewhile(lambda segment: segment[0] is not None, known.prompt))
        if len(history) == len(known.prompt) and known.output_name is not None:
            history.append((known.output_name, kept))
        return self.arrive([*history, *more], "o")

    def admit(self, known: Known, share: float, hashed: float) -> bool:
        """Take the longest hit and a share of the rest; False, and forgotten, when the blocks do not do."""
        hit = self.kv.find_hit(known.real, known.num_tokens - 1)
        blocks = self.model.find_hit(known.model, known.num_tokens - 1)
        cached = len(blocks) * self.model.block_size
        slots = cached + max(1, round(share * (known.num_tokens - cached)))
        needed = max(self._blocks(slots) - len(blocks), 0) + sum(not block.users for block in blocks)
        assert self.kv.num_blocks_needed(known.real, slots, hit) == needed
        if needed > len(self.model.free_queue):
            self.known.remove(known)
            return False
        self.kv.allocate(known.real, slots, hit)
        self.model.allocate(known.model, slots, blocks)
        self.cache(known, hashed)
        return True

    def grow(self, known: Known, more: int, hashed: float) -> None:
        """Compute more tokens, if the blocks do; prompt or output makes no difference here."""
        self.settle(known)
        slots = known.model.num_slots + more
        needed = self.kv.num_blocks_needed(known.real, slots, None)
        assert needed == self._blocks(slots) - len(known.model.table)
        if needed <= len(self.model.free_queue):
            self.kv.allocate(known.real, slots, None)
            self.model.allocate(known.model, slots)
            self.cache(known, hashed)

    def grow_together(self, group: list[Known], steps: int) -> None:
        """Advance several by a token per step, as the decode group does; who got what is settled later."""
        slots = [known.model.num_slots for known in group]
        demand = sum(self._blocks(s + steps) - self._blocks(s) for s in slots)
        if demand > len(self.model.free_queue):
            return
        self.kv.grow(demand)
        for _ in range(steps):
            for known in group:
                self.model.allocate(known.model, known.model.num_slots + 1)
        for known in group:
            known.unsettled = True

    def settle(self, known: Known) -> None:
        if known.unsettled:
            self.kv.settle(known.real, known.model.num_slots)
            known.unsettled = False

    def cache(self, known: Known, share: float) -> None:
        """Hash the full blocks of a share of the tokens."""
        self.settle(known)
        num_tokens = round(share * known.model.num_slots)
        self.kv.cache(known.real, num_tokens)
        self.model.cache(known.model, num_tokens)

    def free(self, known: Known, *, comes_back: bool) -> None:
        """A request ends, or is preempted and will come back with what it has generated."""
        self.settle(known)
        known.num_tokens = max(known.num_tokens, known.model.num_slots)
        self.kv.free(known.real)
        self.model.free(known.model)
        if not comes_back:
            self.known.remove(known)

    def drain(self) -> None:
        """Free everything, then take the whole free queue, block by block."""
        for known in [known for known in self.known if known.model.table]:
            self.free(known, comes_back=False)
            self.check()
        last = self.arrive([(None, 1)], None)
        for _ in self.model.blocks:
            self.grow(last, self.model.block_size, 0.0)
            self.check()

    def _blocks(self, slots: int) -> int:
        return -(-slots // self.model.block_size)

    # ---- what must hold after every one of them ----------------------------------------------

    def check(self) -> None:
        """Both sides agree, and each with itself."""
        kv, model = self.kv, self.model
        assert kv.num_free_blocks == len(model.free_queue)
        assert kv.pool.num_cached == model.num_cached
        assert kv.evictions == len(model.evicted)
        self._check_ownership()
        self._check_usage()
        for known in self.known:
            if not known.model.table or len(known.real.path) > 1:  # else nobody looks it up
                for num_tokens in (known.num_tokens - 1, known.num_tokens // 2, known.num_tokens + 5):
                    self._check_hit(known, num_tokens)
            if self.track_ids:
                assert kv.block_ids(known.real) == [block.number for block in known.model.table]
                self._check_spans(known)
        if self.track_ids:
            assert kv.pool.evicted_ids == model.evicted

    def _check_spans(self, known: Known) -> None:
        size, spans = self.model.block_size, self.kv.spans(known.real)
        slots = [slot for first, count in spans for slot in range(first, first + count)]
        table = [(block.number - 1) * size for block in known.model.table]
        assert slots == [slot for first in table for slot in range(first, first + size)]
        assert all(a + count != b for (a, count), (b, _) in pairwise(spans)), "neighbours make one span"

    def _check_ownership(self) -> None:
        """No block is lost or given out twice: each is free or has exactly the users that list it."""
        users = [block for known in self.known for block in known.model.table]
        for block in self.model.blocks:
            assert block.users == users.count(block)
            assert self.model.free_queue.count(block) == (block.users == 0)
        assert self.kv.num_logical_blocks == len(users)

    def _check_hit(self, known: Known, num_tokens: int) -> None:
        hit, blocks = self.kv.find_hit(known.real, num_tokens), self.model.find_hit(known.model, num_tokens)
        assert (hit is None) == (not self.model.caching)
        if hit is not None:
            assert hit.num_blocks == len(blocks)
            assert hit.num_tokens == len(blocks) * self.model.block_size
            assert hit.num_evictable == sum(not block.users for block in blocks)

    def _check_usage(self) -> None:
        size, model = self.model.block_size, self.model
        slots = sum(known.model.num_slots for known in self.known)
        waste = sum(-known.model.num_slots % size for known in self.known)
        usage = self.kv.account.usage(slots, waste, *self.kv.levels())
        assert sum(usage) - usage.logical == len(model.blocks) * size
        assert usage.logical == slots
        assert usage.tokens == sum(block.users > 0 for block in model.blocks) * size - waste
        assert (usage.internal, usage.reserved, usage.round_up, usage.holes) == (waste, 0, 0, 0)
        assert usage.cached == model.num_cached * size
        assert usage.free == sum(block.hash is None for block in model.free_queue) * size
