"""Forked KV against memory written token by token: every sequence must read back what it wrote.

The model knows no blocks: a request is ``width`` lists of tokens. What the cache must hold follows from them:
one block for every distinct run of tokens that ends at a block's edge or at a sequence's end. Blocks are also
written and read through the tables that the cache gives, so that a block handed out twice, freed too early or
not copied before a write shows as a wrong token. Short lives are drawn by hypothesis, long ones at random.
"""

from __future__ import annotations

import os
from itertools import count
from random import Random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from servesim.kv.forked import ForkedKVCache, ForkedSequence
from servesim.kv.host import SwapSpace


class Group:
    """A request: what its sequences have written, and the real one."""

    def __init__(self, sequence: ForkedSequence) -> None:
        self.sequence = sequence
        self.tokens: list[list[int]] = []  # one list while the prompt is computed, then one per sequence
        self.on_host = False


class Forks:
    """A cache, a swap space, and the tokens that they should hold; every operation checks everything."""

    def __init__(self, num_blocks: int, block_size: int, width: int, host_blocks: int) -> None:
        self.kv = ForkedKVCache(num_blocks, block_size, width)
        self.space = SwapSpace(host_blocks, host_blocks // 2)
        self.num_blocks, self.size, self.width = num_blocks, block_size, width
        self.memory: dict[tuple[int, int], int] = {}  # (block, place in it): token
        self.groups: list[Group] = []
        self.serials = count()

    def arrive(self, prompt_tokens: int) -> None:
        self.groups.append(Group(self.kv.new_sequence((), prompt_tokens, None)))

    def grow(self, group: Group, more: int) -> bool:
        """Compute ``more`` tokens if there is room; returns whether there was."""
        kv, sequence = self.kv, group.sequence
        before, free = sequence.num_slots, kv.num_free_blocks
        needed = kv.num_blocks_needed(sequence, before + more, None)
        if needed > free:
            return False
        kv.allocate(sequence, before + more, None)
        assert free - kv.num_free_blocks == needed
        if group.on_host:
            assert self.space.take(group)
            group.on_host = False
        for _ in range(more):
            if before == sequence.prompt_tokens and len(group.tokens) == 1:
                group.tokens = [list(group.tokens[0]) for _ in range(self.width)]
            elif not group.tokens:
                group.tokens = [[]]
            for tokens in group.tokens:
                tokens.append(next(self.serials))
            before += 1
        self._write(group)
        return True

    def _write(self, group: Group) -> None:
        """Write what is new, what was just copied, and what has just come back from the host."""
        for table, tokens in zip(self.kv.block_ids(group.sequence), group.tokens, strict=True):
            for place in range(self._first_unwritten(table, tokens), len(tokens)):
                self.memory[table[place // self.size], place % self.size] = tokens[place]

    def _first_unwritten(self, table: list[int], tokens: list[int]) -> int:
        for place, token in enumerate(tokens):
            if self.memory.get((table[place // self.size], place % self.size)) != token:
                return place
        return len(tokens)

    def branch(self, group: Group, parents: list[int]) -> None:
        self.kv.branch(group.sequence, parents)
        group.tokens = [list(group.tokens[parent]) for parent in parents]

    def free(self, group: Group, *, comes_back: bool) -> None:
        if group.on_host:
            self.space.take(group)
            group.on_host = False
        self.kv.free(group.sequence)
        group.tokens = []
        if not comes_back:
            self.groups.remove(group)

    def suspend(self, group: Group) -> None:
        sequence = group.sequence
        if not self.space.has_room(sequence.num_blocks):
            return
        free, used = self.kv.num_free_blocks, sum(self.space.used)
        moved = self.kv.suspend(sequence)
        assert sum(self.space.put(group, moved)) == moved
        assert self.kv.num_free_blocks - free == moved == sum(self.space.used) - used
        group.on_host = True

    def check(self) -> None:
        """Contents, conservation on GPU and host, sharing, and the classes of slots."""
        held: set[int] = set()
        tokens = logical = empty = on_host = 0
        for group in self.groups:
            runs, filled = set(), {}
            for sequence in group.tokens:
                for end in range(self.size, len(sequence) + self.size, self.size):
                    run = tuple(sequence[:end])
                    runs.add(run)
                    filled[run] = len(run) - (end - self.size)
            assert group.sequence.num_blocks == len(runs), "one block for every distinct run of tokens"
            if group.on_host:
                on_host += len(runs)
                assert self.kv.spans(group.sequence) == []
                continue
            assert sum(slots for _, slots in self.kv.spans(group.sequence)) == len(runs) * self.size
            tables = self.kv.block_ids(group.sequence)
            mine = {block for table in tables for block in table}
            assert len(mine) == len(runs)
            assert not mine & held, "no block belongs to two requests"
            held |= mine
            for table, sequence in zip(tables, group.tokens, strict=True):
                assert len(table) == -(-len(sequence) // self.size)
                for place, token in enumerate(sequence):
                    assert self.memory[table[place // self.size], place % self.size] == token
            tokens += sum(filled.values())
            empty += sum(self.size - slots for slots in filled.values())
            logical += self.width * (len(group.tokens[0]) if group.tokens else 0)
        assert 0 not in held, "block 0 is never handed out"
        assert len(held) + self.kv.num_free_blocks == self.num_blocks - 1, "no leak"
        assert sum(self.space.used) == on_host, "what left the GPU is on the host"
        assert all(used <= size for used, size in zip(self.space.used, self.space.size, strict=True))
        usage = self.kv.account.usage(0, 0, *self.kv.levels())
        assert usage.tokens == tokens
        assert usage.reserved == empty
        assert usage.logical == logical
        assert sum(usage) - usage.logical == (self.num_blocks - 1) * self.size


class ForkedMachine(RuleBasedStateMachine):
    """Requests come, grow, branch, are swapped out and back, recompute, and leave in any order."""

    @initialize(
        num_blocks=st.integers(4, 60),
        block_size=st.integers(1, 4),
        width=st.integers(1, 5),
        host_blocks=st.integers(0, 20),
    )
    def build(self, **sizes: int) -> None:
        self.forks = Forks(**sizes)

    def _some(self, draw: int, *, on_host: bool | None = None) -> Group | None:
        groups = [g for g in self.forks.groups if on_host is None or g.on_host == on_host]
        return groups[draw % len(groups)] if groups else None

    @rule(prompt_tokens=st.integers(1, 9))
    def arrive(self, prompt_tokens: int) -> None:
        self.forks.arrive(prompt_tokens)

    @precondition(lambda self: self.forks.groups)
    @rule(draw=st.integers(0, 99), more=st.integers(1, 12))
    def grow(self, draw: int, more: int) -> None:
        group = self._some(draw)
        assert group is not None
        self.forks.grow(group, more)

    @rule(draw=st.integers(0, 99), parents=st.lists(st.integers(0, 99), min_size=5, max_size=5))
    def branch(self, draw: int, parents: list[int]) -> None:
        group = self._some(draw, on_host=False)
        width = self.forks.width
        if group is not None and len(group.tokens) == width and len(group.tokens[0]) > 0:
            self.forks.branch(group, [parent % width for parent in parents[:width]])

    @rule(draw=st.integers(0, 99))
    def suspend(self, draw: int) -> None:
        group = self._some(draw, on_host=False)
        if group is not None and group.tokens:
            self.forks.suspend(group)

    @rule(draw=st.integers(0, 99), comes_back=st.booleans())
    def free(self, draw: int, comes_back: bool) -> None:
        group = self._some(draw)
        if group is not None:
            self.forks.free(group, comes_back=comes_back)

    @invariant()
    def agrees(self) -> None:
        if hasattr(self, "forks"):
            self.forks.check()


TestForkedMachine = ForkedMachine.TestCase
TestForkedMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("seed", range(4))
def test_long_lives(seed: int) -> None:
    """Many more operations than hypothesis draws; SERVESIM_LONG_RUN=1 makes it a million in all."""
    random = Random(seed)
    operations = 250_000 if os.environ.get("SERVESIM_LONG_RUN") else 1_500
    forks = Forks(random.randint(20, 60), random.randint(1, 5), random.randint(1, 5), random.randint(0, 30))
    for _ in range(operations):
        if len(forks.groups) < 5 and random.random() < 0.3:
            forks.arrive(random.randint(1, 12))
        elif forks.groups:
            group, luck = random.choice(forks.groups), random.random()
            if luck < 0.6:
                if not forks.grow(group, random.choice([1, 1, 1, 1, 5])) and random.random() < 0.5:
                    forks.free(random.choice(forks.groups), comes_back=random.random() < 0.5)
            elif luck < 0.85:
                if not group.on_host and len(group.tokens) == forks.width:
                    forks.branch(group, random.choices(range(forks.width), k=forks.width))
            elif luck < 0.95:
                if not group.on_host and group.tokens:
                    forks.suspend(group)
            else:
                forks.free(group, comes_back=random.random() < 0.3)
        forks.check()
    assert forks.kv.num_copies > 0 or forks.width == 1 or forks.size == 1
