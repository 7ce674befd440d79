"""Who serves the next request: the policies of a router in front of replicas.

A policy is asked at the instant at which a request arrives, and sees the replicas as they are then.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Hashable, Sequence
from itertools import accumulate
from typing import Any

from servesim.config.scenario import Router
from servesim.engine.scheduler import Scheduler
from servesim.kv.base import Usage
from servesim.workload.request import Request
from servesim.workload.streams import Column, Stream

__all__ = ["BLIND", "Members", "Route", "build_route", "held_tokens", "outstanding"]

Route = Callable[[Request], int]

BLIND: tuple[Router, ...] = ("round-robin", "random")
"""Routers that look at no replica: what each gets is known in advance."""

# Prefix affinity as SGLang's model gateway does it, with its defaults (lightseekorg/smg,
# docs/getting-started/load-balancing.md): the best match, if it covers this share of the prompt, unless the
# loads differ by more than both thresholds.
_LEAST_MATCH = 0.3
_MOST_DIFFERENCE = 64
_MOST_RATIO = 1.5


class Members:
    """The replicas among which a router chooses, by number; a closed one gets no requests.

    ``weights`` say how many requests each is meant for, beside the others; with 0 it is no member.
    ``schedulers`` are needed by routers that look at the replicas.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self.weights = list(weights)
        self.are_equal = len({weight for weight in weights if weight}) < 2
        self.schedulers: list[Any] = [None] * len(self.weights)
        self.open = [number for number, weight in enumerate(weights) if weight]  # rising
        self.lives = [0] * len(self.weights)
        """How often each has begun anew, with an empty cache."""

    def join(self, number: int, scheduler: Scheduler) -> None:
        """A replica takes requests from now on."""
        if self.schedulers[number] is not scheduler:
            self.schedulers[number] = scheduler
            self.lives[number] += 1
        if not self.is_open(number):
            insort(self.open, number)

    def leave(self, number: int) -> None:
        """A replica takes no more requests."""
        if self.is_open(number):
            del self.open[bisect_left(self.open, number)]

    def is_open(self, number: int) -> bool:
        """Whether a replica gets requests."""
        place = bisect_left(self.open, number)
        return place < len(self.open) and self.open[place] == number


def build_route(router: Router, members: Members, seed: int) -> Route:
    """The policy over these replicas, one of which must be open; ties go to the first of them in turn."""
    match router:
        case "round-robin":
            return _RoundRobin(members)
        case "random":
            return _Random(members, seed)
        case "least-outstanding":
            return _Least(members, outstanding)
        case "least-kv":
            return _Least(members, held_tokens)
        case "prefix-affinity":
            return _PrefixAffinity(members)


def _first_from(number: int, among: Sequence[int]) -> int:
    """The next of some replicas, whose numbers rise, from ``number`` on."""
    return next((one for one in among if one >= number), among[0])


def outstanding(scheduler: Scheduler) -> int:
    """Requests that have not ended."""
    return scheduler.num_unfinished


def held_tokens(scheduler: Scheduler) -> int:
    """Token slots that are allocated to requests."""
    usage = scheduler.kv.account.usage(*scheduler.levels())
    assert isinstance(usage, Usage)
    return usage.tokens + usage.reserved + usage.internal + usage.round_up


class _Random:
    """Any, as often as it is meant to."""

    def __init__(self, members: Members, seed: int) -> None:
        self._members = members
        self._draws = Column[float](Stream(seed, "routing").uniforms)

    def __call__(self, request: Request) -> int:
        members, draw = self._members, self._draws[request.index]
        if members.are_equal:
            return members.open[int(draw * len(members.open))]
        sums = list(accumulate(members.weights[one] for one in members.open))
        return members.open[bisect_right(sums, draw * sums[-1])]


class _RoundRobin:
    """Each in turn; with weights the one that is farthest behind its share (as nginx does it)."""

    def __init__(self, members: Members) -> None:
        self._members, self._next = members, 0
        self._credit = [0.0] * len(members.weights)

    def __call__(self, request: Request) -> int:
        if not self._members.are_equal:
            return self._by_weight()
        chosen, count = self._next, len(self._members.schedulers)
        if len(self._members.open) < count:
            chosen = _first_from(chosen, self._members.open)
        self._next = (chosen + 1) % count
        return chosen

    def _by_weight(self) -> int:
        members, credit = self._members, self._credit
        for one in members.open:
            credit[one] += members.weights[one]
        chosen = max(members.open, key=lambda one: credit[one])
        credit[chosen] -= sum(members.weights[one] for one in members.open)
        return chosen


class _Least:
    """The replica with the least of something for its weight; of equals the next in turn, so that none is
    preferred."""

    def __init__(self, members: Members, amount: Callable[[Scheduler], int]) -> None:
        self._members, self._amount, self._next = members, amount, 0

    def __call__(self, request: Request) -> int:
        members, schedulers = self._members, self._members.schedulers
        amounts: list[float] = [self._amount(schedulers[one]) for one in members.open]
        if not members.are_equal:
            shares = zip(members.open, amounts, strict=True)
            amounts = [(amount + 1) / members.weights[one] for one, amount in shares]
        least = min(amounts)
        equals = [one for one, amount in zip(members.open, amounts, strict=True) if amount == least]
        chosen = _first_from(self._next, equals)
        self._next = (chosen + 1) % len(schedulers)
        return chosen


class _PrefixAffinity:
    """Remembers to which replica each piece of text was sent last, for as long as that lives."""

    def __init__(self, members: Members) -> None:
        self._members = members
        self._least = _Least(members, outstanding)
        self._sent: dict[Hashable, tuple[int, int]] = {}  # the replica and which of its lives

    def __call__(self, request: Request) -> int:
        chosen = self._match(request)
        if chosen is None or self._is_unbalanced():
            chosen = self._least(request)
        life = (chosen, self._members.lives[chosen])
        for name, _ in request.prompt:
            if name is not None:
                self._sent[name] = life
        if request.output_name is not None:
            self._sent[request.output_name] = life
        return chosen

    def _match(self, request: Request) -> int | None:
        """Who was sent the longest beginning of the prompt; None when it is too short to count."""
        found, matched = None, 0
        for name, num_tokens in request.prompt:
            holder = None if name is None else self._sent.get(name)
            if holder is None or (found is not None and holder != found):
                break
            found, matched = holder, matched + num_tokens
        if found is None or matched <= _LEAST_MATCH * request.prompt_tokens:
            return None
        number, life = found
        members = self._members
        return number if members.is_open(number) and life == members.lives[number] else None

    def _is_unbalanced(self) -> bool:
        members = self._members
        amounts = [outstanding(members.schedulers[one]) for one in members.open]
        least, most = min(amounts), max(amounts)
        return most - least > _MOST_DIFFERENCE and most > _MOST_RATIO * least
