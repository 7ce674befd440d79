"""All requests that decode in step with one another, advanced together.

In a decode step every member's context grows by one. So nothing is stored per member per step: a member's
computed tokens are ``tick + offset``, finishes wait in a heap keyed by tick, blocks are demanded by the
members whose offset has the right phase, and context sums move by the number of members.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush

from servesim.engine.state import RequestState

__all__ = ["DecodeGroup"]


class _ClippedContext:
    """Sum over members of min(context, window), maintained as members cross the window."""

    def __init__(self, window: int) -> None:
        self.window = window
        self.growing = 0  # members whose context is below the window
        self._growing_offsets = 0
        self._full = 0
        self._crossings: list[tuple[int, int]] = []  # (tick at which the context reaches the window, offset)

    def add(self, offset: int, tick: int, final_slots: int) -> None:
        """Count a member in."""
        if tick + offset >= self.window:
            self._full += 1
            return
        self.growing += 1
        self._growing_offsets += offset
        if final_slots >= self.window:
            heappush(self._crossings, (self.window - offset, offset))

    def remove(self, offset: int, tick: int) -> None:
        """Count a finished member out."""
        self.advance(tick)
        if tick + offset >= self.window:
            self._full -= 1
        else:
            self.growing -= 1
            self._growing_offsets -= offset

    def advance(self, tick: int) -> None:
        """Move members that have reached the window."""
        while self._crossings and self._crossings[0][0] <= tick:
            _, offset = heappop(self._crossings)
            self.growing -= 1
            self._growing_offsets -= offset
            self._full += 1

    def total(self, tick: int) -> int:
        """The sum at a tick up to which advance was called."""
        return self.growing * tick + self._growing_offsets + self._full * self.window

    def steps_to_crossing(self, tick: int) -> int | None:
        """Steps after which the next member reaches the window."""
        return self._crossings[0][0] - tick if self._crossings else None


class DecodeGroup:
    """Members, the tick they share, and what follows from it."""

    def __init__(self, windows: Sequence[int | None], growth_block_size: int | None) -> None:
        self._windows = tuple(windows)
        self._block_size = growth_block_size
        self.has_windows = any(window is not None for window in windows)
        self.clear()

    def clear(self) -> None:
        """Forget all members."""
        self.members: dict[RequestState, None] = {}
        self.tick = 0
        self._offsets = 0
        self._serial = 0
        self._finishes: list[tuple[int, int, RequestState]] = []
        self._phases = [0] * (self._block_size or 1)
        self._clipped = {w: _ClippedContext(w) for w in self._windows if w is not None}
        self.final_waste = 0
        self._wastes: list[tuple[int, int]] = []  # (tick from which they are held, slots)

    def __len__(self) -> int:
        return len(self.members)

    def join(self, request: RequestState) -> None:
        """Add a request that needs one token per step from now on."""
        offset = request.num_computed_tokens - self.tick
        request.offset, request.grouped = offset, True
        self.members[request] = None
        self._offsets += offset
        self._serial += 1
        heappush(self._finishes, (request.final_slots - offset, self._serial, request))
        if self._block_size is not None:
            self._phases[-offset % self._block_size] += 1
        if self.has_windows:
            for clipped in self._clipped.values():
                clipped.add(offset, self.tick, request.final_slots)
        if request.final_waste:
            heappush(self._wastes, (request.waste_from_slot - offset, request.final_waste))
            self._admit_waste()

    def computed_tokens(self) -> int:
        """Sum of the members' computed tokens: the KV tokens they hold."""
        return len(self.members) * self.tick + self._offsets

    def context_tokens(self) -> tuple[int, ...]:
        """Sum of attended KV tokens, by attention window."""
        if not self.has_windows:
            return (self.computed_tokens(),)
        return tuple(
            self.computed_tokens() if w is None else self._clipped[w].total(self.tick) for w in self._windows
        )

    def next_contexts(self) -> tuple[int, ...]:
        """Sum of the KV tokens that the next step attends to, by attention window."""
        if not self.has_windows:
            return (len(self.members) * (self.tick + 1) + self._offsets,)
        return tuple(c + g for c, g in zip(self.context_tokens(), self.context_growth(), strict=True))

    def context_growth(self) -> tuple[int, ...]:
        """What a step adds to context_tokens."""
        if not self.has_windows:
            return (len(self.members),)
        return tuple(len(self.members) if w is None else self._clipped[w].growing for w in self._windows)

    def blocks_demanded(self, steps: int) -> int:
        """New blocks that the next steps take in all."""
        size = self._block_size
        if size is None:
            return 0
        phase = self.tick % size
        if steps == 1:
            return self._phases[phase]
        if phase + steps <= size:
            return sum(self._phases[phase : phase + steps])
        cycles, rest = divmod(steps, size)
        end = phase + rest
        demand = sum(self._phases[phase:end])
        if end > size:
            demand += sum(self._phases[: end - size])
        return demand + cycles * len(self.members) if cycles else demand

    def steps_within(self, num_free_blocks: int) -> int:
        """Steps that the free blocks certainly allow."""
        size, count = self._block_size, len(self.members)
        if size is None or not count:
            return 1 << 60
        if num_free_blocks >= count:
            return num_free_blocks // count * size
        for steps in range(size):
            num_free_blocks -= self._phases[(self.tick + steps) % size]
            if num_free_blocks < 0:
                return steps
        return size

    def steps_to_finish(self) -> int:
        """Steps until the first member yields its last token."""
        return self._finishes[0][0] - self.tick if self._finishes else 1 << 60

    def steps_to_crossing(self) -> int:
        """Steps until a member's context reaches an attention window."""
        steps = (c.steps_to_crossing(self.tick) for c in self._clipped.values())
        return min((s for s in steps if s is not None), default=1 << 60)

    def advance(self, steps: int) -> list[RequestState]:
        """Compute a token per member and step; members that reach their last slot leave and are returned."""
        self.pass_steps(steps)
        return self.pop_ended()

    def pass_steps(self, steps: int) -> None:
        """Compute a token per member and step; nobody may go beyond the last slot."""
        self.tick += steps
        if self.has_windows:
            for clipped in self._clipped.values():
                clipped.advance(self.tick)
        if self._wastes and self._wastes[0][0] <= self.tick:
            self._admit_waste()

    def pop_ended(self) -> list[RequestState]:
        """The members that have reached their last slot; they leave."""
        ended, finishes, tick = [], self._finishes, self.tick
        while finishes and finishes[0][0] <= tick:
            request = heappop(finishes)[2]
            self._remove(request)
            ended.append(request)
        return ended

    def _admit_waste(self) -> None:
        while self._wastes and self._wastes[0][0] <= self.tick:
            self.final_waste += heappop(self._wastes)[1]

    def _remove(self, request: RequestState) -> None:
        offset = request.offset
        del self.members[request]
        self._offsets -= offset
        if self._block_size is not None:
            self._phases[-offset % self._block_size] -= 1
        if self.has_windows:
            for clipped in self._clipped.values():
                clipped.remove(offset, self.tick)
        self.final_waste -= request.final_waste
        request.grouped = False
        request.num_computed_tokens = self.tick + offset
