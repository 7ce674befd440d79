"""Replications: what their intervals are of, what is left out, and that pairs share their random numbers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

import servesim
from servesim.analysis.intervals import (
    needed_samples,
    quantile_interval,
    share_interval,
    student_t,
    t_interval,
)
from servesim.analysis.quantities import QUANTITIES
from servesim.analysis.replications import replicate, replicate_pair, run_replication, with_seed
from servesim.analysis.steady import steady_summary
from servesim.analysis.warmup import load_of
from servesim.config.load import load_scenario
from servesim.errors import ConfigError
from servesim.workload.request import Request, Segment
from servesim.workload.resampled import BLOCKS, ResampledWorkload

CHAT = """\
name: chat
model: llama-3.1-8b
hardware: {gpu: h100-sxm}
engine: {max_model_len: 4096, max_num_seqs: 24}
workload:
  num_requests: 400
  arrivals: {process: poisson, rate_per_s: 9}
  prompt_tokens: {law: lognormal, median_tokens: 300, sigma: 0.8, max_tokens: 2000}
  output_tokens: {law: geometric, mean_tokens: 150}
"""


@pytest.fixture
def chat(tmp_path: Path) -> str:
    path = tmp_path / "chat.yaml"
    path.write_text(CHAT)
    return str(path)


# ---- intervals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 9, 10, 29, 200, 9_999, 20_000])
@pytest.mark.parametrize("level", [0.5, 0.9, 0.95, 0.999])
def test_students_t_is_scipys(level: float, degrees: int) -> None:
    exact = scipy.stats.t.ppf((1 + level) / 2, degrees)
    assert student_t(level, degrees) == pytest.approx(exact, rel=1e-8 if degrees < 10_000 else 1e-3)


def test_a_mean_of_one_value_is_not_known() -> None:
    assert t_interval([3.0]).half_width == np.inf
    assert t_interval([1.0, 1.0]).half_width == 0
    assert t_interval([1.0, 1.0]).relative == 0
    assert t_interval([-1.0, 1.0]).is_zero_inside


@pytest.mark.parametrize(("count", "quantile"), [(1000, 0.99), (100, 0.5), (5000, 0.9), (59, 0.95)])
def test_the_order_statistics_are_those_of_the_binomial_law(count: int, quantile: float) -> None:
    interval = quantile_interval(np.arange(1.0, count + 1), quantile)
    law = scipy.stats.binom(count, quantile)
    low, high = int(interval.low), interval.high
    assert law.cdf(low - 1) <= 0.025 < law.cdf(low)  # fewer than `low` samples below the quantile
    if np.isfinite(high):
        assert law.sf(high - 1) <= 0.025 < law.sf(high - 2)
    else:
        assert law.sf(count - 1) > 0.025


def test_a_quantile_needs_ten_samples_beyond_it() -> None:
    assert [needed_samples(q) for q in (0.5, 0.9, 0.99, 0.999)] == [20, 100, 1_000, 10_000]
    assert quantile_interval(np.arange(100.0), 0.99).high == np.inf


def test_a_share_of_all_is_not_certain() -> None:
    assert share_interval(20, 20).low == pytest.approx(0.8389, abs=1e-4)
    assert share_interval(20, 20).high == pytest.approx(1.0)


# ---- a trace drawn again ---------------------------------------------------------------------------


class Recorded:
    """A trace of n requests, one a second, every third with a prefix that all of these share."""

    def __init__(self, count: int) -> None:
        self.num_requests = count

    def arrivals(self):
        for i in range(self.num_requests):
            prompt = (Segment("system", 10), Segment(None, i + 1)) if i % 3 == 0 else ()
            yield Request(i, f"line-{i}", float(i), i + 11, i + 1, prompt)

    def follow_up(self, finished, now_s):
        return None


def test_a_resampled_trace_has_its_requests_in_blocks() -> None:
    drawn = list(ResampledWorkload(Recorded(3000), seed=1).arrivals())
    assert len(drawn) == 3000
    assert [one.index for one in drawn] == list(range(3000))
    rows = np.array([one.output_tokens for one in drawn])
    breaks = np.flatnonzero(np.diff(rows) != 1)
    assert BLOCKS - 1 <= len(breaks) <= 2 * BLOCKS  # a block may run over the trace's end
    assert np.diff([one.arrival_s for one in drawn]) == pytest.approx(1.0)
    other = [one.output_tokens for one in ResampledWorkload(Recorded(3000), seed=2).arrivals()]
    assert rows.tolist() != other
    means = [
        np.mean([one.output_tokens for one in ResampledWorkload(Recorded(300), seed).arrivals()])
        for seed in range(200)
    ]
    assert np.mean(means) == pytest.approx(150.5, rel=0.03)


def test_a_prefix_drawn_twice_does_not_hit_its_own_repetition() -> None:
    drawn = list(ResampledWorkload(Recorded(60), seed=1).arrivals())
    seen: dict[str, list[object]] = {}
    for one in drawn:
        if one.prompt:
            seen.setdefault(one.request_id.split("-draw-")[0], []).append(one.prompt[0].name)
    twice = [names for names in seen.values() if len(names) > 1]
    assert twice
    assert all(len(set(names)) == len(names) for names in twice)
    assert all(names[0] == "system" for names in seen.values())


# ---- the steady part -------------------------------------------------------------------------------


def test_the_steady_part_has_neither_the_begin_nor_the_end(chat: str) -> None:
    run = run_replication(load_scenario(chat))
    steady, load = steady_summary(run, 0.25), load_of(run)
    arrival_s = np.sort(np.array(run.log.requests.columns["arrival_s"]))
    span_s = arrival_s[-1] - arrival_s[0]
    begin_s = arrival_s[0] + 0.25 * span_s
    assert steady.completed < (arrival_s >= begin_s).sum()
    assert steady.duration_s < 0.75 * span_s
    middle = load.kv_tokens[125:450].mean() / servesim.simulate(chat).summary.memory.kv_cache_tokens
    assert steady.kv.mean_usage == pytest.approx(middle, rel=0.15)
    rate = steady.request_throughput
    assert rate == pytest.approx(9, rel=0.2)
    assert steady.output_throughput == pytest.approx(rate * 150, rel=0.2)


def test_a_burst_is_taken_whole(chat: str) -> None:
    Path(chat).write_text(CHAT.replace("{process: poisson, rate_per_s: 9}", "{process: burst}"))
    found = replicate(load_scenario(chat), 3)
    assert found.warm_up_s == 0
    assert [one.completed for one in found.summaries] == [400, 400, 400]


def test_an_overloaded_engine_has_no_steady_state_and_says_so(chat: str) -> None:
    text = str(servesim.replicate(chat, 3, overrides=["workload.arrivals.rate_per_s=100"], jobs=1))
    assert "no steady state was found" in text
    assert "-> run more requests, or lower the load" in text
    assert "warm-up" not in text


# ---- common random numbers -------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["engine.block_size=64", "hardware.gpu=h200-sxm", "model=qwen3-8b"])
def test_pairs_share_their_requests_so_differences_have_half_the_variance(chat: str, change: str) -> None:
    a, b = load_scenario(chat), load_scenario(chat, [change])
    count = 24
    paired = replicate_pair(a, b, count)
    other = replicate(with_seed(b, b.scenario.seed + 1000), count)
    for key in ("mean_ttft_ms", "mean_tpot_ms", "mean_e2el_ms", "output_throughput"):
        one = QUANTITIES[key]
        together = np.var(paired[1].values(one) - paired[0].values(one), ddof=1)
        apart = np.var(other.values(one) - paired[0].values(one), ddof=1)
        print(f"{change} {key}: variance of paired differences {together / apart:.2f} of independent ones")
        assert together < 0.5 * apart, key


def test_two_equal_scenarios_are_not_ranked(chat: str) -> None:
    found = servesim.replicate_compared(chat, chat, 3, jobs=1)
    assert not any(one.is_told_apart for one in found.differences)
    assert not any(line.endswith(("B > A", "B < A")) for line in str(found).splitlines())
    assert "0 of" in str(found)


def test_a_difference_within_noise_is_not_ranked_and_a_real_one_is(chat: str) -> None:
    slower = str(Path(chat).with_name("slower.yaml"))
    Path(slower).write_text("extends: chat.yaml\nname: slower\nengine: {step_time: {gpu_time_factor: 1.2}}\n")
    found = servesim.replicate_compared(chat, slower, 4, jobs=1)
    by_key = {one.quantity.key: one for one in found.differences}
    assert by_key["mean_tpot_ms"].is_told_apart
    assert by_key["mean_tpot_ms"].difference.low > 0
    line = next(line for line in str(found).splitlines() if line.startswith("Mean TPOT"))
    assert line.endswith("B > A")
    assert not by_key["kv_pool_tokens"].is_told_apart
    told = json.loads(found.to_json())["differences"]
    assert {one["key"]: one["told_apart"] for one in told}["mean_tpot_ms"] is True


# ---- what is printed -------------------------------------------------------------------------------


def test_a_p99_of_few_samples_is_refused_and_says_how_many_it_needs(chat: str) -> None:
    found = servesim.replicate(chat, 3, jobs=1)
    line = next(line for line in str(found).splitlines() if line.startswith("P99 TTFT"))
    assert "n/a" in line
    assert "needs 1,000" in line
    plain = json.loads(found.to_json())
    assert "needs 1,000" in plain["refused"]["p99_ttft_ms"]
    assert "p99_ttft_ms" not in plain["intervals"]
    of = plain["intervals"]["mean_ttft_ms"]
    assert of["low"] < of["mean"] == plain["mean_ttft_ms"] < of["high"]
    assert len(found.frame) == 3
    assert found.frame["mean_ttft_ms"].mean() == pytest.approx(of["mean"])


def test_jobs_change_no_byte(chat: str) -> None:
    texts = {servesim.replicate(chat, 4, jobs=jobs).to_json() for jobs in (1, 2)}
    assert len(texts) == 1


def test_a_trace_is_drawn_again_and_that_is_said() -> None:
    found = servesim.replicate("std10k", 3, overrides=["workload.trace.max_requests=200"], jobs=1)
    assert "draws the trace's requests again" in str(found)
    assert found.replications.varies


def test_a_trace_of_lengths_has_other_lengths_in_each_replication() -> None:
    small = ["workload.trace.max_requests=300", "workload.arrivals.concurrency=20"]
    found = replicate(load_scenario("closed-loop-sharegpt", small), 3)
    for key in ("prompt_tokens_per_request", "mean_ttft_ms", "output_throughput"):
        assert len(set(found.values(QUANTITIES[key]))) == 3, key


def test_a_workload_without_chance_is_named(chat: str) -> None:
    text = CHAT.replace("process: poisson", "process: constant")
    text = text.replace("{law: geometric, mean_tokens: 150}", "{law: fixed, tokens: 50}")
    text = text.replace(
        "{law: lognormal, median_tokens: 300, sigma: 0.8, max_tokens: 2000}", "{law: fixed, tokens: 99}"
    )
    Path(chat).write_text(text)
    assert "all replications are the same" in str(servesim.replicate(chat, 3, jobs=1))


def test_one_replication_is_no_interval(chat: str) -> None:
    with pytest.raises(ConfigError, match="an interval needs replications"):
        servesim.replicate(chat, 1)
