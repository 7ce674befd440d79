"""Calibration: it finds again what was put in, keeps some requests out, and refuses what cannot be told."""

from __future__ import annotations

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from servesim import api
from servesim.analysis.benchmark import read_benchmark
from servesim.analysis.calibrate import MeasuredRow, calibrate_requests, calibrate_rows
from servesim.analysis.figures import figures_of
from servesim.analysis.fit import fit_identified
from servesim.analysis.measured import Latencies, MeasuredRequests, MeasuredWorkload, simulated_latencies
from servesim.analysis.metrics import summarise
from servesim.analysis.simulation import prepare, run_prepared
from servesim.cli import app
from servesim.config.engine_profile import load_engine_profile
from servesim.config.load import load_scenario
from servesim.errors import CalibrationError

SCENARIO = """
name: server
model: llama-3.1-8b
hardware: {gpu: h100-sxm}
engine: {version: "0.26", max_model_len: 8192, max_num_seqs: 64, async_scheduling: false}
workload:
  arrivals: {process: gamma, rate_per_s: 10, burstiness: 0.2}
  num_requests: 240
  prompt_tokens: {law: lognormal, median_tokens: 500, sigma: 0.8, max_tokens: 4000}
  output_tokens: {law: lognormal, median_tokens: 150, sigma: 0.7, max_tokens: 1000}
"""
RUNNER = CliRunner()


@pytest.fixture(scope="module")
def scenario(tmp_path_factory):
    path = tmp_path_factory.mktemp("calibrate") / "server.yaml"
    path.write_text(SCENARIO)
    return path


def served(scenario, *overrides):
    """What a server would measure that differs from the simulation by ``overrides``."""
    prepared = prepare(load_scenario(scenario, overrides))
    latencies = simulated_latencies(run_prepared(prepared))
    prompts = [request.prompt_tokens for request in prepared.workload.arrivals()]
    return MeasuredRequests(np.array(prompts), latencies)


def test_it_finds_the_factor_and_the_host_time_again(scenario):
    measured = served(
        scenario, "engine.step_time.gpu_time_factor=1.3", "engine.step_time.exposed_host_s=0.004"
    )
    found = calibrate_requests(load_scenario(scenario), measured, "made up", "server")
    assert found.profile.gpu_time_factor == pytest.approx(1.3, rel=0.04)
    assert found.profile.exposed_host_s == pytest.approx(0.004, rel=0.1)
    assert found.profile.fitted_under == {"async_scheduling": False}
    assert "KV pool never filled" in found.profile.not_identified["num_gpu_blocks"]
    assert found.judged_on == "requests 121 to 240"
    for metric in ("mean_ttft_ms", "mean_tpot_ms", "mean_e2el_ms"):
        assert abs(found.before[metric]) > 0.2
        assert abs(found.after[metric]) < abs(found.before[metric]) / 8
    assert abs(found.after["mean_tpot_ms"]) < 0.01
    assert found.profile.held_out_error["mean_tpot_ms"] == pytest.approx(
        found.after["mean_tpot_ms"], abs=1e-4
    )


def test_it_finds_the_pool_when_the_pool_is_what_limits(scenario):
    little = "engine.gpu_memory_utilization=0.25"
    measured = served(scenario, little, "engine.num_gpu_blocks_override=1000")
    loaded = load_scenario(scenario, [little])
    assert prepare(loaded).memory.num_gpu_blocks > 1400
    found = calibrate_requests(loaded, measured, "made up", "server")
    assert found.profile.num_gpu_blocks == pytest.approx(1000, rel=0.1)
    assert found.profile.gpu_time_factor is None
    assert found.profile.fitted_under["gpu_memory_utilization"] == 0.25
    assert "async_scheduling" not in found.profile.fitted_under
    assert abs(found.after["mean_e2el_ms"]) < abs(found.before["mean_e2el_ms"]) / 3


def test_a_factor_found_with_one_model_is_carried_over_to_another(scenario):
    """Two rows of one model tell the factor, one of another model judges it: the profile names no model."""
    pool = "engine.num_gpu_blocks_override=8000"

    def row(name, judged, *overrides):
        slowed = prepare(load_scenario(scenario, [pool, *overrides, "engine.step_time.gpu_time_factor=1.25"]))
        loaded = load_scenario(scenario, [pool, *overrides])
        return MeasuredRow(name, loaded, figures_of(summarise(run_prepared(slowed))), judged)

    rows = [
        row("few", False),
        row("many", False, "workload.arrivals.rate_per_s=20"),
        row("other", True, "model=qwen3-8b"),
    ]
    found = calibrate_rows(rows, "made up", "mine")
    assert found.profile.gpu_time_factor == pytest.approx(1.25, rel=0.02)
    assert (found.profile.model, found.profile.gpu) == (None, "h100-sxm")
    assert found.profile.tensor_parallel_size == 1
    assert abs(found.after["median mean_tpot_ms"]) < 0.02 < abs(found.before["median mean_tpot_ms"])


def test_rows_are_fitted_and_judged_by_the_figures_that_they_have(scenario):
    pool = "engine.num_gpu_blocks_override=8000"

    def row(judged, rate, *keys):
        at = [pool, "workload.num_requests=60", f"workload.arrivals.rate_per_s={rate}"]
        slowed = prepare(load_scenario(scenario, [*at, "engine.step_time.gpu_time_factor=1.25"]))
        figures = figures_of(summarise(run_prepared(slowed)))
        return MeasuredRow(
            f"{rate}", load_scenario(scenario, at), {key: figures[key] for key in keys}, judged
        )

    rows = [row(False, 10, "mean_tpot_ms"), row(False, 20, "median_itl_ms", "duration")]
    rows += [row(True, 15, "mean_tpot_ms"), row(False, 5, "duration"), row(True, 5, "duration")]
    found = calibrate_rows(rows, "made up", "mine")
    assert found.profile.gpu_time_factor == pytest.approx(1.25, rel=0.03)
    assert found.profile.provenance == "made up; rows 10, 20"
    assert found.judged_on == "1 other rows"
    assert list(found.after) == ["median mean_tpot_ms"]
    with pytest.raises(CalibrationError, match=r"two rows to fit to, with mean_tpot_ms or.*got 1 and 1"):
        calibrate_rows(rows[1:], "made up", "mine")
    with pytest.raises(CalibrationError, match=r"one to judge, with total.*got 2 and 0"):
        calibrate_rows([*rows[:2], rows[-1]], "made up", "mine")


def test_a_pool_that_the_scenario_gives_is_not_fitted(scenario):
    small = "engine.num_gpu_blocks_override=1500"
    measured = served(scenario, small, "engine.step_time.gpu_time_factor=1.2")
    found = calibrate_requests(load_scenario(scenario, [small]), measured, "made up", "server")
    assert found.profile.num_gpu_blocks is None
    assert "num_gpu_blocks" not in found.profile.not_identified
    assert found.profile.gpu_time_factor == pytest.approx(1.2, rel=0.03)


def test_the_fit_looks_at_the_first_half_only(scenario):
    measured = served(scenario, "engine.step_time.gpu_time_factor=1.3")
    half = len(measured.latencies) // 2
    late = measured.latencies.e2e_s.copy()
    late[half:] *= 3
    changed = MeasuredRequests(
        measured.prompt_tokens,
        type(measured.latencies)(
            measured.latencies.arrival_s, measured.latencies.output_tokens, measured.latencies.ttft_s, late
        ),
    )
    loaded = load_scenario(scenario)
    plain = calibrate_requests(loaded, measured, "a", "a").profile
    other = calibrate_requests(loaded, changed, "a", "a")
    assert other.profile.gpu_time_factor == plain.gpu_time_factor
    assert other.after["mean_e2el_ms"] < -0.5, "the held-out half shows what the first did not"


@pytest.mark.parametrize("two_tokens_of", [0, 30, 3])
def test_requests_of_one_token_tell_no_time_per_token(scenario, two_tokens_of):
    """One in so many yields two tokens, or none; the factor comes out of what is left."""
    loaded = load_scenario(scenario)
    prompts = served(scenario).prompt_tokens
    outputs = np.where(np.arange(240) % two_tokens_of == 0, 2, 1) if two_tokens_of else np.ones(240, np.int64)
    arrivals = np.arange(240) * 0.02
    asked = MeasuredRequests(prompts, Latencies(arrivals, outputs, arrivals + 1, arrivals + 2))
    slow = prepare(load_scenario(scenario, ["engine.step_time.gpu_time_factor=1.3"]), MeasuredWorkload(asked))
    measured = MeasuredRequests(prompts, simulated_latencies(run_prepared(slow)))
    found = calibrate_requests(loaded, measured, "made up", "server")
    assert found.profile.gpu_time_factor == pytest.approx(1.3, rel=0.05)
    assert ("mean_tpot_ms" in found.after) is bool(two_tokens_of)
    assert np.isfinite([*found.before.values(), *found.after.values()]).all()


def test_too_few_requests_are_refused(scenario):
    measured = served(scenario)
    few = MeasuredRequests(measured.prompt_tokens[:30], measured.latencies.part(slice(0, 30)))
    with pytest.raises(CalibrationError, match=r"at least 40 requests.*got 30"):
        calibrate_requests(load_scenario(scenario), few, "a", "a")


def test_a_law_without_scalars_is_refused(scenario):
    linear = ("engine.step_time.law=linear", "engine.step_time.base_s=0.01")
    with pytest.raises(CalibrationError, match="no scalars to fit"):
        calibrate_requests(load_scenario(scenario, linear), served(scenario), "a", "a")


LIMITS = dict.fromkeys("abc", (-1.6, 1.6))


def test_what_moves_nothing_and_what_moves_the_same_is_not_fitted():
    x = np.linspace(0, 1, 40)

    def residuals(values):
        return (1 + x) * (values["a"] + values["b"] - 0.3)

    fit = fit_identified(residuals, "abc", LIMITS)
    assert fit.values["a"] == pytest.approx(0.3, abs=0.01)
    assert fit.values["b"] == fit.values["c"] == 0
    assert fit.untold == {"b": ("alike", "a"), "c": ("still", "")}


def test_noise_that_hides_a_parameter_is_told():
    noise = np.random.default_rng(1).normal(0, 1.0, 20)
    fit = fit_identified(lambda values: noise + 0.1 * values["a"], "a", LIMITS)
    assert fit.untold == {"a": ("needless", "")}
    fit = fit_identified(lambda values: 0.3 * noise + 0.1 * (values["a"] - 3), "a", {"a": (-5, 5)})
    assert fit.untold == {"a": ("vague", "")}
    assert fit.standard_errors == {}


def test_two_parameters_that_differ_are_both_found():
    x = np.linspace(0, 1, 40)
    fit = fit_identified(lambda v: (v["a"] - 0.2) * (1 - x) + (v["b"] + 0.4) * x, "ab", LIMITS)
    assert fit.values == pytest.approx({"a": 0.2, "b": -0.4}, abs=1e-3)
    assert fit.untold == {}


def bench_result(measured, **changes):
    latencies = measured.latencies
    gaps = latencies.output_tokens - 1
    decode_s = latencies.e2e_s - latencies.ttft_s
    result = {
        "request_rate": 12.0,
        "max_concurrency": None,
        "input_lens": measured.prompt_tokens.tolist(),
        "output_lens": latencies.output_tokens.tolist(),
        "ttfts": latencies.ttft_s.tolist(),
        "itls": [
            [float(total / count)] * int(count) if count else []
            for total, count in zip(decode_s, gaps, strict=True)
        ],
        "start_times": (1e5 + latencies.arrival_s).tolist(),
    }
    return {key: value for key, value in {**result, **changes}.items() if value is not ...}


def test_a_benchmark_is_read_as_it_was_measured(scenario, tmp_path):
    measured = served(scenario)
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(bench_result(measured)))
    found = read_benchmark(path)
    assert found.prompt_tokens.tolist() == measured.prompt_tokens.tolist()
    sent_s = measured.latencies.arrival_s - measured.latencies.arrival_s[0]
    assert found.latencies.arrival_s == pytest.approx(sent_s, abs=1e-6)
    assert found.latencies.ttft_s == pytest.approx(measured.latencies.ttft_s)
    assert found.latencies.e2e_s == pytest.approx(measured.latencies.e2e_s)


def test_a_failed_request_is_left_out_and_the_order_is_that_of_sending(scenario, tmp_path):
    result = bench_result(served(scenario))
    result["start_times"][0] += 1000
    result["output_lens"][1] = 0
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(result))
    found = read_benchmark(path)
    assert len(found.latencies) == 239
    assert found.latencies.arrival_s[-1] > 900
    assert found.latencies.arrival_s[0] == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"itls": ..., "ttfts": ...}, "has no ttfts, itls.*--save-detailed"),
        ({"start_times": ...}, "no start_times.*got request_rate 12.0.*vLLM 0.26"),
        ({"start_times": ..., "request_rate": "inf", "max_concurrency": 8}, "max_concurrency 8"),
        ({"input_lens": [1]}, "lists of different length"),
    ],
)
def test_a_benchmark_that_tells_too_little_is_refused(scenario, tmp_path, changes, words):
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(bench_result(served(scenario), **changes)))
    with pytest.raises(CalibrationError, match=words):
        read_benchmark(path)


def test_without_start_times_a_burst_is_all_at_once(scenario, tmp_path):
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(bench_result(served(scenario), start_times=..., request_rate="inf")))
    assert not read_benchmark(path).latencies.arrival_s.any()


def test_the_command_writes_a_profile_that_a_scenario_can_name(scenario, tmp_path):
    measured = served(scenario, "engine.step_time.gpu_time_factor=1.3")
    bench = tmp_path / "bench.json"
    bench.write_text(json.dumps(bench_result(measured)))
    result = RUNNER.invoke(
        app, ["calibrate", str(bench), "--scenario", str(scenario), "--out", str(tmp_path)]
    )
    assert result.exit_code == 0, result.output
    assert "gpu_time_factor" in result.stdout
    assert "Held out (requests 121 to 240)" in result.stdout
    path = tmp_path / "server-calibrated.yaml"
    assert load_engine_profile(path).gpu_time_factor == pytest.approx(1.3, rel=0.04)
    assert load_engine_profile(path).fitted_under.keys() <= {"async_scheduling"}
    profiled = api.simulate(load_scenario(scenario, [f"engine.profile={path}"]))
    expected_s = float(measured.latencies.tpot_s[measured.latencies.output_tokens > 1].mean())
    assert profiled.summary.tpot.mean_s == pytest.approx(expected_s, rel=0.03)


def test_a_benchmark_without_a_scenario_is_refused(scenario, tmp_path):
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(bench_result(served(scenario))))
    with pytest.raises(CalibrationError, match=r"does not say what served it.*--scenario"):
        api.calibrate(path)
    for asked in ({"scenario": scenario}, {"overrides": ["engine.max_num_seqs=8"]}):
        with pytest.raises(
            CalibrationError, match=r"scenarios of their own  -> leave out --scenario and --set"
        ):
            api.calibrate(tmp_path, **asked)
    path.write_text("not json")
    with pytest.raises(CalibrationError, match="cannot be read as JSON"):
        api.calibrate(path, scenario)
