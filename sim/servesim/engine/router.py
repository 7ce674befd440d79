"""Who serves the next request: the policies of a router in front of equal replicas.

A policy is asked at the instant at which a request arrives, and sees the replicas as they are then.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Sequence

from servesim.config.scenario import Router
from servesim.engine.scheduler import Scheduler
from servesim.kv.base import Usage
from servesim.workload.request import Request
from servesim.workload.streams import Column, Stream

__all__ = ["BLIND", "Route", "blind_route", "build_route"]

Route = Callable[[Request], int]

BLIND: tuple[Router, ...] = ("round-robin", "random")
"""Routers that look at no replica: what each gets is known in advance."""

# Prefix affinity as SGLang's model gateway does it, with its defaults (lightseekorg/smg,
# docs/getting-started/load-balancing.md): the best match, if it covers this share of the prompt, unless the
# loads differ by more than both thresholds.
_LEAST_MATCH = 0.3
_MOST_DIFFERENCE = 64
_MOST_RATIO = 1.5


def build_route(router: Router, schedulers: Sequence[Scheduler], seed: int) -> Route:
    """The policy over these replicas; ties go to the first of them in turn."""
    match router:
        case "least-outstanding":
            return _Least(schedulers, _outstanding)
        case "least-kv":
            return _Least(schedulers, _held_tokens)
        case "prefix-affinity":
            return _PrefixAffinity(schedulers)
        case _:
            return blind_route(router, len(schedulers), seed)


def blind_route(router: Router, replicas: int, seed: int) -> Route:
    """A policy that needs to see no replica."""
    if router == "round-robin":
        turns = itertools.cycle(range(replicas))
        return lambda request: next(turns)
    stream = Stream(seed, "routing")
    draws = Column[int](lambda start, count: (stream.uniforms(start, count) * replicas).astype("int64"))
    return lambda request: draws[request.index]


def _outstanding(scheduler: Scheduler) -> int:
    return len(scheduler.running) + len(scheduler.waiting)


def _held_tokens(scheduler: Scheduler) -> int:
    usage = scheduler.kv.account.usage(*scheduler.levels())
    assert isinstance(usage, Usage)
    return usage.tokens + usage.reserved + usage.internal + usage.round_up


class _Least:
    """The replica with the least of something; of equals the next in turn, so that none is preferred."""

    def __init__(self, schedulers: Sequence[Scheduler], amount: Callable[[Scheduler], int]) -> None:
        self._schedulers, self._amount, self._next = schedulers, amount, 0

    def __call__(self, request: Request) -> int:
        amounts = [self._amount(one) for one in self._schedulers]
        least = min(amounts)
        for offset in range(len(amounts)):
            chosen = (self._next + offset) % len(amounts)
            if amounts[chosen] == least:
                break
        self._next = (chosen + 1) % len(amounts)
        return chosen


class _PrefixAffinity:
    """Remembers to which replica each piece of text was sent last."""

    def __init__(self, schedulers: Sequence[Scheduler]) -> None:
        self._schedulers = schedulers
        self._least = _Least(schedulers, _outstanding)
        self._sent: dict[Hashable, int] = {}

    def __call__(self, request: Request) -> int:
        chosen = self._match(request)
        if chosen is None or self._is_unbalanced():
            chosen = self._least(request)
        for name, _ in request.prompt:
            if name is not None:
                self._sent[name] = chosen
        if request.output_name is not None:
            self._sent[request.output_name] = chosen
        return chosen

    def _match(self, request: Request) -> int | None:
        """Who was sent the longest beginning of the prompt; None when it is too short to count."""
        found, matched = None, 0
        for name, num_tokens in request.prompt:
            holder = None if name is None else self._sent.get(name)
            if holder is None or (found is not None and holder != found):
                break
            found, matched = holder, matched + num_tokens
        return found if matched > _LEAST_MATCH * request.prompt_tokens else None

    def _is_unbalanced(self) -> bool:
        amounts = [_outstanding(one) for one in self._schedulers]
        least, most = min(amounts), max(amounts)
        return most - least > _MOST_DIFFERENCE and most > _MOST_RATIO * least
