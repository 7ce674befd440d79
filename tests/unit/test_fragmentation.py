"""The account of the KV pool: shares, intervals, closed forms, cost, and that they agree with simulation."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from handmade import POOL, handmade_log, handmade_run
from servesim import api
from servesim.analysis.closed_form import empty_in_last_block, served_requests
from servesim.analysis.fragmentation import average, fragmentation
from servesim.analysis.shares import FRAGMENT_CLASSES, LOST_CLASSES, shares_of
from servesim.analysis.simulation import prepare
from servesim.analysis.timeline import KV_CLASSES, timeline
from servesim.config.load import load_scenario
from servesim.engine.build import build_scheduler
from servesim.engine.events import Log

BURST = "workload.arrivals={process: burst}"
SHORT = ["workload.trace.max_requests=1000", "workload.trace.rate_scale=6"]


@pytest.fixture(scope="module")
def paged():
    result = api.simulate("azure-conv-h100", overrides=SHORT)
    return result.fragmentation


@pytest.fixture(scope="module")
def contiguous():
    result = api.simulate("azure-conv-h100-contiguous", overrides=SHORT)
    return result.fragmentation


# ---- shares ----------------------------------------------------------------------------------------


def test_shares_of_the_handmade_run_by_hand():
    line = timeline(handmade_log().steps, 0.0)
    whole = shares_of(line, POOL, 0, queued_only=False)
    # 150 for 0.5 s, (101 * 0.10 + 102 * 0.12), 10 for 0.28 s, 11 for 0.2 s, nothing for 0.8 s, 20 for 0.3 s
    tokens = 150 * 0.5 + 101 * 0.10 + 102 * 0.12 + 10 * 0.28 + 11 * 0.2 + 20 * 0.3
    assert whole.of["tokens"].mean == pytest.approx(tokens / 2.3 / POOL)
    assert whole.time_s == pytest.approx(2.3)
    queued = shares_of(line, POOL, 0, queued_only=True)
    assert queued.time_s == pytest.approx(0.22)
    assert queued.of["tokens"].mean == pytest.approx((101 * 0.10 + 102 * 0.12) / 0.22 / POOL)
    assert queued.of["tokens"].peak == pytest.approx(102 / POOL)
    assert whole.of["tokens"].peak == pytest.approx(150 / POOL)
    assert whole.of["tokens"].median == pytest.approx(0.011, abs=0.01)


def test_the_classes_add_up_with_a_watermark():
    line = timeline(handmade_log().steps, 0.0)
    for slots in (0, 100, 2 * POOL):
        shares = shares_of(line, POOL, slots, queued_only=False)
        assert sum(share.mean for share in shares.of.values()) == pytest.approx(1)
        assert shares.of["watermark"].mean == pytest.approx(min(slots / POOL, shares.of["watermark"].mean))
    assert shares.of["free"].mean == 0
    assert shares.lost == pytest.approx(sum(shares.of[name].mean for name in LOST_CLASSES))


def test_nothing_waits_nothing_to_average():
    line = timeline(handmade_log().steps, 0.0)
    line.columns["waiting"][:] = 0
    assert shares_of(line, POOL, 0, queued_only=True) is None


def test_the_classes_are_the_logs_and_the_watermark():
    assert set(FRAGMENT_CLASSES) == {*KV_CLASSES, "watermark"}


def test_an_interval_covers_the_mean_of_a_long_stationary_run():
    """Rows that jump between two levels at random: the mean is known, and inside the interval."""
    log, level = Log(), np.random.default_rng(3).integers(0, 2, 20_000)
    for step, high in enumerate(level.tolist()):
        tokens = 200 + 400 * high
        pool = [tokens, 0, 0, 0, 0, 0, POOL - tokens, tokens]
        log.steps.append(step * 0.01, 0.01, 0.0, 1, 1, 0, 0, 9, 1, 1, 1, 0, 0, 0, *(pool * 2))
    share = shares_of(timeline(log.steps, 0.0), POOL, 0, queued_only=False).of["tokens"]
    assert 0 < share.half_width < 0.02
    assert abs(share.mean - 0.4) < 2 * share.half_width


def test_classes_that_do_not_add_up_are_refused():
    log = handmade_log()
    log.steps.append(3.0, 0.1, 0.0, 1, 1, 0, 0, 9, 1, 1, 1, 0, 0, 0, *([1, 2, 3, 4, 5, 6, 7, 1] * 2))
    with pytest.raises(ArithmeticError, match="off by"):
        fragmentation(handmade_run(log))


# ---- closed form -----------------------------------------------------------------------------------


def test_empty_slots_of_a_last_block_against_counting():
    rng = np.random.default_rng(1)
    prompt, output = rng.integers(1, 200, 50), rng.integers(1, 300, 50)
    for block_size in (1, 7, 16, 256):
        held = [n for p, o in zip(prompt, output, strict=True) for n in range(p, p + o)]
        expected = np.mean([-n % block_size for n in held])
        assert empty_in_last_block(prompt, output, block_size) == pytest.approx(expected)


def test_uniform_ends_leave_half_a_block():
    prompt, output = np.arange(1, 17), np.full(16, 1600)
    assert empty_in_last_block(prompt, output, 16) == pytest.approx(7.5)


@pytest.mark.parametrize("allocator", ["paged", "contiguous"])
def test_closed_form_and_simulation_agree_in_saturation(allocator, paged, contiguous):
    account = {"paged": paged, "contiguous": contiguous}[allocator]
    assert account.has_queue
    predicted = account.predicted_shares()
    for name in ("tokens", "reserved", "internal"):
        assert predicted[name] == pytest.approx(account.pressed.of[name].mean, abs=0.01), name
    assert account.pressed_running == pytest.approx(account.predicted.requests_that_fit, rel=0.03)


def test_moments_of_a_length_law():
    """Contiguous reserve: a running request still needs E[O (O - 1)] / (2 E[O]) slots."""
    overrides = [
        "engine.allocator=contiguous-max",
        "engine.enable_prefix_caching=false",
        "workload.trace.max_requests=500",
    ]
    run = api.simulate("azure-conv-h100", overrides=overrides).run
    served = served_requests(run)
    account = fragmentation(run)
    output = served.output
    assert account.predicted.reserved == pytest.approx((output * (output - 1)).mean() / (2 * output.mean()))
    assert account.predicted.requests_that_fit == account.identity.pool_slots // 16_384


@pytest.mark.parametrize(("allocator", "known"), [("paged", False), ("contiguous-max", True)])
def test_no_closed_form_where_layers_give_up_what_lies_behind_their_window(allocator, known):
    overrides = [
        "model=gemma-3-27b",
        f"engine.allocator={allocator}",
        "engine.enable_prefix_caching=false",
        "engine.max_model_len=4096",
        "workload.num_requests=40",
    ]
    account = api.simulate("poisson-chat", overrides=overrides).fragmentation
    assert (account.predicted is not None) is known
    assert len(account.waste.output_tokens) > 0


@pytest.mark.parametrize(
    "settings",
    [
        ["allocator=paged"],
        ["allocator=contiguous-max"],
        ["allocator=contiguous-pow2"],
        ["allocator=contiguous-oracle", "contiguous_fit=buddy"],
    ],
)
def test_waste_of_a_request_is_what_the_manager_says(settings):
    overrides = ["engine.enable_prefix_caching=false", *(f"engine.{one}" for one in settings)]
    loaded = load_scenario("azure-conv-h100", [*overrides, "workload.trace.max_requests=200"])
    prepared = prepare(loaded)
    kv = build_scheduler(prepared.engine, prepared.memory, (None,)).kv
    served = served_requests(api.simulate(loaded).run)
    for prompt, output, wasted in zip(served.prompt, served.output, served.wasted, strict=True):
        sequence = kv.new_sequence((), int(prompt), None, int(output))
        assert kv.final_waste(sequence, int(prompt + output - 1))[0] == wasted


# ---- the account -----------------------------------------------------------------------------------


def test_the_account_of_a_real_run_is_whole(paged, contiguous):
    for account in (paged, contiguous):
        assert account.identity.holds
        assert account.identity.instants > 1000
        for shares in (account.whole, account.in_queue):
            assert sum(share.mean for share in shares.of.values()) == pytest.approx(1)
            for share in shares.of.values():
                assert share.p5 <= share.median <= share.p95 <= share.peak + 1e-12


def test_what_is_lost_costs(paged, contiguous):
    assert contiguous.pressed.lost > 0.9 > 0.02 > paged.pressed.lost
    cost = contiguous.cost
    assert cost.lost_bytes == pytest.approx(cost.pool_bytes * contiguous.pressed.lost)
    assert cost.lost_gpus == pytest.approx(contiguous.pressed.lost)
    result = api.simulate("azure-conv-h100-contiguous", overrides=SHORT)
    price = result.run.gpu.price_per_hour_usd
    assert cost.lost_usd_per_hour == pytest.approx(cost.lost_gpus * price)
    million = price / 3600 / result.summary.output_throughput * 1e6
    assert cost.usd_per_million_output_tokens == pytest.approx(million)


def test_seeds_as_one_account():
    runs = [
        api.simulate("poisson-chat", overrides=["workload.num_requests=300", f"seed={seed}"]).run
        for seed in (1, 2, 3)
    ]
    accounts = [fragmentation(run) for run in runs]
    mean = average(accounts)
    tokens = [account.whole.of["tokens"].mean for account in accounts]
    assert mean.whole.of["tokens"].mean == pytest.approx(np.mean(tokens))
    half = 4.302653 * np.std(tokens, ddof=1) / math.sqrt(3)  # t of 95 % with two degrees of freedom
    assert mean.whole.of["tokens"].half_width == pytest.approx(half, rel=1e-4)
    assert mean.whole.interval == "3 replications"
    assert mean.seeds == (1, 2, 3)
    assert mean.identity.instants == sum(account.identity.instants for account in accounts)
    assert average(accounts[:1]) is accounts[0]


def test_what_seeds_lost_is_of_the_period_that_is_shown():
    """One seed has a queue and the other hardly any, so that both together have none to speak of."""
    one = fragmentation(handmade_run())
    other = replace(one, in_queue=replace(one.in_queue, time_s=0.001))
    mean = average([one, other])
    assert (one.has_queue, other.has_queue, mean.has_queue) == (True, False, False)
    assert one.in_queue.lost != one.whole.lost
    assert mean.cost.lost_gpus == pytest.approx(one.whole.lost)
    assert mean.cost.lost_bytes == pytest.approx(mean.cost.pool_bytes * mean.pressed.lost)


def test_tokens_cost_what_was_paid_for_a_fleet_that_grows():
    """Forty requests at once on one replica, of at most six."""
    rule = "{autoscaler: {max_replicas: 6, target: 10, interval_s: 5, startup_s: 10}}"
    changes = ["workload.num_requests=40", "hardware.router=least-outstanding", f"fleet={rule}"]
    result = api.simulate("poisson-chat", overrides=changes)
    paid = result.summary.fleet.scaling
    assert paid.mean_paid < 5
    cost, tokens = result.fragmentation.cost, result.summary.total_output_tokens
    assert cost.usd_per_million_output_tokens == pytest.approx(paid.cost_usd / tokens * 1e6)
    assert cost.lost_usd_per_hour == pytest.approx(cost.lost_gpus * result.run.gpu.price_per_hour_usd)


def test_a_run_that_takes_no_time_has_no_account():
    still = "engine.step_time={law: linear, base_s: 0}"
    changes = ["workload.num_requests=5", "workload.sessions=null", still, BURST]
    result = api.simulate("poisson-chat", overrides=changes)
    assert result.summary.completed == 5
    assert result.fragmentation is None
    assert json.loads(result.to_json())["fragmentation"] is None
    assert "Fragmentation" not in result.to_html()


def test_the_result_json_tells_the_account():
    result = api.simulate("poisson-chat", overrides=["workload.num_requests=200"])
    told = json.loads(result.to_json())["fragmentation"]
    assert told["identity"]["holds"] is True
    assert told["allocator"] == "paged"
    shares = told["whole"]["classes"]
    assert sum(share["mean"] for share in shares.values()) == pytest.approx(1)
    assert told["closed_form"]["requests_that_fit"] > 100
    assert "Fragmentation" in result.to_html()
