"""Figures of simulated runs that must agree because they count the same things by different ways."""

from __future__ import annotations

import numpy as np
import pytest

from servesim.analysis.metrics import summarise
from servesim.analysis.series import time_series
from servesim.analysis.simulation import prepare, run_prepared
from servesim.api import simulate
from servesim.config.load import load_scenario

CHAT = ("workload.num_requests=400",)
SCENARIOS = {
    "paged": ("poisson-chat", CHAT),
    # 120 blocks of 16: far too few, so that requests are preempted and wait.
    "preempting": (
        "poisson-chat",
        (*CHAT, "engine.num_gpu_blocks_override=120", "engine.max_model_len=1500"),
    ),
    "contiguous": ("azure-conv-h100-contiguous", ("workload.trace.max_requests=400",)),
}


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_a_stopped_run_ends_there_and_says_so(asynchronous):
    """Also where nothing but arrivals and ends happens, and the engine's innermost loop goes on and on."""
    ends = [f"engine.async_scheduling={asynchronous}", "workload.trace.max_requests=2000"]
    prepared, ended = prepare(load_scenario("std10k", ends)), []
    log = run_prepared(prepared, on_end=ended.append, stop=lambda: len(ended) >= 50).log
    assert log.interrupted
    assert 50 <= len(ended) < 60
    status = np.bincount(log.requests.columns["status"], minlength=5)
    assert status[0] == len(ended)
    assert status[3] > 0, "who was running is written down"


@pytest.fixture(scope="module", params=SCENARIOS)
def run(request):
    scenario, overrides = SCENARIOS[request.param]
    return simulate(scenario, overrides=overrides).run


def test_every_token_but_a_requests_first_has_a_latency(run):
    summary = summarise(run)
    assert summary.itl.count == summary.total_output_tokens - summary.completed
    decode_s = np.subtract(run.log.requests.columns["finish_s"], run.log.requests.columns["first_token_s"])
    assert summary.itl.mean_s * summary.itl.count == pytest.approx(np.nansum(decode_s), rel=1e-9)


def test_classes_add_up_and_shares_to_one(run):
    kv = summarise(run).kv
    assert kv.adds_up
    assert sum(kv.mean.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("scenario", "queues"), [("azure-conv-h100", False), ("azure-conv-h100-contiguous", True)]
)
def test_littles_law_holds_for_running_requests(scenario, queues):
    """The mean number of running requests is the time that they spend running, together, over the horizon.

    Exact with one step in flight: a request then counts from the step that admits it to its last.
    """
    # 80,000 slots: room for five contiguous requests, so that there is a queue.
    pool = "engine.kv_cache_memory_bytes=10485760000"
    overrides = ("workload.trace.max_requests=300", "engine.async_scheduling=false", pool)
    run = simulate(scenario, overrides=overrides).run
    summary, column = summarise(run), run.log.requests.columns
    spent_s = np.subtract(column["finish_s"], column["scheduled_s"]).sum()
    assert summary.load.preemptions == 0
    assert (summary.load.peak_waiting > 5) == queues
    assert summary.load.mean_running * summary.load.horizon_s == pytest.approx(spent_s, rel=1e-9)


def test_tokens_over_time_are_all_tokens(run):
    series, summary = time_series(run), summarise(run)
    assert series.output_tokens_per_s.sum() * series.bin_s == pytest.approx(summary.total_output_tokens)
    assert series.finishes_per_s.sum() * series.bin_s == pytest.approx(summary.completed)


def test_a_pool_too_small_preempts():
    scenario, overrides = SCENARIOS["preempting"]
    assert summarise(simulate(scenario, overrides=overrides).run).load.preemptions > 0
