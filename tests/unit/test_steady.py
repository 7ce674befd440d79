"""The steady part of a run: rates of all replicas, peaks, and counters of the window alone."""

from __future__ import annotations

import pytest

from handmade import handmade_log, handmade_run
from servesim.analysis.metrics import summarise
from servesim.analysis.steady import steady_summary
from servesim.engine.events import Log

RATES = ("request_throughput", "request_goodput", "output_throughput", "total_token_throughput")


def test_simulated_replicas_stand_for_all_in_the_steady_part_too() -> None:
    slo = {"ttft_p99_s": 0.6}
    one = steady_summary(handmade_run(slo=slo), 0.0)
    fleet = {"gpu": "h100-sxm", "replicas": 50, "simulated_replicas": 2}
    many = steady_summary(handmade_run(hardware=fleet, slo=slo), 0.0)
    for name in RATES:
        assert getattr(one, name) > 0, name
        assert getattr(many, name) == pytest.approx(25 * getattr(one, name)), name
    assert many.offered_rate == pytest.approx(25 * one.offered_rate)
    assert many.num_gpus == 50 * one.num_gpus


def test_steps_of_the_window_may_begin_before_its_first_arrival() -> None:
    """A long answer is still being written, seconds before the next request comes."""
    log = Log()
    for second in range(20):
        log.steps.append(float(second), 1.0, 0.0, 1, 1, 0, 0, 9, 1 + second % 2, 1, 1, 0, 0, 0, *([0] * 16))
    for arrival_s, finish_s in ((0.0, 12.0), (8.0, 9.0), (15.0, 16.0), (20.0, 20.0)):
        log.requests.append(arrival_s, arrival_s, arrival_s, finish_s, 0, 9, 9, 9, 0, 0, 0)
    steady = steady_summary(handmade_run(log), 0.1)
    assert (steady.completed, steady.max_output_tokens_per_s) == (1, 2)
    # From 2.0 until one 90th percentile of the latencies (8.7 s) before the last arrival: ten steps.
    assert steady.output_throughput == pytest.approx(15 / 9.3)


def test_what_the_log_counts_over_a_whole_run_is_of_the_window_or_left_out() -> None:
    """Of three decodes one is in the window, beside a chunk of ten tokens."""
    log = handmade_log()
    log.counters |= {"spec_decode_num_draft_tokens": 30, "admission_failures_seats": 4, "copied_blocks": 7}
    whole, steady = handmade_run(log), steady_summary(handmade_run(log), 0.3)
    assert summarise(whole).load.mean_step_tokens == pytest.approx((150 + 2 + 10 + 1 + 20 + 30) / 6)
    assert steady.load.num_steps == 2
    assert steady.load.mean_step_tokens == pytest.approx((10 + 1 + 30 / 3) / 2)
    assert summarise(whole).load.admission_failures == {"seats": 4}
    assert summarise(whole).load.blocks_moved == {"copied_blocks": 7}
    assert steady.load.admission_failures == steady.load.blocks_moved == {}
