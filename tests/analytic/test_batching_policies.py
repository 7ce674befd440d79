"""What batching request by request costs: a batch lasts as long as its longest output."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from queueing import assert_agree, fixed, requests_of, uniform

from servesim.config.scenario import LinearStepTime
from servesim.cost.linear import LinearLaw
from servesim.engine.events import Log
from servesim.engine.loop import simulate
from servesim.engine.orca import OrcaScheduler
from servesim.engine.scheduler import Scheduler, SchedulerLimits
from servesim.engine.static_batching import StaticScheduler
from servesim.engine.versions import RULES
from servesim.kv.contiguous import ContiguousKVCache
from servesim.kv.paged import PagedKVCache

MOST = 512


def serve(kind: Any, kv: Any, output_tokens: dict[str, Any], count: int, seed: int, batch: int = 256) -> Log:
    """A burst of requests with prompts of 32 tokens; every step takes a second."""
    workload = {
        "num_requests": count,
        "arrivals": {"process": "burst"},
        "prompt_tokens": fixed(32),
        "output_tokens": output_tokens,
    }
    limits = SchedulerLimits(max_num_seqs=batch, max_num_batched_tokens=1 << 40, max_model_len=MOST)
    law = LinearLaw(LinearStepTime(law="linear", base_s=1.0))
    return simulate(requests_of(workload, seed), kind(limits, RULES["0.26"], kv), law)


def reserved(requests: int) -> ContiguousKVCache:
    return ContiguousKVCache(requests * MOST, MOST)


@pytest.mark.parametrize("batch", [4, 16, 64])
def test_a_static_batch_lasts_as_long_as_the_longest_of_its_outputs(batch: int) -> None:
    """Of B lengths uniform on 1 to n the longest has mean n - sum over k < n of (k / n)^B.

    So with Orca's synthetic outputs, 1 to 128 (OSDI 2022, section 6), seats are less than half empty: the
    policy alone gives less than twice the throughput, however large the batch.
    """
    longest = 127 - sum((k / 127) ** batch for k in range(1, 127))
    batches = 640 // batch
    steps = [
        serve(StaticScheduler, reserved(batch), uniform(1, 127), batches * batch, seed).counters["steps"]
        for seed in range(10)
    ]
    assert_agree(np.array(steps) / batches, longest)
    assert longest / 64 < 2


def gamma(shape: float) -> dict[str, Any]:
    return {"law": "gamma", "mean_tokens": 60.0, "shape": shape, "max_tokens": MOST - 32}


def test_the_gain_of_continuous_batching_grows_with_the_spread_of_lengths() -> None:
    """Steps of static batches over those of continuous ones, in equal memory; exactly 1 for equal lengths."""
    batch, gains = 16, []
    for law in (fixed(60), gamma(25.0), gamma(4.0), gamma(1.0), gamma(0.5)):
        static, orca = (
            serve(kind, reserved(batch), law, 100 * batch, seed=1).counters["steps"]
            for kind in (StaticScheduler, OrcaScheduler)
        )
        gains.append(static / orca)
    assert gains[0] == 1.0
    assert gains == sorted(gains)
    assert 1.2 < gains[1] < 1.6
    assert 3.0 < gains[3] < 3.6  # exponential: the harmonic number of 16 is 3.38


def test_paging_turns_the_same_memory_into_a_larger_batch() -> None:
    """The same slots: 16 reservations, or as many requests as E[P] + (E[O^2] - E[O]) / (2 E[O]) allows."""
    static, orca = (
        serve(kind, reserved(16), gamma(1.0), 3000, seed=1) for kind in (StaticScheduler, OrcaScheduler)
    )
    paged = serve(Scheduler, PagedKVCache(16 * MOST + 1, 1, enable_prefix_caching=False), gamma(1.0), 3000, 1)
    steps = [log.counters["steps"] for log in (static, orca, paged)]
    assert steps[0] > 3 * steps[1] > 9 * steps[2]
    rows = paged.steps.columns
    queued = np.array(rows["waiting"]) > 0
    running, lasting = np.array(rows["running"])[queued], np.array(rows["steps"])[queued]
    held = 32 + 60 - 0.5  # E[O^2] = 2 E[O]^2
    assert (running * lasting).sum() / lasting.sum() == pytest.approx(16 * MOST / held, rel=0.06)
