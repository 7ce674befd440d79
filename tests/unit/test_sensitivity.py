"""Sensitivity: analytic elasticities come out, inputs move what they say, doubts are kept apart."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import cast

import numpy as np
import pytest

import servesim
from servesim.analysis.inputs import inputs_of
from servesim.analysis.metrics import summarise
from servesim.analysis.model_error import ModelError, joint_errors, model_error
from servesim.analysis.replications import run_replication, with_seed
from servesim.analysis.sensitivity import Task, run_task
from servesim.analysis.simulation import prepare, run_prepared
from servesim.config.files import list_data, shipped
from servesim.config.load import load_scenario
from servesim.workload.altered import burstier

TOY = """\
name: toy
model: llama-3.1-8b
hardware: {gpu: h100-sxm}
engine:
  max_model_len: 4096
  max_num_seqs: 1
  async_scheduling: false
  enable_prefix_caching: false
  step_time: {law: linear, base_s: 0.01, per_token_s: 0.0001}
workload:
  num_requests: 30
  arrivals: {process: poisson, rate_per_s: 0.01}
  prompt_tokens: {law: fixed, tokens: 1000}
  output_tokens: {law: fixed, tokens: 20}
"""


def study(folder: Path, text: str, *overrides: str, replications: int = 3) -> servesim.SensitivityStudy:
    (folder / "toy.yaml").write_text(text)
    return servesim.sensitivity(folder / "toy.yaml", replications, overrides=overrides, jobs=1)


def test_a_linear_toy_has_its_analytic_elasticities(tmp_path: Path) -> None:
    """Alone, a request takes 20 steps of 10 ms, and 0.1 ms for each of its 1,000 + 19 tokens."""
    found = study(tmp_path, TOY)
    effects = {one.input.key: one for one in found.sensitivity.effects("mean_e2el_ms")}
    constant, per_token = 20 * 0.01, 1019 * 0.0001
    whole = constant + per_token
    wanted = {
        "base_s": constant / whole,
        "per_token_s": per_token / whole,
        "prompt_tokens": 1000 * 0.0001 / whole,
        "output_tokens": 20 * (0.01 + 0.0001) / whole,
        "rate": 0.0,
        "burstiness": 0.0,
    }
    assert effects.keys() == wanted.keys()
    for key, elasticity in wanted.items():
        one = effects[key].elasticity
        assert one is not None
        assert one.value == pytest.approx(elasticity, abs=0.01), key
        assert one.half_width < 0.02, key
    down, up = effects["base_s"].down, effects["base_s"].up
    assert down is not None
    assert up is not None
    assert (down.value, up.value) == pytest.approx((-0.1 * wanted["base_s"], 0.1 * wanted["base_s"]))
    assert list(effects)[:2] == ["output_tokens", "base_s"]


def keys(overrides: list[str], scenario: str = "std10k", *, hits: bool = False) -> set[str]:
    return {one.key for one in inputs_of(load_scenario(scenario, overrides), hits)}


def test_inputs_are_those_that_apply() -> None:
    machine = {"memory_rate", "compute_rate", "launch", "host_time"}
    lengths = {"prompt_tokens", "output_tokens"}
    assert keys([]) == machine | lengths | {"rate", "burstiness"}
    assert "host_time" not in keys(["engine.step_time.host=none"])
    assert "link_rate" in keys(["engine.tensor_parallel_size=2"])
    assert keys([], "closed-loop-sharegpt") == machine | lengths
    mooncake = keys([], "mooncake-conv-h100", hits=True)
    assert "prompt_tokens" not in mooncake
    assert {"hit_rate", "output_tokens"} <= mooncake
    drafts = "{method: eagle, num_speculative_tokens: 3, acceptance: {law: iid, rate: 0.6}}"
    assert "acceptance" in keys([f"engine.speculative={drafts}"])


@pytest.mark.parametrize(
    ("key", "better"),
    [
        ("memory_rate", "up"),
        ("compute_rate", "up"),
        ("launch", "down"),
        ("host_time", "down"),
        ("link_rate", "up"),
    ],
)
def test_a_better_machine_is_faster(key: str, better: str) -> None:
    loaded = load_scenario("std10k", ["workload.trace.max_requests=40", "engine.tensor_parallel_size=2"])
    [one] = [one for one in inputs_of(loaded, hits=False) if one.key == key]
    times = {factor: simulated_e2e_s(one.move(loaded, factor)) for factor in (0.9, 1.0, 1.1)}
    ordered = [times[0.9], times[1.0], times[1.1]]
    assert ordered == sorted(ordered, reverse=better == "up")
    assert ordered[0] != ordered[2]


def simulated_e2e_s(prepared) -> float:
    from servesim.analysis.metrics import summarise
    from servesim.analysis.simulation import run_prepared

    return summarise(run_prepared(prepared)).e2el.mean_s


def test_burstier_traffic_has_the_same_requests_and_mean_gap() -> None:
    workload = prepare(load_scenario("std10k", ["workload.trace.max_requests=2000"])).workload
    before = list(workload.arrivals())
    after = list(map(burstier(workload.arrivals(), 1.3), workload.arrivals()))
    gaps = [np.diff([one.arrival_s for one in of]) for of in (before, after)]
    cv = [of.std() / of.mean() for of in gaps]
    assert cv[1] == pytest.approx(1.3 * cv[0], rel=1e-3)
    assert gaps[1].mean() == pytest.approx(gaps[0].mean())
    assert [one.prompt_tokens for one in after] == [one.prompt_tokens for one in before]
    assert (np.argsort(gaps[0]) == np.argsort(gaps[1])).all()


def test_fewer_prefix_hits_are_as_many_fewer(tmp_path: Path) -> None:
    found = servesim.sensitivity("poisson-chat", 2, overrides=["workload.num_requests=250"], jobs=1)
    base = np.mean([one.load.prefix_cache_hit_rate for one in found.sensitivity.base.summaries])
    fewer = np.mean([one.load.prefix_cache_hit_rate for one in found.sensitivity.figures["hit_rate", 0.9]])
    assert 0.8 * base < fewer < 0.97 * base
    assert ("hit_rate", 1.1) not in found.sensitivity.figures


def test_recorded_errors_are_those_of_the_load() -> None:
    saturated = model_error("mean_tpot_ms", "saturated", calibrated=False)
    assert saturated is not None
    assert saturated.recorded_at == "saturated"
    assert len(saturated.errors) >= 5
    other = model_error("mean_tpot_ms", "latency-bound", calibrated=False)
    assert other is not None
    assert other.recorded_at == "any load"
    assert len(other.errors) > len(saturated.errors)
    calibrated = model_error("mean_tpot_ms", "saturated", calibrated=True)
    assert calibrated is not None
    assert np.abs(calibrated.errors).mean() < np.abs(saturated.errors).mean()
    assert model_error("mean_queue_ms", "saturated", calibrated=False) is None
    assert saturated.ratio.low <= saturated.ratio.value <= saturated.ratio.high
    assert saturated.ratio.value == pytest.approx(math.exp(-np.median(saturated.errors)), rel=0.02)
    assert saturated.real(10.0) == pytest.approx(10.0 / np.exp(saturated.errors))


def test_a_cpu_says_nothing_of_gpus(tmp_path: Path) -> None:
    """Recorded CPUs are known by their names, as residuals.csv holds no more of them."""
    table = shipped("reports/validation") / "residuals.csv"
    rows = list(csv.DictReader(table.read_text(encoding="utf-8").splitlines()))
    assert {row["gpu"] for row in rows} - set(list_data("gpus")) == {"cpu-core"}
    counts = {"cpu": 0, "gpu": 0}
    for row in rows:
        if row["figure"] == "mean_tpot_ms" and row["calibrated"] == "no":
            counts["cpu" if row["gpu"] == "cpu-core" else "gpu"] += 1
    found = {
        kind: cast(
            ModelError, model_error("mean_tpot_ms", "no such load", calibrated=False, on_cpu=kind == "cpu")
        )
        for kind in counts
    }
    assert {kind: len(errors.errors) for kind, errors in found.items()} == counts
    core = TOY.replace("h100-sxm", str(shipped("reports/validation") / "hardware" / "cpu-core.yaml"))
    core = core.replace("llama-3.1-8b", "llama-3.2-1b")
    for kind, text in (("gpu", TOY), ("cpu", core)):
        errors = study(tmp_path, text, replications=2).sensitivity.model_error("mean_tpot_ms")
        assert errors is not None
        assert set(errors.errors) <= set(found[kind].errors)


def test_doubts_are_kept_apart(tmp_path: Path) -> None:
    synthetic = json.loads(study(tmp_path, TOY).to_json())["figures"]["mean_e2el_ms"]
    assert synthetic["seeds"] is not None
    assert synthetic["workload"] is None
    recorded = servesim.sensitivity(
        "std10k", 2, overrides=["workload.trace.max_requests=150", "slo.ttft_p99_s=0.05"], jobs=1
    )
    traced = json.loads(recorded.to_json())
    assert traced["figures"]["mean_e2el_ms"]["seeds"] is None
    low, high = traced["figures"]["mean_e2el_ms"]["workload"]
    assert low < traced["figures"]["mean_e2el_ms"]["base"]["mean"] < high
    assert traced["figures"]["mean_tpot_ms"]["model_runs"] >= 5
    [odds] = traced["slo"]
    assert 0 <= odds["both"] <= 1
    assert "seeds" not in odds
    text = str(recorded)
    assert "nothing drawn" in text
    assert "P99 TTFT <= 50 ms" in text


def test_the_odds_of_a_limit_follow_it(tmp_path: Path) -> None:
    odds = []
    for limit_s in (0.1, 0.2, 1000.0):
        found = study(tmp_path, TOY, f"slo.e2e_p99_s={limit_s}", replications=2)
        [one] = found.sensitivity.odds()
        odds.append((one.chance.value, one.both))
    assert [chance for chance, _ in odds] == [0, 0, 1]  # a request takes 302 ms
    both = [each for _, each in odds]
    assert both == sorted(both)
    assert both[2] == 1


def test_the_odds_of_several_limits_are_those_of_all_at_once(tmp_path: Path) -> None:
    """Of two limits that are kept together or not at all, and of one that is always kept."""
    twice = study(tmp_path, TOY, "slo.e2e_p99_s=0.303", "slo.ttft_p99_s=1000", replications=2)
    *each, together = twice.sensitivity.odds()
    assert [set(one.limits_s) for one in each] == [{"ttft"}, {"e2el"}]
    assert set(together.limits_s) == {"ttft", "e2el"}
    assert together.chance.value == min(one.chance.value for one in each)
    assert 0 < together.both <= min(one.both for one in each) < 1
    assert "All at once" in str(twice)
    assert "All at once" in twice.to_html()
    assert len(json.loads(twice.to_json())["slo"]) == 3


def test_errors_of_several_figures_are_of_the_same_runs() -> None:
    keys = ["p99_ttft_ms", "p99_tpot_ms"]
    joint = joint_errors(keys, "saturated", calibrated=False)
    assert joint is not None
    for column, key in enumerate(keys):
        alone = model_error(key, "saturated", calibrated=False)
        assert alone is not None
        assert len(joint.errors) <= len(alone.errors)
        assert set(joint.errors[:, column]) <= set(alone.errors)
    assert joint_errors(["p99_ttft_ms", "mean_queue_ms"], "saturated", calibrated=False) is None


def test_the_variants_of_a_trace_of_lengths_serve_the_lengths_of_the_base() -> None:
    """They are drawn again for each replication; else a change would be mixed with other requests."""
    loaded = load_scenario("closed-loop-sharegpt", ["workload.trace.max_requests=40"])
    moved = [one.key for one in inputs_of(loaded, hits=False)]
    for seed in (5, 6):
        again = with_seed(loaded, seed)
        base = summarise(run_replication(again))
        assert run_task(Task(again, moved[0], 1.0, False, None)).ttft == base.ttft
    assert base.total_input_tokens != summarise(run_prepared(prepare(loaded))).total_input_tokens


def test_the_page_draws_every_figure(tmp_path: Path) -> None:
    found = study(tmp_path, TOY)
    page = found.files()["sensitivity.html"]
    assert 'id="mean_ttft_ms"' in page
    assert "Where the uncertainty comes from" in page
    assert not math.isnan(found.sensitivity.effects("mean_ttft_ms")[0].swing)


@pytest.mark.parametrize("change", [0.0, 1.0, -0.1])
def test_a_change_is_a_share(change: float) -> None:
    with pytest.raises(servesim.ServesimError, match="between 0 and 1"):
        servesim.sensitivity("std10k", 2, change=change)
