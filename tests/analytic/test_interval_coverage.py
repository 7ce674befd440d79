"""Intervals hold the truth as often as they say: thousands of M/M/1 queues through the product's own code.

Lindley's recursion (wait of the next customer = max(0, wait + service - gap)) runs all queues of a load at
once. Each experiment is ten replications that start empty; the warm-up of each is cut off, then every
replication gives one number.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from servesim.analysis.intervals import paired_interval, quantile_interval, t_interval
from servesim.analysis.warmup import BINS, cross_cuts, mser5

Floats = NDArray[np.float64]

EXPERIMENTS = 1000
REPLICATIONS = 10


def mm1_waits(load: float, customers: int, queues: int, seed: int) -> Floats:
    """Mean wait of the customers in each of BINS equal parts, a row per queue; service takes 1 on average."""
    rng = np.random.default_rng(seed)
    wait, gap, service = (np.zeros(queues) for _ in range(3))
    bins = np.zeros((BINS, queues))
    per_bin = customers // BINS
    for row in bins:
        for _ in range(per_bin):
            row += wait
            rng.standard_exponential(out=service)
            rng.standard_exponential(out=gap)
            gap /= load
            wait += service
            wait -= gap
            np.maximum(wait, 0.0, out=wait)
    return bins.T / per_bin


@pytest.mark.parametrize("load", [0.5, 0.8, 0.9])
def test_intervals_of_a_queue_hold_the_truth(load: float) -> None:
    all_waits = mm1_waits(load, 20_000, EXPERIMENTS * REPLICATIONS, seed=int(load * 10))
    truth = load / (1 - load)
    held = refused = 0
    for experiment in all_waits.reshape(EXPERIMENTS, REPLICATIONS, BINS):
        cuts = cross_cuts(experiment)
        if cuts is None:  # the product says that it found no steady state, and gives no interval of one
            refused += 1
            continue
        means = [waits[cut:].mean() for waits, cut in zip(experiment, cuts, strict=True)]
        of = t_interval(means)
        held += of.low <= truth <= of.high
    print(f"load {load}: {held / EXPERIMENTS:.1%} of the intervals hold the mean wait, {refused} refused")
    assert refused <= 0.01 * EXPERIMENTS
    assert 0.92 <= held / EXPERIMENTS <= 0.97  # a refusal counts as a miss


def test_the_warm_up_of_a_busy_queue_is_cut_off() -> None:
    """At load .9 from empty, most of the bias of the first customers is gone after the cut."""
    queues = mm1_waits(0.9, 4_000, 40_000, seed=7)
    truth = 0.9 / 0.1
    whole = queues.mean() - truth
    kept = []
    for experiment in queues.reshape(-1, 100, BINS):  # many replications: the bias shows, and not chance
        cuts = cross_cuts(experiment)
        if cuts is None:
            continue
        kept.append(np.mean([waits[cut:].mean() for waits, cut in zip(experiment, cuts, strict=True)]))
    left = np.mean(kept) - truth
    print(f"bias {whole:.3f} before, {left:.3f} after the cut of {len(kept)} experiments out of 400")
    assert len(kept) > 360
    assert whole < -0.2
    assert abs(left) < 0.2 * abs(whole)


def test_a_decaying_bias_on_autocorrelated_noise_is_covered() -> None:
    rng = np.random.default_rng(3)
    noise = np.zeros((500, 1000))
    for i in range(1, 1000):
        noise[:, i] = 0.5 * noise[:, i - 1] + rng.standard_normal(500)
    series = noise - 20 * np.exp(-np.arange(1000) / 30)
    cuts = [mser5(one) for one in series]
    # covered: what is left of the bias moves the mean by less than its own standard error
    error = math.sqrt(1 / (1 - 0.5**2) * (1 + 0.5) / (1 - 0.5) / 1000)
    covered = sum(
        cut is not None and 20 * np.exp(-np.arange(cut, 1000) / 30).sum() / (1000 - cut) < error
        for cut in cuts
    )
    assert covered / 500 > 0.9


def test_a_queue_that_grows_to_the_end_has_no_warm_up() -> None:
    rng = np.random.default_rng(4)
    assert mser5(np.arange(500) + rng.standard_normal(500)) is None
    assert mser5(np.zeros(500)) == 0
    assert mser5([1.0] * 9) is None


@pytest.mark.parametrize("quantile", [0.5, 0.9, 0.99])
def test_order_statistics_hold_a_quantile_of_independent_samples(quantile: float) -> None:
    rng = np.random.default_rng(int(quantile * 100))
    truth = -math.log(1 - quantile)
    held = 0
    for _ in range(2000):
        of = quantile_interval(rng.standard_exponential(1000), quantile)
        held += of.low <= truth <= of.high
    assert 0.94 <= held / 2000 <= 0.985  # whole numbers of samples: never less than 95 % but for chance


def test_equal_systems_are_told_apart_as_rarely_as_promised() -> None:
    rng = np.random.default_rng(5)
    alarms = 0
    for _ in range(4000):
        common = rng.standard_exponential(10)
        a, b = common + 0.1 * rng.standard_normal((2, 10))
        alarms += not paired_interval(a, b).is_zero_inside
    assert 0.035 <= alarms / 4000 <= 0.065


def test_bonferroni_holds_many_differences_at_once() -> None:
    rng = np.random.default_rng(6)
    alarms = 0
    for _ in range(2000):
        a, *others = rng.standard_normal((9, 10))
        alarms += any(not paired_interval(a, b, comparisons=8).is_zero_inside for b in others)
    assert alarms / 2000 <= 0.055
