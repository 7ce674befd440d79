"""Recordings with every step: the schedules are vLLM's, and a calibration carries to other models."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from servesim import api
from servesim.analysis.calibrate import calibrate_folder
from servesim.analysis.recorded import find_folders, read_folder
from servesim.analysis.schedule_replay import replay_schedule
from servesim.analysis.simulation import prepare
from servesim.analysis.stepwise import read_stepwise
from servesim.analysis.validate import FITTED_TO, validate_folder
from servesim.analysis.validate_steps import ANOTHER_MODEL, OTHER_RUNS
from servesim.config.engine_profile import load_engine_profile
from servesim.errors import TraceError
from servesim.report.accuracy_steps import steps_table
from servesim.report.fitted import block_text

VALIDATION = Path(__file__).parents[2] / "reports" / "validation"
HARDWARE = VALIDATION / "hardware" / "cpu-core.yaml"
STEPWISE = [path for path in find_folders([VALIDATION / "runs"]) if (path / "runs.csv").is_file()]
FITTED = VALIDATION / "runs" / "cpu-core-vllm-0.32-llama-c87m"
OTHERS = [VALIDATION / "runs" / f"cpu-core-vllm-0.32-{name}" for name in ("llama-c57m", "llama-c127m")]
LIMITS = {"mean_ttft_ms": 0.15, "mean_tpot_ms": 0.10, "mean_e2el_ms": 0.10}
MIXTURE = VALIDATION / "runs" / "cpu-core-vllm-0.32-moe-c130m"
BEYOND = ("burst", "150 %")
MISSED = {("llama-c57m", "150 %"): {"mean_ttft_ms": 0.152}}
"""What is not within its limit as ln(simulated / real), and how far off it is at most; here 14.0 % low."""
UP_TO_85 = ("30 %", "60 %", "85 %")


@cache
def validated(folder):
    return validate_folder(read_folder(folder))


def calibrated(folder, *loads):
    return [one for one in validated(folder).findings if one.calibrated and one.load in loads]


def within(one, limit):
    """Within the limit, or within twice what real repeats differ by."""
    return abs(one.error) <= max(limit, 0.0 if math.isnan(one.noise) else 2 * one.noise)


@pytest.mark.parametrize("folder", STEPWISE, ids=lambda path: path.name)
def test_every_recorded_step_is_scheduled_as_vllm_did(folder):
    """Order, tokens, preemptions, running, waiting, blocks, evictions, finished: with arrivals by step."""
    checks = validated(folder).stepwise.schedules
    recorded = read_folder(folder).stepwise.runs
    assert sum(check.runs for check in checks) == len(recorded)
    assert sum(check.steps for check in checks) == sum(len(run.steps) for run in recorded)
    assert [text for check in checks for text in check.differences] == []


def test_a_profile_of_another_deployment_is_listed_and_the_plain_law_still_judged(tmp_path):
    (tmp_path / "p.yaml").write_text("name: x\nprovenance: this test\ngpu: h100-sxm\n")
    folder = read_folder(FITTED)
    recorded = replace(folder.stepwise, runs=folder.stepwise.runs[:2], profile=tmp_path / "p.yaml")
    found = validate_folder(replace(folder, stepwise=recorded))
    assert [(one.row, one.reason) for one in found.refusals] == [
        ("steps, grid", "gpu was fitted with gpu h100-sxm")
    ]
    assert {one.calibrated for one in found.stepwise.steps} == {False}


def test_steps_that_were_fitted_to_are_told_from_others_at_their_load():
    folder = read_folder(FITTED)
    fitted, other = folder.stepwise.runs[:2]
    recorded = replace(folder.stepwise, runs=(fitted, replace(other, judged=True)))
    found = validate_folder(replace(folder, stepwise=recorded))
    for calibrated in (False, True):
        parts = [one.judged_on for one in found.stepwise.steps if one.calibrated is calibrated]
        assert parts == [FITTED_TO, FITTED_TO, OTHER_RUNS, OTHER_RUNS]
    assert [row[3] for row in steps_table([found]).rows] == [FITTED_TO, FITTED_TO, OTHER_RUNS, OTHER_RUNS]


@pytest.mark.parametrize("column", ["process", "group", "load", "set", "part"])
def test_a_table_of_runs_without_a_column_is_told(tmp_path, column):
    for name in ("requests.csv.gz", "steps.csv.gz"):
        (tmp_path / name).write_bytes((FITTED / name).read_bytes())
    head, *rows = (FITTED / "runs.csv").read_text(encoding="utf-8").splitlines()
    text = "\n".join([head.replace(f",{column},", ",another,"), *rows])
    (tmp_path / "runs.csv").write_text(text, encoding="utf-8")
    with pytest.raises(TraceError, match=rf"runs.csv .*has no column {column}"):
        read_stepwise(tmp_path)


def test_the_recordings_have_what_makes_schedules_differ():
    checks = [check for folder in STEPWISE for check in validated(folder).stepwise.schedules]
    assert sum(check.steps for check in checks) > 30_000
    assert sum(check.preemptions for check in checks) > 50
    loads = {check.load for check in checks}
    assert {"60 %, prefix-on", "60 %, prefix-off", "85 %, no-chunks", "85 %, small-kv", "150 %"} <= loads


def test_a_schedule_that_differs_is_told_by_its_step():
    run = next(run for run in read_folder(FITTED).stepwise.runs if run.group == "small-kv-chat-burst")
    prepared = prepare(run.load_scenario(), run.workload())
    assert replay_schedule(run, prepared).difference == ""
    larger = replace(prepared, memory=replace(prepared.memory, num_gpu_blocks=67))
    assert "free_blocks" in replay_schedule(run, larger).difference
    late = run.requests[5]._replace(arrival_step=3)
    moved = replace(run, requests=(*run.requests[:5], late, *run.requests[6:]))
    found = replay_schedule(moved, prepared)
    assert found.difference.startswith("step 0: ")
    assert found.shapes == ()


def test_versions_whose_rules_differ_are_told_apart():
    """A lone request under a threshold: 0.32 spares it, 0.26 does not."""
    settings = {"num_gpu_blocks": 20, "max_num_batched_tokens": 64, "long_prefill_token_threshold": 16}
    requests = [{"id": "r1", "unique_len": 64, "output_len": 2}]
    first = {
        version: next(line for line in api.trace(settings, requests, version=version) if "sched" in line)
        for version in ("0.26", "0.32", "0.33")
    }
    assert {version: step["total_tokens"] for version, step in first.items()} == {
        "0.26": 16,
        "0.32": 64,
        "0.33": 64,
    }


def test_the_hardware_file_is_what_its_measurements_give():
    pytest.importorskip("scipy")
    _, fitted = api.fit(HARDWARE, HARDWARE.parent / "cpu-core-kernels.csv")
    assert block_text(fitted) in HARDWARE.read_text(encoding="utf-8"), "run `servesim fit --write`"


def test_the_engine_profile_is_what_the_grid_gives():
    """Its model was taken out, so that it can be carried to others."""
    (found,) = calibrate_folder(read_folder(FITTED)).values()
    kept = load_engine_profile(FITTED / "engine-profile.yaml")
    assert found.profile.model_copy(update={"model": None}) == kept


def test_steps_that_all_take_longer_are_told_by_a_scalar():
    """A GPU that is a quarter slower than its file says."""
    recorded = read_folder(FITTED)
    slow = [slower(run, 1.25) for run in recorded.stepwise.runs if not run.overrides]
    changed = replace(recorded, stepwise=replace(recorded.stepwise, runs=tuple(slow)))
    (found,) = calibrate_folder(changed).values()
    kept = load_engine_profile(FITTED / "engine-profile.yaml")
    assert found.profile.gpu_time_factor == pytest.approx(1.25 * kept.gpu_time_factor, rel=0.05)
    assert all(abs(error) < 0.06 for error in found.after.values())


def slower(run, factor):
    steps = [
        step._replace(
            start_s=factor * step.start_s, output_s=factor * step.output_s, end_s=factor * step.end_s
        )
        for step in run.steps
    ]
    return replace(run, steps=tuple(steps))


@pytest.mark.parametrize("folder", [FITTED, *OTHERS, MIXTURE], ids=lambda path: path.name)
def test_calibrated_on_one_shape_latencies_of_all_are_right_up_to_85_percent_load(folder):
    judged = [one for one in calibrated(folder, *UP_TO_85) if one.metric in LIMITS]
    assert len(judged) == 9
    assert {one.judged_on for one in judged} == {OTHER_RUNS if folder == FITTED else ANOTHER_MODEL}
    assert {one.repeats for one in judged} == {3}
    wrong = [
        f"{one.row} {one.metric} {one.error:+.3f}" for one in judged if not within(one, LIMITS[one.metric])
    ]
    assert wrong == []


@pytest.mark.parametrize("folder", [FITTED, *OTHERS, MIXTURE], ids=lambda path: path.name)
def test_what_is_missed_in_bursts_and_past_saturation_is_known(folder):
    """Whoever mends one of them takes it from the list."""
    name = folder.name.removeprefix("cpu-core-vllm-0.32-")
    judged = [one for one in calibrated(folder, *UP_TO_85, *BEYOND) if one.metric in LIMITS]
    assert len(judged) == 15
    missed = {(one.load, one.metric): one.error for one in judged if not within(one, LIMITS[one.metric])}
    known = {
        (load, metric): most
        for (shape, load), limits in MISSED.items()
        if shape == name
        for metric, most in limits.items()
    }
    assert set(missed) == set(known)
    for key, error in missed.items():
        assert abs(error) < known[key], key
        assert abs(math.expm1(error)) < LIMITS[key[1]], key


@pytest.mark.parametrize("folder", [FITTED, *OTHERS, MIXTURE], ids=lambda path: path.name)
def test_the_law_gives_recorded_step_times_of_models_it_was_not_fitted_to(folder):
    """Median over the steps of each load; the real thing repeats itself to 4 to 8 percent."""
    judged = [one for one in validated(folder).stepwise.steps if one.calibrated and one.load in UP_TO_85]
    assert len(judged) == 6
    for one in judged:
        assert one.median < 0.09, one


def test_preemptions_and_prefix_hits_come_out():
    burst = {one.metric: one for one in calibrated(FITTED, "burst, small-kv")}
    assert burst["preemptions"].real == pytest.approx(burst["preemptions"].simulated)
    assert burst["preemptions"].simulated > 10
    hits = {one.metric: one for one in calibrated(FITTED, "60 %, prefix-on")}["prefix_hit_tokens"]
    assert hits.real == pytest.approx(hits.simulated)
    assert hits.simulated > 10_000
    assert not [one for one in calibrated(FITTED, "60 %, prefix-off") if one.metric == "prefix_hit_tokens"]


def test_drafts_are_scheduled_verified_and_taken_back_as_vllm_did():
    """N-gram drafting: the recording says how many came and were accepted, all else is the scheduler's."""
    runs = [run for run in read_folder(FITTED).stepwise.runs if run.load.endswith("ngram")]
    assert len(runs) == 6
    steps = [step for run in runs for step in run.steps]
    assert {count for step in steps for count in step.drafts.values()} == {2, 4}
    assert {count for step in steps for count in step.accepted.values()} == {0, 1, 2, 3, 4}
    checks = [check for check in validated(FITTED).stepwise.schedules if check.load.endswith("ngram")]
    assert sum(check.steps for check in checks) == len(steps)
    assert [text for check in checks for text in check.differences] == []


def test_blocks_follow_from_the_bytes_that_vllm_was_given():
    for folder in STEPWISE:
        recorded = read_folder(folder).stepwise
        plain = next(run for run in recorded.runs if not run.overrides)
        assert prepare(plain.load_scenario()).memory.num_gpu_blocks == recorded.memory["num_gpu_blocks"]
