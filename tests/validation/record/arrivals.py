"""Seeded requests: who comes when, with how many tokens, sharing what."""

from __future__ import annotations

import math
import random
from typing import NamedTuple

__all__ = ["Ask", "Lengths", "burst", "poisson", "prompt_ids", "same"]


class Lengths(NamedTuple):
    """Clipped log-normal lengths."""

    median: int
    sigma: float
    least: int
    most: int

    def draw(self, random_: random.Random) -> int:
        """One length."""
        drawn = round(self.median * math.exp(random_.gauss(0.0, self.sigma)))
        return max(self.least, min(self.most, drawn))


class Ask(NamedTuple):
    """One request of a run; the first ``prefix_tokens`` of its prompt are those of its ``prefix_group``."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    prefix_group: int = -1
    prefix_tokens: int = 0


def poisson(
    seed: int, count: int, rate: float, prompt: Lengths, output: Lengths, groups: int = 0, prefix: int = 0
) -> list[Ask]:
    """``count`` requests at ``rate`` per second; with ``groups`` each starts with its group's prefix."""
    random_, now_s, asks = random.Random(seed), 0.0, []
    for _ in range(count):
        now_s += random_.expovariate(1.0)
        own, out = prompt.draw(random_), output.draw(random_)
        group = random_.randrange(groups) if groups else -1
        shared = prefix if groups else 0
        asks.append(Ask(round(now_s / rate, 6), shared + own, out, group, shared))
    return asks


def burst(asks: list[Ask]) -> list[Ask]:
    """The same requests, all at once."""
    return [ask._replace(arrival_s=0.0) for ask in asks]


def same(count: int, prompt: int, output: int) -> list[Ask]:
    """``count`` requests of one size, at once."""
    return [Ask(0.0, prompt, output)] * count


def prompt_ids(name: str, index: int, ask: Ask, vocab: int) -> list[int]:
    """Token ids of a prompt; ``name`` is the workload's, so that repeats send the very same tokens."""
    shared = _ids(f"{name}/group{ask.prefix_group}", ask.prefix_tokens, vocab)
    return shared + _ids(f"{name}/request{index}", ask.prompt_tokens - ask.prefix_tokens, vocab)


def _ids(name: str, count: int, vocab: int) -> list[int]:
    random_ = random.Random(name)
    return [random_.randrange(10, vocab - 10) for _ in range(count)]
