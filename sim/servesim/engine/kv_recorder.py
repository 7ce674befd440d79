"""Who holds which slots of the KV pool, from when to when: what the memory map is drawn from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import nan
from typing import Any, NamedTuple

from servesim.engine.scheduler import Scheduler
from servesim.engine.state import Plan, RequestState
from servesim.kv.base import KVCacheManager, PrefixHit

__all__ = ["Holding", "KvRecorder", "Moment", "Stay"]


class Moment(NamedTuple):
    """The begin of a step (the log tells when that was), or a time in simulated seconds (``step`` -1)."""

    step: int
    time_s: float = nan


@dataclass(slots=True)
class Holding:
    """A run of slots that one request holds; ``offset`` is the place of its first token in the request.

    ``end`` None: held to the end of the recording. ``cached``: it stayed in the prefix cache when given back.
    """

    request: int
    address: int
    slots: int
    offset: int
    begin: Moment
    end: Moment | None = None
    cached: bool = False


@dataclass(slots=True)
class Stay:
    """A request's lengths and how its written tokens grew: (moment, tokens) where the pace changes.

    As in the log, what a step writes counts from its begin.
    """

    request: int
    prompt_tokens: int
    final_slots: int
    written: list[tuple[Moment, int]] = field(default_factory=list)
    preemptions: list[Moment] = field(default_factory=list)


@dataclass(slots=True)
class _Live:
    """What the recorder keeps about a sequence that holds memory."""

    stay: Stay
    held: dict[int, Holding] = field(default_factory=dict)  # by address
    pace: tuple[int, int] = (-2, 0)  # last step and tokens of the run of equal steps that is being extended


_PROTOCOL = frozenset(dir(KVCacheManager))


class KvRecorder:
    """Stands between a scheduler and its KV manager and notes every change of hands.

    The scheduler must plan one by one, over a manager that knows where its blocks lie.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._kv = scheduler.kv
        self._unit = self._kv.growth_block_size
        self._live: dict[int, _Live] = {}  # by id of the sequence
        self._now = Moment(0)
        self._ended_s = 0.0
        self.holdings: list[Holding] = []
        self.stays: list[Stay] = []
        self._hook(scheduler)

    @property
    def now_s(self) -> float:
        """When the last step ended."""
        return self._ended_s

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._kv, name)
        return value if name in _PROTOCOL or not callable(value) else self._followed(value)

    def _followed(self, act: Callable[..., Any]) -> Callable[..., Any]:
        """An act beyond the protocol (a fork, a swap), with a look at the sequence it was done to."""

        def then_look(*arguments: Any, **named: Any) -> Any:
            result = act(*arguments, **named)
            if arguments and id(arguments[0]) in self._live:
                self._look(arguments[0])
            return result

        return then_look

    # ---- the KV manager's calls that change hands ------------------------------------------------

    def allocate(self, sequence: Any, num_slots: int, hit: PrefixHit | None) -> None:
        """Allocate, and see what is new."""
        before, is_new = self._kv.num_free_blocks, not self._live[id(sequence)].held
        self._kv.allocate(sequence, num_slots, hit)
        if is_new or hit is not None or self._kv.num_free_blocks != before:
            self._look(sequence)

    def release(self, sequence: Any, num_processed_tokens: int) -> None:
        """Release, and see what was given back."""
        before = self._kv.num_free_blocks
        self._kv.release(sequence, num_processed_tokens)
        if self._kv.num_free_blocks != before:
            self._look(sequence)

    def free(self, sequence: Any) -> None:
        """Free; what is cached stays hit-able."""
        cached_spans = getattr(self._kv, "cached_spans", None)
        kept = {address for address, _, _ in self._units(cached_spans(sequence))} if cached_spans else set()
        self._kv.free(sequence)
        live = self._live[id(sequence)]
        for holding in live.held.values():
            self._close(holding, holding.address in kept)
        live.held = {}

    # ---- the scheduler's calls that tell the time ------------------------------------------------

    def _hook(self, scheduler: Scheduler) -> None:
        add, make_plan, process = scheduler.add, scheduler.plan, scheduler.commit

        def noted_add(request: Any) -> RequestState:
            state = add(request)
            stay = Stay(request.index, request.prompt_tokens, state.final_slots)
            self.stays.append(stay)
            self._live[id(state.sequence)] = _Live(stay)
            return state

        def noted_plan() -> Plan | None:
            self._now = Moment(scheduler.step)
            plan = make_plan()
            if plan is not None:
                self._note_progress(plan)
            return plan

        def noted_commit(plan: Plan, end_s: float, num_steps: int = 1) -> tuple[int, list[float]]:
            self._now, self._ended_s = Moment(-1, end_s), end_s
            result = process(plan, end_s, num_steps)
            for request in plan.finishing:
                self._live.pop(id(request.sequence), None)
            return result

        hooks = {"kv": self, "add": noted_add, "plan": noted_plan, "commit": noted_commit}
        for name, hook in hooks.items():
            setattr(scheduler, name, hook)

    def _note_progress(self, plan: Plan) -> None:
        step = plan.step
        for request in plan.preempted:
            self._live[id(request.sequence)].stay.preemptions.append(self._now)
        for request, tokens, before in plan.scheduled:
            live = self._live[id(request.sequence)]
            written, computed = live.stay.written, before + tokens
            goes_on = live.pace == (step - 1, before) and tokens == 1 and len(written) > 1
            if goes_on and written[-1][1] - written[-2][1] == written[-1][0].step - written[-2][0].step:
                written.pop()
            elif live.pace != (step - 1, before):
                written.append((self._now, before))
            written.append((self._now, computed))
            live.pace = (step, computed)

    # ---- holdings --------------------------------------------------------------------------------

    def _units(self, spans: list[tuple[int, int]]) -> list[tuple[int, int, int]]:
        """(address, slots, offset) of every block of the spans, or of every span when there are no blocks."""
        found, offset = [], 0
        for address, slots in spans:
            unit = self._unit or slots
            if address >= 0:
                found += [(address + at, unit, offset + at) for at in range(0, slots, unit)]
            offset += slots
        return found

    def _place(self, sequence: Any, stay: Stay, spans: list[tuple[int, int]]) -> Callable[[int], int]:
        """From a place in the spans to the place of its token in the request.

        A sequence of several groups of layers has as many tables of one length. Branches of a request have
        more blocks than its tokens: which token lies where is not told, and they all count as its first ones.
        """
        if self._unit is None:
            return lambda offset: offset
        tables = len(sequence) if isinstance(sequence, tuple) else 1
        length = sum(slots for _, slots in spans) // tables
        if length > stay.final_slots + 2 * self._unit:
            return lambda offset: 0
        return lambda offset: offset % length

    def _look(self, sequence: Any) -> None:
        live = self._live[id(sequence)]
        spans = self._kv.spans(sequence)
        seen, place = self._units(spans), self._place(sequence, live.stay, spans)
        now_held = {address for address, _, _ in seen}
        for address in [address for address in live.held if address not in now_held]:
            self._close(live.held.pop(address), False)
        for address, slots, offset in seen:
            if address not in live.held:
                holding = Holding(live.stay.request, address, slots, place(offset), self._now)
                live.held[address] = holding
                self.holdings.append(holding)

    def _close(self, holding: Holding, cached: bool) -> None:
        holding.end, holding.cached = self._now, cached
