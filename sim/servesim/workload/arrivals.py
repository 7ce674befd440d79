"""When requests arrive, and how long users think."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeAlias

import numpy as np

from servesim.config.workload import (
    ArrivalsConfig,
    BurstArrivals,
    ClosedLoopArrivals,
    ConstantArrivals,
    GammaArrivals,
    PoissonArrivals,
    ThinkTimeLaw,
)
from servesim.workload.streams import BLOCK, Column, FloatArray, Stream

__all__ = ["ThinkTime", "arrival_times"]

_Gaps: TypeAlias = Callable[[int, int], FloatArray]


def arrival_times(config: ArrivalsConfig, seed: int, count: int) -> Iterator[float]:
    """Times of the first ``count`` arrivals that depend on nothing that is served, in order.

    Random gaps have mean 1 and are summed before the sum is divided by the rate: one seed at another rate
    gives the same arrivals on another clock.  With ``exact_rate`` the last one falls at count / rate.
    """
    match config:
        case BurstArrivals():
            yield from (0.0 for _ in range(count))
        case ClosedLoopArrivals():
            yield from (0.0 for _ in range(min(config.concurrency, count)))
        case ConstantArrivals():
            yield from (index / config.rate_per_s for index in range(count))
        case PoissonArrivals() | GammaArrivals():
            gaps = _unit_gaps(config, Stream(seed, "arrivals"))
            rate_per_s = config.rate_per_s
            if config.exact_rate:
                total = sum(float(gaps(start, size).sum()) for start, size in _blocks(count))
                rate_per_s *= total / count or 1.0  # all at once if every gap is 0
            last = 0.0
            for start, size in _blocks(count):
                sums = last + np.cumsum(gaps(start, size))
                last = float(sums[-1])
                yield from (sums / rate_per_s).tolist()


def _unit_gaps(config: PoissonArrivals | GammaArrivals, stream: Stream) -> _Gaps:
    """Gaps of mean 1: exponential, or gamma of shape burstiness (as `vllm bench serve`)."""
    if isinstance(config, PoissonArrivals):
        return stream.exponentials
    return lambda start, count: stream.gammas(config.burstiness, start, count)


def _blocks(count: int) -> Iterator[tuple[int, int]]:
    return ((start, min(BLOCK, count - start)) for start in range(0, count, BLOCK))


class ThinkTime:
    """Time between the end of a request and the next one of the same user or session."""

    def __init__(self, mean_s: float, law: ThinkTimeLaw, stream: Stream) -> None:
        self._mean_s = mean_s
        self._units: Column[float] | None = Column(stream.exponentials) if law == "exponential" else None

    def after(self, index: int) -> float:
        """Seconds from the end of request ``index`` to the next one."""
        return self._mean_s if self._units is None else self._mean_s * self._units[index]
