"""The steady part of a run: rates of all replicas, peaks, and counters of the window alone."""

from __future__ import annotations

import pytest

from handmade import handmade_run
from servesim.analysis.steady import steady_summary

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
