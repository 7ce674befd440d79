"""The figures of a result, against numbers worked out by hand (``handmade``) and against numpy."""

from __future__ import annotations

import math
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from handmade import NAN, POOL, handmade_log, handmade_run
from servesim.analysis.caveats import Caveat
from servesim.analysis.distribution import distribution, weighted_distribution, weighted_quantiles
from servesim.analysis.metrics import request_times, summarise
from servesim.analysis.series import CURVE_QUANTILES, latency_curves, time_series
from servesim.analysis.timeline import KV_CLASSES, expand_steps, timeline
from servesim.analysis.warmup import load_of
from servesim.engine.events import Log
from servesim.report.as_json import result
from servesim.report.terminal import result_text

SAMPLES = st.lists(
    st.tuples(st.floats(-1e6, 1e6, allow_subnormal=False), st.integers(0, 9)), min_size=1, max_size=40
).filter(lambda pairs: any(weight for _, weight in pairs))


@given(SAMPLES, st.lists(st.floats(0, 1), min_size=1, max_size=5))
def test_weighted_quantiles_are_those_of_the_expanded_sample(pairs, quantiles):
    values, weights = (np.array(column) for column in zip(*pairs, strict=True))
    expected = np.quantile(np.repeat(values, weights), quantiles)
    found = weighted_quantiles(values, weights, np.array(quantiles))
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-6)


@given(SAMPLES)
def test_weighted_distribution_is_that_of_the_expanded_sample(pairs):
    values, weights = (np.array(column) for column in zip(*pairs, strict=True))
    expected = asdict(distribution(np.repeat(values, weights)))
    found = asdict(weighted_distribution(values, weights))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-9, abs=1e-6), name


def test_an_empty_sample_has_no_figures():
    empty = weighted_distribution(np.array([1.0]), np.array([0]))
    assert empty.count == 0
    assert math.isnan(empty.mean_s)
    assert math.isnan(empty.p99_s)


def test_latencies_of_each_request():
    times = request_times(handmade_log())
    np.testing.assert_allclose(times.ttft_s, [0.5, 0.5, 0.5, NAN, 0.3])
    np.testing.assert_allclose(times.tpot_s, [NAN, 0.11, 0.2, NAN, NAN])
    np.testing.assert_allclose(times.e2e_s, [0.5, 0.72, 0.7, NAN, 0.3])
    np.testing.assert_allclose(times.queue_s, [0.0, 0.0, 0.22, NAN, 0.0])
    assert times.completed.tolist() == [True, True, True, False, True]


def test_counts_and_throughputs():
    summary = summarise(handmade_run())
    assert (summary.num_prompts, summary.completed, summary.failed, summary.unfinished) == (5, 4, 1, 0)
    assert (summary.total_input_tokens, summary.total_output_tokens) == (180, 7)
    assert summary.duration_s == pytest.approx(2.3)
    assert summary.request_throughput == pytest.approx(4 / 2.3)
    assert summary.output_throughput == pytest.approx(7 / 2.3)
    assert summary.total_token_throughput == pytest.approx(187 / 2.3)
    assert summary.request_rate == 2.0
    assert summary.burstiness == 1.0
    assert summary.offered_rate == pytest.approx(4 / 2.0)


def test_peaks_are_those_of_whole_seconds():
    summary = summarise(handmade_run())
    assert summary.max_output_tokens_per_s == 4  # at 0.5, 0.5, 0.6 and 0.72
    assert summary.max_concurrent_requests == 3  # 0, 1 and 2 touch the first second


def test_latency_distributions():
    summary = summarise(handmade_run())
    assert summary.ttft.mean_s == pytest.approx(0.45)
    assert summary.ttft.std_s == pytest.approx(np.std([0.5, 0.5, 0.5, 0.3]))
    assert summary.tpot.count == 2
    assert summary.tpot.mean_s == pytest.approx(0.155)
    assert summary.itl.count == 3  # 0.10, 0.12 and 0.2
    assert summary.itl.mean_s == pytest.approx(0.14)
    assert summary.itl.median_s == pytest.approx(0.12)
    assert summary.itl.p90_s == pytest.approx(np.percentile([0.1, 0.12, 0.2], 90))
    assert summary.e2el.mean_s == pytest.approx(0.555)
    assert summary.queue.mean_s == pytest.approx(0.055)


def test_long_gaps_between_tokens_count_as_latencies_too():
    log = handmade_log()
    log.itl_gaps_s.append(1.0)
    itl = summarise(handmade_run(log)).itl
    assert itl.count == 4
    assert itl.mean_s == pytest.approx((0.1 + 0.12 + 0.2 + 1.0) / 4)


def test_goodput_counts_requests_that_keep_every_limit():
    # TTFT within 0.4 s: only request 4; it has one token, so that its TPOT counts as 0.
    summary = summarise(handmade_run())
    assert summary.request_goodput == pytest.approx(1 / 2.3)
    assert [check.metric for check in summary.slo] == ["ttft", "tpot"]
    assert [check.within for check in summary.slo] == [0.25, 0.75]
    assert [check.met for check in summary.slo] == [False, False]
    assert summarise(handmade_run(slo={})).request_goodput is None


def test_a_tpot_limit_is_kept_where_every_answer_is_one_token():
    log = Log()
    log.requests.append(0.0, 0.0, 0.5, 0.5, 0, 9, 1, 1, 0, 0, 0)
    summary = summarise(handmade_run(log, slo={"tpot_p99_s": 0.1}))
    [check] = summary.slo
    assert check.met
    assert (check.p99_s, check.within) == (0.0, 1.0)
    assert "SLO P99 TPOT <= 100 ms:                  met (100" in result_text(summary)
    assert result(summary)["slo"][0]["met"] is True
    [unknown] = summarise(handmade_run(Log(), slo={"tpot_p99_s": 0.1})).slo
    assert not unknown.met
    assert math.isnan(unknown.p99_s)


def test_load_is_averaged_over_time():
    load = summarise(handmade_run()).load
    assert load.horizon_s == pytest.approx(2.3)
    assert load.busy_share == pytest.approx(1.5 / 2.3)
    assert load.queue_share == pytest.approx(0.22 / 2.3)
    assert load.mean_running == pytest.approx((2 * 0.5 + 0.22 + 0.28 + 0.2 + 0.3) / 2.3)
    assert load.mean_running_in_queue == pytest.approx(1.0)
    assert load.mean_waiting == pytest.approx(0.22 / 2.3)
    assert (load.peak_running, load.peak_waiting) == (2, 1)
    assert load.num_steps == 6
    assert load.mean_step_s == pytest.approx(1.5 / 6)
    assert load.mean_step_tokens == pytest.approx((150 + 2 + 10 + 1 + 20) / 6)
    assert load.prefix_cache_hit_rate == 0.25


def test_kv_classes_are_averaged_over_time_and_add_up_to_the_pool():
    kv = summarise(handmade_run()).kv
    row_1 = 101 * 0.1 + 102 * 0.12
    assert kv.pool_tokens == POOL
    assert kv.mean["tokens"] == pytest.approx((150 * 0.5 + row_1 + 2.8 + 2.2 + 6.0) / 2.3 / POOL)
    # While idle nothing is live; the cache is what the next step finds, 128 slots.
    assert kv.mean["cached"] == pytest.approx((48 * 0.22 + 144 * 0.48 + 128 * 1.1) / 2.3 / POOL)
    assert kv.in_queue["tokens"] == pytest.approx(row_1 / 0.22 / POOL)
    assert sum(kv.mean.values()) == pytest.approx(1.0)
    assert sum(kv.in_queue.values()) == pytest.approx(1.0)
    assert kv.peak_usage == pytest.approx(0.16)
    assert kv.sharing == 1.0
    assert kv.adds_up


def test_what_a_buddy_allocator_adds_is_allocated_to_live_requests():
    pool, log = [100, 20, 5, 25, 0, 0, POOL - 150, 100], Log()
    for second in range(4):
        log.steps.append(float(second), 1.0, 0.0, 1, 1, 0, 0, 9, 1, 1, 1, 0, 0, 0, *(pool * 2))
        log.requests.append(second, second, second + 1, second + 1, second, 1, 1, 1, 0, 0, 0)
    run = handmade_run(log)
    assert summarise(run).kv.mean_usage * POOL == pytest.approx(150)
    np.testing.assert_allclose(load_of(run).kv_tokens, 150)


def test_a_class_that_does_not_add_up_is_told():
    log = handmade_log()
    log.steps.columns["end_kv_free"][1] += 1
    assert not summarise(handmade_run(log)).kv.adds_up


@given(
    st.lists(
        st.tuples(
            st.floats(1e-3, 1.0),
            st.floats(0, 1e-2),
            st.integers(1, 30),
            st.integers(0, 50),
            st.integers(0, 50),
        ),
        min_size=1,
        max_size=8,
    )
)
def test_time_weighted_mean_is_the_mean_over_every_single_step(rows):
    log, now_s = Log(), 0.0
    area = total_s = 0.0
    for first_s, growth_s, steps, begin, end in rows:
        begin, end = (begin, end) if steps > 1 else (begin, begin)
        log.steps.append(now_s, first_s, growth_s, steps, *[0] * 10, *[begin] * 8, *[end] * 8)
        durations = first_s + growth_s * np.arange(steps)
        area += float(durations @ np.linspace(begin, end, steps))
        total_s += float(durations.sum())
        now_s += steps * first_s + growth_s * steps * (steps - 1) / 2
    line = timeline(log.steps, 0.0)
    assert line.mean(*line.kv("tokens")) == pytest.approx(area / total_s, rel=1e-9, abs=1e-9)
    assert float(expand_steps(line).duration_s.sum()) == pytest.approx(total_s)
    assert float(expand_steps(line).end_s[-1]) == pytest.approx(now_s)


def test_time_bins_keep_the_mean_of_the_whole():
    run = handmade_run()
    series, summary = time_series(run), summarise(run)
    assert series.bin_s * len(series.time_s) == pytest.approx(2.3)
    assert series.running.mean() == pytest.approx(summary.load.mean_running)
    assert series.waiting.mean() == pytest.approx(summary.load.mean_waiting)
    pool = sum(series.kv_tokens[name] for name in KV_CLASSES)
    np.testing.assert_allclose(pool, POOL)
    assert series.output_tokens_per_s.sum() * series.bin_s == pytest.approx(7)
    assert series.prompt_tokens_per_s.sum() * series.bin_s == pytest.approx(180)
    assert series.arrivals_per_s.sum() * series.bin_s == pytest.approx(5)
    assert series.finishes_per_s.sum() * series.bin_s == pytest.approx(4)


def test_latency_curves_go_through_the_percentiles():
    curves, summary = latency_curves(handmade_log()), summarise(handmade_run())
    place = int(np.argmin(abs(CURVE_QUANTILES - 0.99)))
    assert CURVE_QUANTILES[place] == pytest.approx(0.99)
    for name, of in (
        ("ttft", summary.ttft),
        ("tpot", summary.tpot),
        ("itl", summary.itl),
        ("e2el", summary.e2el),
    ):
        assert curves[name][place] == pytest.approx(of.p99_s)
        assert curves[name][-1] >= of.p99_s


def test_a_log_without_a_request_gives_no_figures_and_says_so():
    summary = summarise(handmade_run(Log()))
    assert summary.completed == 0
    assert math.isnan(summary.ttft.mean_s)
    assert math.isnan(summary.request_throughput)
    assert [warned.caveat for warned in summary.warnings] == [Caveat.NOTHING_COMPLETED]
    assert len(time_series(handmade_run(Log())).time_s) == 0


def _caveats(run):
    return {warned.caveat for warned in summarise(run).warnings}


def test_warnings_of_the_handmade_run():
    assert _caveats(handmade_run()) == {Caveat.REFUSED, Caveat.FEW_COMPLETIONS, Caveat.EDGES}
    for warned in summarise(handmade_run()).warnings:
        assert " -> " in str(warned)


def test_interrupted_and_unfinished_runs_are_told():
    log = handmade_log()
    log.interrupted = True
    log.requests.append(2.0, 2.1, NAN, NAN, 5, 10, 10, 0, 0, 0, Log.STATUSES.index("running"))
    log.requests.append(2.2, NAN, NAN, NAN, 6, 10, 10, 0, 0, 0, Log.STATUSES.index("waiting"))
    summary = summarise(handmade_run(log))
    assert summary.unfinished == 2
    assert summary.num_prompts == summary.completed + summary.failed + summary.unfinished
    assert {Caveat.PARTIAL, Caveat.UNFINISHED} <= {warned.caveat for warned in summary.warnings}


def test_preemptions_and_a_useless_prefix_cache_are_told():
    log = handmade_log()
    log.requests.columns["preemptions"][0] = 3
    log.counters["prefix_cache_hits"] = 0
    assert {Caveat.PREEMPTIONS, Caveat.NOTHING_SHARED} <= _caveats(handmade_run(log))
    assert summarise(handmade_run(log)).load.preemptions == 3


def _queue_log(waiting: list[int]) -> Log:
    """One step of one second per entry; as many arrivals per second as make the entry's queue credible."""
    log = Log()
    for second, queue in enumerate(waiting):
        log.steps.append(float(second), 1.0, 0.0, 1, 1, 0, 0, 0, 1, 1, 1, queue, 0, 0, *([0] * 16))
        for place in range(10):
            arrival_s = second + place / 10
            log.requests.append(arrival_s, arrival_s, arrival_s, arrival_s + 1, 0, 1, 1, 1, 0, 0, 0)
    return log


def test_a_growing_queue_is_overload_and_a_wandering_one_is_not():
    growing = [4 * second for second in range(100)]
    wandering = [40 + (-1) ** second * 30 for second in range(100)]
    filled_at_once = [200] * 100
    assert Caveat.OVERLOAD in _caveats(handmade_run(_queue_log(growing)))
    assert Caveat.OVERLOAD not in _caveats(handmade_run(_queue_log(wandering)))
    assert Caveat.OVERLOAD not in _caveats(handmade_run(_queue_log(filled_at_once)))


def test_a_burst_is_told_as_a_burst():
    workload = {
        "arrivals": {"process": "burst"},
        "prompt_tokens": {"law": "fixed", "tokens": 50},
        "output_tokens": {"law": "fixed", "tokens": 3},
        "num_requests": 5,
    }
    summary = summarise(handmade_run(workload=workload))
    assert math.isinf(summary.request_rate)
    assert Caveat.BURST in {warned.caveat for warned in summary.warnings}


def test_the_configuration_hash_follows_every_value():
    assert handmade_run().config_hash == handmade_run().config_hash
    assert handmade_run().config_hash != handmade_run(seed=8).config_hash


def test_seconds_are_counted_however_far_apart_they_are():
    """Microseconds since 1970 taken for seconds: only what happens may take memory, not the time between."""
    log, gap_s = Log(), 1.7e15
    for begin_s in (0.0, gap_s):
        log.steps.append(begin_s, 0.25, 0.0, 3, 1, 0, 0, 9, 2, 1, 1, 0, 0, 0, *([0] * 16))
        for request in range(3):
            log.requests.append(begin_s, begin_s, begin_s + 0.25, begin_s + 0.75, request, 1, 2, 2, 0, 0, 0)
    summary = summarise(handmade_run(log))
    assert summary.max_output_tokens_per_s == 6
    assert summary.max_concurrent_requests == 3


@given(st.lists(st.tuples(st.floats(0, 9), st.floats(0, 9)), min_size=1, max_size=12))
def test_the_most_concurrent_requests_are_those_that_touch_one_second(stays):
    log = Log()
    for arrival_s, stay_s in stays:
        log.requests.append(arrival_s, arrival_s, arrival_s, arrival_s + stay_s, 0, 1, 1, 1, 0, 0, 0)
    first_s = min(arrival_s for arrival_s, _ in stays)
    touched = [
        range(int(arrival_s - first_s), int(arrival_s + stay_s - first_s) + 1) for arrival_s, stay_s in stays
    ]
    most = max(sum(second in each for each in touched) for second in range(20))
    assert summarise(handmade_run(log)).max_concurrent_requests == most


def test_the_most_tokens_in_a_second_are_those_of_all_replicas():
    """Rows of replicas come one after another, so that a second is met again."""
    log = Log()
    for _ in range(2):
        for second in range(3):
            log.steps.append(second + 0.4, 0.2, 0.0, 1, 1, 0, 0, 9, 2 + second, 0, 1, 0, 0, 0, *([0] * 16))
    log.steps.parts = (3, 3)
    log.requests.append(0.0, 0.0, 0.6, 2.6, 0, 1, 9, 9, 0, 0, 0)
    assert summarise(handmade_run(log)).max_output_tokens_per_s == 8
