"""The capacity bracket: holds the closed-form capacity of M/M/1 under a P99 limit, and of a real scenario."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pytest

from servesim import studies
from servesim.analysis.bisection import Verdict, turning_rate
from servesim.analysis.capacity import at_load, capacity_bracket
from servesim.analysis.plan_trials import TrialTask, run_trial
from servesim.config.load import load_scenario
from servesim.errors import StudyError


class Trial(NamedTuple):
    """What a replication of these tests attains."""

    attained: float
    is_stable: bool = True


EXPERIMENTS = int(os.environ.get("BRACKETS", "60"))  # BRACKETS=1000: some minutes
CUSTOMERS = 20_000  # shorter runs see too small a P99


def queue(seed: int):
    """P99 of the time in an M/M/1 queue (service takes 1 on average) by rate, on common random numbers."""

    def attained(rate: float, numbers: Sequence[int]) -> list[Trial]:
        trials = []
        for number in numbers:
            rng = np.random.default_rng((seed, number))
            service, gaps = rng.standard_exponential((2, CUSTOMERS))
            change = np.concatenate(([0.0], service[:-1] - gaps[1:] / rate))
            walk = np.cumsum(change)
            sojourn = walk - np.minimum.accumulate(walk) + service
            half = sojourn[CUSTOMERS // 2 :].reshape(20, -1).mean(axis=1)
            growth = np.polyfit(np.arange(20), half, 1)[0] * 20
            is_stable = growth < 0.02 * CUSTOMERS / 2
            trials.append(Trial(float(np.quantile(sojourn[CUSTOMERS // 10 :], 0.99)), bool(is_stable)))
        return trials

    return attained


def test_the_bracket_holds_the_closed_form_capacity() -> None:
    """The time in the system is exponential with rate mu - lambda, so P99 = ln(100) / (mu - lambda)."""
    limit = 25.0
    capacity = 1 - math.log(100) / limit
    brackets = [capacity_bracket(queue(seed), limit, 0.5) for seed in range(EXPERIMENTS)]
    held = sum(one.low <= capacity <= one.high for one in brackets) / EXPERIMENTS
    width = np.median([one.width for one in brackets])
    print(f"{held:.1%} of the brackets hold the capacity {capacity:.4f}; median width {width:.1%}")
    assert held >= 0.95
    assert width < 0.05


def test_with_little_noise_the_bracket_is_as_narrow_as_asked() -> None:
    def attained(rate: float, numbers: Sequence[int]) -> list[Trial]:
        return [Trial(rate + 1e-4 * number, True) for number in numbers]

    for start in (0.01, 3.0, 500.0):
        bracket = capacity_bracket(attained, 7.0, start)
        assert bracket.low <= 7.0 <= bracket.high
        assert bracket.width <= 0.021


def test_an_unstable_rate_is_missed_though_its_figures_are_fine() -> None:
    def attained(rate: float, numbers: Sequence[int]) -> list[Trial]:
        return [Trial(0.1 + number * 1e-3, rate < 5) for number in numbers]

    bracket = capacity_bracket(attained, 1.0, 2.0)
    assert bracket.low < 5 <= bracket.high <= bracket.low * 1.021


def test_a_limit_that_is_never_missed_or_never_kept_leaves_an_open_bracket() -> None:
    always = capacity_bracket(lambda rate, numbers: [Trial(0.5 + n * 1e-3) for n in numbers], 1.0, 2.0)
    assert always.high == math.inf
    never = capacity_bracket(lambda rate, numbers: [Trial(2.0 + n * 1e-3) for n in numbers], 1.0, 2.0)
    assert never.low == 0


SMALL = """\
name: small
model: llama-3.1-8b
hardware: {gpu: h100-sxm}
engine: {max_model_len: 2048, max_num_seqs: 4}
workload:
  num_requests: 1200
  arrivals: {process: poisson, rate_per_s: 10}
  prompt_tokens: {law: fixed, tokens: 100}
  output_tokens: {law: geometric, mean_tokens: 10}
slo: {ttft_p99_s: 0.2}
"""


def test_the_capacity_of_a_scenario_is_bracketed(tmp_path: Path) -> None:
    """Its four slots can never serve more than four requests in ten steps of 6 ms or more."""
    (tmp_path / "small.yaml").write_text(SMALL)
    found = studies.capacity(tmp_path / "small.yaml", jobs=1)
    low, high = found.bracket_per_s
    assert 10 < low < high < 4 / (10 * 0.006)
    assert found.study.constraint == "TTFT: slots"
    loaded, own = found.study.scenario, found.study.rate_per_s

    def kept(rate_per_s: float) -> int:
        tasks = (TrialTask(loaded, rate_per_s / own, 1, 1, "round-robin", seed) for seed in range(90, 96))
        return sum(run_trial(task).keeps for task in tasks)

    assert kept(low * 0.85) >= 5
    assert kept(high * 1.15) <= 1
    assert f"It takes {low:.3g} req/s" in str(found)
    told = json.loads(found.to_json())
    assert (told["kept_up_to_per_s"], told["missed_from_per_s"]) == (low, high)


def test_loads_that_mean_nothing_are_refused() -> None:
    with pytest.raises(StudyError, match="closed loop cannot be overloaded"):
        at_load(load_scenario("closed-loop-sharegpt"), 2.0)
    with pytest.raises(StudyError, match="needs a limit"):
        studies.capacity("std10k")
    with pytest.raises(StudyError, match="missed at any rate"):
        studies.capacity("std10k", overrides=["slo.tpot_p99_s=0.001"])
    few = ["workload.trace.max_requests=500", "slo.ttft_p99_s=0.3"]
    with pytest.raises(StudyError, match="too few requests"):
        studies.capacity("std10k", overrides=few, jobs=1)


def test_a_search_asks_no_rate_twice_and_stops_when_told() -> None:
    asked: list[float] = []

    def verdict(rate: float) -> Literal["kept", "missed"]:
        asked.append(rate)
        return "kept" if rate <= 3.3 else "missed"

    low, high = turning_rate(verdict, 1.0, 0.01)
    assert low <= 3.3 < high <= low * 1.01
    assert len(asked) == len(set(asked))
    asked.clear()
    low, high = turning_rate(verdict, 1.0, 0.01, most=5)
    assert low <= 3.3 < high
    assert len(asked) == 5


def test_what_is_kept_by_luck_beyond_a_missed_rate_does_not_turn_the_bracket_round() -> None:
    def verdict(rate: float) -> Verdict:
        if rate <= 1:
            return "kept"
        if rate == 2 or rate < 1.3:
            return "undecided"
        return "kept" if 2.5 < rate < 3 else "missed"

    low, high = turning_rate(verdict, 1.0, 0.08)
    assert low == 1 < high < 1.5
