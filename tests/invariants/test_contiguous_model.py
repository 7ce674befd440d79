"""Contiguous memory against a map of its slots, after every operation: no slot is lost or given out twice.

Short lives are drawn by hypothesis, longer ones at random; tests/benchmarks/allocators.py does a million
operations.
"""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule
from slot_model import KINDS, POLICIES, Live, SlotPair, live_on

from servesim.kv.address_space import Buddy, Fit
from servesim.kv.contiguous import Reservation

lengths = st.integers(1, 40)


class ContiguousMachine(RuleBasedStateMachine):
    """Reservations come, are written to, and go, in any order."""

    live: Bundle[Live] = Bundle("live")

    @initialize(
        num_slots=st.integers(2, 120),
        max_model_len=st.integers(2, 40),
        policy=st.sampled_from(POLICIES),
        fit=st.sampled_from(KINDS),
    )
    def build(self, num_slots: int, max_model_len: int, policy: Reservation, fit: Fit) -> None:
        self.pair = SlotPair(num_slots, max_model_len, policy, fit)

    @rule(target=live, prompt=lengths, output=lengths, computed=lengths)
    def admit(self, prompt: int, output: int, computed: int) -> Any:
        return self.pair.admit(prompt, output, computed) or multiple()

    @rule(live=live, more=lengths)
    def write(self, live: Live, more: int) -> None:
        self.pair.write(live, more)

    @rule(live=consumes(live))
    def free(self, live: Live) -> None:
        self.pair.free(live)

    @invariant()
    def both_sides_agree(self) -> None:
        if hasattr(self, "pair"):
            self.pair.check()

    def teardown(self) -> None:
        if hasattr(self, "pair"):
            for live in list(self.pair.live):
                self.pair.free(live)
            self.pair.check()
            assert self.pair.kv.space.num_free == len(self.pair.owners), "everything comes back"


TestContiguous = ContiguousMachine.TestCase
TestContiguous.settings = settings(max_examples=120, stateful_step_count=50, deadline=None)


@pytest.mark.parametrize("fit", KINDS)
@pytest.mark.parametrize("policy", POLICIES)
def test_a_long_life_of_contiguous_memory(policy: Reservation, fit: Fit) -> None:
    rng = Random(f"{policy} {fit}")
    pair = SlotPair(231, 60, policy, fit)
    refused = 0
    for _ in range(2500):
        live_on(pair, rng)
        pair.check()
        refused += bool(pair.refused)
    assert refused > 100, "the pool must be full now and then"


def test_a_buddy_pool_of_any_size_holds_what_its_binary_digits_allow() -> None:
    """The paper's pool of 15.7K slots takes seven chunks of 2,048, and 8.9 % are left over."""
    space = Buddy(15_728)
    addresses = []
    while space.largest_hole >= 2048:
        addresses.append(space.allocate(2048))
    assert sorted(addresses) == [2048 * i for i in range(7)]
    assert space.num_free / 15_728 == pytest.approx(0.0885, abs=1e-4)
    for address in addresses:
        space.free(address, 2048)
    assert sorted(space.holes()) == sorted(Buddy(15_728).holes())
