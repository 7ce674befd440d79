"""The paged KV cache, which handles many blocks at once, against a model that handles them one by one.

After every operation the cache must have the same hits for every sequence known, as many free, cached
and evicted blocks, and, where physical blocks are tracked, the same block tables and the same blocks evicted
in the same order. Short lives are drawn by hypothesis, which shrinks what fails; long ones at random.
"""

from __future__ import annotations

import gc
from collections import deque
from random import Random
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)
from kv_pair import Known, Pair, Prompt

from servesim.kv.block_pool import Extent
from servesim.kv.paged import PagedKVCache, PagedSequence

NAMES = ["a", "a", "b", None]
prompts = st.lists(st.tuples(st.sampled_from(NAMES), st.integers(1, 9)), min_size=1, max_size=3)
outputs = st.sampled_from(["o", None])
shares = st.floats(0, 1)


class PagedMachine(RuleBasedStateMachine):
    """Sequences come, hit, grow alone or together, are hashed up to anywhere, and leave in any order."""

    live: Bundle[Known] = Bundle("live")
    preempted: Bundle[Known] = Bundle("preempted")

    @initialize(
        num_blocks=st.integers(3, 30),
        block_size=st.sampled_from([1, 2, 3, 4]),
        caching=st.sampled_from([True, True, True, False]),
        blank_blocks_first=st.booleans(),
        track_ids=st.booleans(),
    )
    def build(self, num_blocks: int, block_size: int, **switches: bool) -> None:
        self.pair = Pair(num_blocks, block_size, **switches)

    @rule(target=live, prompt=prompts, output_name=outputs, share=shares, hashed=shares)
    def arrive(self, prompt: Prompt, output_name: Any, share: float, hashed: float) -> Any:
        return self._admit(self.pair.arrive(prompt, output_name), share, hashed)

    @rule(target=live, known=live, kept=st.integers(1, 12), more=prompts, share=shares, hashed=shares)
    def next_turn(self, known: Known, kept: int, more: Prompt, share: float, hashed: float) -> Any:
        return self._admit(self.pair.next_turn(known, kept, more), share, hashed)

    @rule(target=live, known=consumes(preempted), share=shares, hashed=shares)
    def resume(self, known: Known, share: float, hashed: float) -> Any:
        return self._admit(known, share, hashed)

    @rule(known=live, more=st.integers(1, 9), hashed=shares)
    def grow(self, known: Known, more: int, hashed: float) -> None:
        self.pair.grow(known, more, hashed)

    @precondition(lambda self: not self.pair.track_ids)
    @rule(group=st.lists(live, min_size=1, max_size=4, unique=True), steps=st.integers(1, 6))
    def grow_together(self, group: list[Known], steps: int) -> None:
        self.pair.grow_together(group, steps)

    @rule(known=live, share=shares)
    def cache(self, known: Known, share: float) -> None:
        self.pair.cache(known, share)

    @rule(target=preempted, known=consumes(live), comes_back=st.booleans())
    def free(self, known: Known, comes_back: bool) -> Any:
        self.pair.free(known, comes_back=comes_back)
        return known if comes_back else multiple()

    @invariant()
    def both_sides_agree(self) -> None:
        self.pair.check()

    def teardown(self) -> None:
        if hasattr(self, "pair"):
            self.pair.drain()

    def _admit(self, known: Known, share: float, hashed: float) -> Any:
        return known if self.pair.admit(known, share, hashed) else multiple()


TestPaged = PagedMachine.TestCase
TestPaged.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


def _one_operation(pair: Pair, rng: Random) -> None:
    """A random operation on a random sequence; often enough that full pools and old copies come about."""
    live = [known for known in pair.known if known.model.table]
    away = [known for known in pair.known if not known.model.table]
    hashed = rng.choice([0.0, 0.0, 1.0, rng.random()])
    share = rng.choice([1.0, rng.random()])
    prompt = [(rng.choice(NAMES), rng.randint(0, 9)) for _ in range(rng.randint(0, 2))]
    prompt.insert(0, (rng.choice(NAMES), rng.randint(1, 20)))
    roll = rng.random()
    if roll < 0.30 or not live:
        pair.admit(pair.arrive(prompt, rng.choice(["o", "o", None])), share, hashed)
    elif roll < 0.40:
        pair.admit(pair.next_turn(rng.choice(pair.known), rng.randint(1, 12), prompt), share, hashed)
    elif roll < 0.45 and away:
        pair.admit(rng.choice(away), share, hashed)
    elif roll < 0.60:
        pair.grow(rng.choice(live), rng.randint(1, 6), hashed)
    elif roll < 0.70 and not pair.track_ids:
        pair.grow_together(rng.sample(live, min(len(live), 3)), rng.randint(1, 5))
    elif roll < 0.80:
        pair.cache(rng.choice(live), hashed)
    else:
        pair.free(rng.choice(live), comes_back=len(away) < 3 and rng.random() < 0.3)


@pytest.mark.parametrize("seed", range(8))
def test_a_long_life_of_a_paged_cache(seed: int) -> None:
    rng = Random(seed)
    for _ in range(12):
        pair = Pair(
            rng.randint(4, 40),
            rng.randint(1, 4),
            caching=True,
            blank_blocks_first=rng.random() < 0.7,
            track_ids=rng.random() < 0.5,
        )
        for _ in range(300):
            _one_operation(pair, rng)
            pair.check()
        pair.drain()


def test_what_is_evicted_is_forgotten() -> None:
    """A beginning of a prompt that is always in use, once it was free, keeps nothing else alive."""

    def alive() -> int:
        return sum(isinstance(one, Extent) for one in gc.get_objects())

    gc.collect()
    before, num_blocks = alive(), 40
    kv = PagedKVCache(num_blocks + 1, 4, enable_prefix_caching=True)
    held = deque[PagedSequence]()
    for number in range(500):
        sequence = kv.new_sequence([("hot", 16), (number, 12)], 28, None)
        kv.allocate(sequence, 28, kv.find_hit(sequence, 27))
        kv.cache(sequence, 28)
        held.append(sequence)
        if number == 0 or len(held) > 1:
            kv.free(held.popleft())
    assert kv.evictions > 1000
    assert alive() - before <= num_blocks + 1, "one for each block and the head of the queue"
