"""Contiguous memory as a map of who owns each slot, searched slot by slot: what servesim.kv must equal.

A buddy allocator that always joins what it can has as free chunks the largest aligned ones whose slots are
all free; so its state follows from the map, too.
"""

from __future__ import annotations

from random import Random
from typing import get_args

from servesim.kv.address_space import Fit
from servesim.kv.contiguous import ContiguousKVCache, ContiguousSequence, Reservation

__all__ = ["KINDS", "POLICIES", "Live", "SlotPair", "live_on"]

FREE = 0


class Live:
    """A sequence that holds a reservation, and what the model knows about it."""

    def __init__(self, sequence: ContiguousSequence, number: int, final: int, written: int) -> None:
        self.sequence = sequence
        self.number = number
        self.final = final
        self.written = written
        self.address = self.granted = self.wanted = -1


class SlotPair:
    """A cache and its map, put through the same operations; ``check`` compares everything."""

    def __init__(self, num_slots: int, max_model_len: int, policy: Reservation, fit: Fit) -> None:
        self.kv = ContiguousKVCache(num_slots, max_model_len, policy, fit)
        self.most, self.policy, self.fit = max_model_len, policy, fit
        self.owners = bytearray(num_slots) if num_slots < 256 else [FREE] * num_slots
        self.live: list[Live] = []
        self.refused = 0
        self._numbers = list(range(min(num_slots, 255), 0, -1))

    # ---- the model -----------------------------------------------------------------------------

    def holes(self) -> list[tuple[int, int]]:
        """Free runs by address; for buddy its chunks."""
        if self.fit == "buddy":
            return self._chunks()
        found, start = [], -1
        for slot, owner in enumerate([*self.owners, 1]):
            if owner == FREE and start < 0:
                start = slot
            elif owner != FREE and start >= 0:
                found.append((start, slot - start))
                start = -1
        return found

    def _chunks(self) -> list[tuple[int, int]]:
        found, base, total = [], 0, len(self.owners)
        while base < total:
            size = 1 << (total - base).bit_length() - 1
            found += self._chunks_within(base, size)
            base += size
        return found

    def _chunks_within(self, address: int, size: int) -> list[tuple[int, int]]:
        if not any(self.owners[address : address + size]):
            return [(address, size)]
        if size == 1:
            return []
        half = size // 2
        return self._chunks_within(address, half) + self._chunks_within(address + half, half)

    def _reserved(self, prompt: int, output: int) -> int:
        """The slots reserved, in the words of the paper."""
        if self.policy == "max":
            return self.most
        if self.policy == "oracle":
            return min(prompt + output, self.most) - 1
        power = 1
        while power < output:
            power *= 2
        return min(prompt + power, self.most)

    def _granted(self, wanted: int) -> int:
        size = wanted
        while self.fit == "buddy" and size & (size - 1):
            size += 1
        return size

    # ---- operations ----------------------------------------------------------------------------

    def admit(self, prompt: int, output: int, computed: int) -> Live | None:
        """Reserve for a request, of which ``computed`` tokens are written at once; None when refused."""
        prompt = min(prompt, self.most - 1)
        sequence = self.kv.new_sequence((), prompt, None, output)
        final = prompt + min(output, self.most - prompt) - 1
        wanted, holes = self._reserved(prompt, output), self.holes()
        granted = self._granted(wanted)
        fitting = [hole for hole in holes if hole[1] >= granted]
        needed = self.kv.num_blocks_needed(sequence, prompt, None)
        assert needed == self.kv.num_blocks_to_admit(sequence, prompt, None) == granted
        assert (needed <= self.kv.num_free_blocks) == bool(fitting)
        if not fitting:
            assert self.kv.deny(needed) == (sum(size for _, size in holes) >= granted)
            self.refused = granted
            return None
        self.kv.allocate(sequence, prompt, self.kv.find_hit(sequence, prompt))
        live = Live(sequence, self._numbers.pop(), final, min(computed, final))
        live.address = min(fitting, key=lambda hole: (hole[1] if self.fit != "first" else 0, hole[0]))[0]
        live.granted, live.wanted = granted, wanted
        self._paint(live, live.number)
        self.live.append(live)
        assert self.kv.final_waste(sequence, final) == (wanted - final, 0)
        return live

    def write(self, live: Live, more: int) -> None:
        """Compute more tokens of a request: never a reason to allocate."""
        live.written = min(live.written + more, live.final)
        assert self.kv.num_blocks_needed(live.sequence, live.written, None) == 0
        self.kv.allocate(live.sequence, live.written, None)

    def free(self, live: Live) -> None:
        """A request ends."""
        self.kv.free(live.sequence)
        assert self.kv.spans(live.sequence) == []
        self._paint(live, FREE)
        self._numbers.append(live.number)
        self.live.remove(live)

    def _paint(self, live: Live, owner: int) -> None:
        for slot in range(live.address, live.address + live.granted):
            assert (self.owners[slot] == FREE) == (owner != FREE), "a slot is given out twice"
            self.owners[slot] = owner
        self.refused = 0

    # ---- what must hold after every one of them ------------------------------------------------

    def check(self) -> None:
        """Both sides have the same holes and owners; the classes count every slot once."""
        kv, holes = self.kv, self.holes()
        assert sorted(kv.space.holes()) == sorted(holes)
        assert kv.hole_sizes() == [size for _, size in sorted(holes)]
        assert kv.num_free_blocks == max((size for _, size in holes), default=0)
        for live in self.live:
            assert kv.spans(live.sequence) == [(live.address, live.granted)]
        self._check_classes(holes)

    def _check_classes(self, holes: list[tuple[int, int]]) -> None:
        written = sum(live.written for live in self.live)
        waste = sum(live.wanted - live.final for live in self.live)
        usage = self.kv.account.usage(written, waste, *self.kv.levels())
        free = self.owners.count(FREE)
        assert min(usage) >= 0
        assert sum(usage) - usage.logical == len(self.owners)
        assert (usage.tokens, usage.logical, usage.internal, usage.cached) == (written, written, waste, 0)
        assert usage.reserved == sum(live.final - live.written for live in self.live)
        assert usage.round_up == sum(live.granted - live.wanted for live in self.live)
        assert usage.holes + usage.free == free == self.kv.space.num_free
        if self.refused:
            assert usage.holes == sum(size for _, size in holes if size < self.refused)
        elif self.policy == "max":
            whole = self._granted(self.most)
            assert usage.free == sum(size // whole * whole for _, size in holes)
        else:
            assert usage.holes == 0


def live_on(pair: SlotPair, rng: Random) -> None:
    """One random operation, in a pool that is nearly full most of the time."""
    roll = rng.random()
    if not pair.live or (roll < 0.5 and len(pair.live) < 200):
        output = min(int(rng.expovariate(4 / pair.most)) + 1, 2 * pair.most)
        pair.admit(rng.randint(1, max(1, pair.most // 3)), output, rng.randint(0, pair.most))
    elif roll < 0.6:
        pair.write(rng.choice(pair.live), rng.randint(1, 5))
    else:
        pair.free(rng.choice(pair.live))


POLICIES: tuple[Reservation, ...] = get_args(Reservation)
KINDS: tuple[Fit, ...] = get_args(Fit)
