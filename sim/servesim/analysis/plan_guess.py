"""A first guess of the replicas: every request of a few of them, as a fluid.

A replica gets every n-th request. It computes prompts in turn (Lindley's queue); an answer takes its decode
steps at the number of requests that run when it begins, and the prompts that are computed meanwhile: those
that come before its last step. Short answers that meet one long prompt make the P99, so the requests' own
times and lengths are taken and not means. What is left out: steps begin and end, blocks run short.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from servesim.analysis.plan_bounds import Analytic, Traffic
from servesim.analysis.plan_trials import p99_of, simulated_replicas

__all__ = ["Fluid", "likely_replicas"]

Floats = NDArray[np.float64]

_POINTS = 30  # numbers of running requests, and lengths of prompts, at which the law of step time is asked
_FOR_LONG_S = 1e6  # waits a request that finds no place
_ROUNDS = 3  # of the fixed points; they need no precision


def likely_replicas(analytic: Analytic, least: int, most: int, rate_per_s: float) -> int:
    """The fewest replicas, from ``least`` on, whose P99s may keep the limits; ``most`` where none do."""
    fluid = Fluid.of(analytic)
    low, high = least - 1, least
    while high < most and fluid.attained(high, rate_per_s) > 1:
        low, high = high, min(most, 2 * high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fluid.attained(middle, rate_per_s) <= 1 else (middle, high)
    return high


class Fluid(NamedTuple):
    """The laws that a guess needs."""

    traffic: Traffic
    most_running: int
    prompts: Floats
    """Tokens to compute of each."""
    token_s: Floats
    """Between two tokens, by the number of running requests."""
    lengths: NDArray[np.int64]
    added_s: Floats
    """What prompts of these lengths add to the steps that compute them."""
    limits_s: tuple[float, float, float]
    """Of TTFT, TPOT and E2E."""

    @classmethod
    def of(cls, analytic: Analytic) -> Fluid:
        """Of a configuration; raises ServesimError when the model does not fit."""
        most, slo = analytic.most_running, analytic.slo
        numbers = np.unique(np.geomspace(1, most, _POINTS).astype(np.int64))
        token_s = [analytic.token_s(int(n)) for n in numbers]
        longest = int(analytic.prompts.max())
        lengths = np.unique(np.geomspace(1, longest, _POINTS).astype(np.int64))
        added_s = [analytic.prompt_s(int(tokens), max(1, most // 8)) for tokens in lengths]
        limits_s = (slo.ttft_p99_s or math.inf, slo.tpot_p99_s or math.inf, slo.e2e_p99_s or math.inf)
        of_every = np.interp(np.arange(most + 1), numbers, token_s)
        return cls(analytic.traffic, most, analytic.prompts, of_every, lengths, np.array(added_s), limits_s)

    def attained(self, replicas: int, rate_per_s: float) -> float:
        """The worst P99 over its limit, of the first few of so many replicas."""
        traffic = self.traffic
        count = simulated_replicas(replicas, traffic.num_requests, "round-robin")
        clock = traffic.rate_per_s / rate_per_s
        each = [self._latencies(slice(one, None, replicas), clock) for one in range(count)]
        ratios = [
            p99_of(np.concatenate(of)) / limit_s
            for of, limit_s in zip(zip(*each, strict=True), self.limits_s, strict=True)
        ]
        return float(np.nanmax([0.0, *ratios]))

    def _latencies(self, of: slice, clock: float) -> tuple[Floats, Floats, Floats]:
        """TTFT, TPOT and E2E of some requests, served by one replica."""
        traffic = self.traffic
        arrival_s, gaps = traffic.arrivals_s[of] * clock, np.maximum(1.0, traffic.outputs[of] - 1)
        prompt_s = np.interp(self.prompts[of], self.lengths, self.added_s)
        work_s = np.cumsum(prompt_s)
        # Lindley: the work of all prompts so far, with the time in which there was none.
        computed_s = work_s + np.maximum.accumulate(arrival_s - (work_s - prompt_s))
        end_s = computed_s + gaps * self.token_s[1]
        for _ in range(_ROUNDS):
            running = np.arange(1, len(gaps) + 1) - np.searchsorted(np.sort(end_s), arrival_s)
            token_s = self.token_s[np.clip(running, 1, self.most_running)]
            first_s = computed_s + 1.5 * token_s
            end_s = first_s + gaps * token_s
            for _ in range(_ROUNDS):
                last = np.searchsorted(arrival_s, end_s - token_s) - 1
                end_s = first_s + gaps * token_s + work_s[last] - work_s
        waits = np.where(running > self.most_running, _FOR_LONG_S, 0.0)
        tpot_s = np.where(traffic.outputs[of] > 1, (end_s - first_s) / gaps, np.nan)
        return first_s - arrival_s + waits, tpot_s, end_s - arrival_s + waits
