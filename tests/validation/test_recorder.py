"""The recorder, with a stand-in for vLLM: what it writes is whole, repeats itself, replays without code."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from record.arrivals import Lengths, burst, poisson, prompt_ids
from record.folder import Folder
from record.plans import PLANS, Grid, Job, Online
from record.session import RunClock, Session
from record.shapes import SHAPES, hf_config
from record.stand_in import StandIn
from record.start import start_folder

from servesim.analysis.recorded import read_folder
from servesim.analysis.schedule_replay import replay_schedule
from servesim.analysis.simulation import prepare
from servesim.analysis.validate import validate_folder
from servesim.config.load import read_yaml
from servesim.config.profiles import load_model

HERE = Path(__file__).parent
CPU_CORE = HERE.parents[1] / "reports" / "validation" / "hardware" / "cpu-core.yaml"
SETTINGS = {
    "max_model_len": 512, "max_num_seqs": 8, "max_num_batched_tokens": 64, "block_size": 16,
    "enable_prefix_caching": True, "enable_chunked_prefill": True, "async_scheduling": False,
    "num_gpu_blocks_override": 40,
}  # fmt: skip
CHAT = Online("chat", 1, 12, Lengths(60, 0.5, 8, 120), Lengths(30, 0.5, 4, 60), (0.6, 1.5), 2, 32)
JOB = Job("llama-c57m", SETTINGS, Grid((16, 100), (1, 4), (32,), 6), (CHAT,), repeats=2)


def record(path, job=JOB, repeat=0, seconds=60.0):
    """One job of a plan on the stand-in."""
    folder, engine = Folder(path), StandIn(job)
    folder.expand()
    job = start_folder(folder, job, engine, str(CPU_CORE))
    session = Session(engine, engine.clock, folder, job, time.time() + seconds)
    session.warm_up()
    if job.grid is not None:
        session.grid(job.grid, repeat)
    for online in job.onlines:
        session.online(online, repeat)
    folder.compress()
    return folder


def names(folder):
    return [run["run"] for run in folder.runs()]


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "cpu-core-stand-in-llama-c57m"
    for repeat in range(2):
        folder = record(path, repeat=repeat)
    return folder


def test_what_is_recorded_replays_without_a_difference(recording):
    found = validate_folder(read_folder(recording.path))
    schedules = {check.load: check for check in found.stepwise.schedules}
    assert set(schedules) == {"grid", "burst", "60 %", "150 %"}
    assert all(not check.differences for check in schedules.values())
    assert sum(check.preemptions for check in schedules.values()) > 0, (
        "the pool is too large to test anything"
    )
    assert any(one.metric == "prefix_hit_tokens" for one in found.findings)


def test_repeats_of_the_stand_in_differ_in_nothing(recording):
    found = validate_folder(read_folder(recording.path))
    timed = [one for one in found.findings if one.row.startswith("chat")]
    assert {one.repeats for one in timed} == {2}
    assert max(one.noise for one in timed) < 1e-6


def test_a_second_recording_adds_only_what_is_missing(recording):
    before = names(recording)
    record(recording.path, repeat=1)
    assert names(recording) == before
    assert len(set(before)) == len(before)


def test_a_recorder_out_of_time_leaves_whole_runs_only(tmp_path):
    assert names(record(tmp_path / "none", seconds=0.0)) == []
    slow = replace(JOB, grid=None)
    folder, engine = Folder(tmp_path / "cut"), StandIn(slow)
    session = Session(engine, engine.clock, folder, slow, time.time() + 5.3)
    engine.step = lambda: time.sleep(0.5) or StandIn.step(engine)
    session.online(CHAT, 0)
    assert names(folder) == []
    assert not (folder.path / "steps.csv").exists()


def test_arrivals_follow_the_seed_and_keep_their_order_at_any_rate():
    lengths = (Lengths(60, 0.5, 8, 120), Lengths(30, 0.5, 4, 60))
    slow, fast = (poisson(7, 50, rate, *lengths, groups=3, prefix=16) for rate in (1.0, 4.0))
    assert slow == poisson(7, 50, 1.0, *lengths, groups=3, prefix=16)
    assert [ask._replace(arrival_s=0.0) for ask in slow] == burst(fast)
    assert fast[-1].arrival_s == pytest.approx(slow[-1].arrival_s / 4, abs=1e-5)
    alike = [index for index, ask in enumerate(slow) if ask.prefix_group == slow[0].prefix_group]
    first, second = (prompt_ids("a", index, slow[index], 1000) for index in alike[:2])
    assert first[:16] == second[:16]
    assert first[16:24] != second[16:24]
    assert len(first) == slow[0].prompt_tokens


def test_a_cpu_clock_jumps_over_idle_time_and_never_stops_short():
    now_s = 0.1
    clock = RunClock(lambda: now_s, waits=False)
    clock.skip(0.7 - clock())
    assert 0.7 <= clock() < 0.7 + 1e-6


@pytest.mark.parametrize("name", SHAPES)
def test_both_descriptions_of_a_shape_agree(name, tmp_path):
    from record.shapes import model_yaml

    path = tmp_path / f"{name}.yaml"
    path.write_text(model_yaml(name))
    model, config = load_model(str(path)), hf_config(name)
    assert (model.num_layers, model.hidden_size) == (config["num_hidden_layers"], config["hidden_size"])
    assert (model.num_kv_heads, model.head_dim) == (config["num_key_value_heads"], config["head_dim"])
    assert model.vocab_size == config["vocab_size"]
    assert (model.moe is not None) is ("num_experts" in config)


def test_every_plan_names_shapes_that_exist_and_tells_its_jobs_apart():
    for jobs in PLANS.values():
        for job in jobs:
            assert job.shape in SHAPES
        assert len({(job.shape, job.prefix) for job in jobs}) == len(jobs), "two jobs would share their runs"
    assert {"gpu-shake", "gpu-main", "gpu-features", "gpu-extra"} <= set(PLANS)


@pytest.mark.parametrize(
    "plan", ["gpu-shake", "gpu-main", "gpu-features", "gpu-extra", "cpu", "cpu-features"]
)
def test_every_plan_writes_folders_that_replay(plan, tmp_path):
    """Its smallest sizes on the stand-in: what a new machine will be asked for first."""
    gpu = str(CPU_CORE) if plan.startswith("cpu") else "h100-sxm"
    done = command(plan, tmp_path, "--first-look", "--gpu", gpu)
    assert "no time left" not in done.stdout
    assert done.stdout.count(" repeat 1: 0, ") == len(PLANS[plan]), done.stdout
    folders = sorted(tmp_path.iterdir())
    assert len(folders) == len({job.shape for job in PLANS[plan]})
    for path in folders:
        for name in (
            "meta.json",
            "memory.json",
            "scenario.yaml",
            "runs.csv",
            "requests.csv.gz",
            "steps.csv.gz",
        ):
            assert (path / name).is_file(), name
        found = validate_folder(read_folder(path))
        assert found.refusals == ()
        differences = [text for check in found.stepwise.schedules for text in check.differences]
        assert differences == []
        assert sum(check.steps for check in found.stepwise.schedules) > 100


def speculating(overrides=()):
    (job,) = PLANS["cpu-speculation"]
    settings = {**SETTINGS, "speculative_config": job.settings["speculative_config"]}
    return replace(
        JOB, settings=settings, grid=None, prefix=job.prefix, overrides=(*job.overrides, *overrides)
    )


def test_drafts_and_what_was_accepted_of_them_replay_as_recorded(tmp_path):
    path = tmp_path / "cpu-core-stand-in-llama-c57m"
    record(path, speculating())
    recorded = read_folder(path)
    steps = [step for run in recorded.stepwise.runs for step in run.steps]
    assert {count for step in steps for count in step.accepted.values()} == {0, 1, 2, 3, 4}
    found = validate_folder(recorded)
    assert found.refusals == ()
    loads = {check.load for check in found.stepwise.schedules}
    assert loads == {"burst, ngram", "60 %, ngram", "150 %, ngram"}
    assert all(not check.differences for check in found.stepwise.schedules)
    assert sum(check.preemptions for check in found.stepwise.schedules) > 0


def test_another_number_of_accepted_drafts_is_another_schedule(tmp_path):
    path = tmp_path / "cpu-core-stand-in-llama-c57m"
    record(path, speculating())
    run = read_folder(path).stepwise.runs[0]
    number, step = next((i, step) for i, step in enumerate(run.steps) if 4 in step.accepted.values())
    less = step._replace(accepted=dict.fromkeys(step.accepted, 0))
    changed = replace(run, steps=(*run.steps[:number], less, *run.steps[number + 1 :]))
    prepared = prepare(run.load_scenario(), run.workload())
    assert replay_schedule(run, prepared).difference == ""
    assert replay_schedule(changed, prepared).difference


def test_speculation_ahead_of_its_own_outputs_is_refused_by_name(tmp_path):
    path = tmp_path / "cpu-core-stand-in-llama-c57m"
    ahead = ("engine.speculative.method=mtp", "engine.async_scheduling=true")
    record(path, speculating(ahead))
    found = validate_folder(read_folder(path))
    assert {refusal.row for refusal in found.refusals} == {
        "ngram-chat-burst",
        "ngram-chat-60",
        "ngram-chat-150",
    }
    assert all("speculation" in refusal.reason for refusal in found.refusals)
    assert found.stepwise.schedules == ()


def command(plan, out, *options):
    """The recorder's command on the stand-in."""
    words = [sys.executable, "-m", "record", "--plan", plan, "--fake", "--out", str(out), *options]
    paths = os.pathsep.join([str(HERE), *(path for path in sys.path if path)])
    return subprocess.run(
        words, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=True
    )


def test_the_command_records_within_its_budget(tmp_path):
    """One job fits into the budget, the others are named as left out."""
    done = command("cpu-features", tmp_path, "--budget-s", "31", "--gpu", str(CPU_CORE))
    assert "prefix-on- repeat 1: 0" in done.stdout
    assert "no time left" in done.stdout
    (folder,) = tmp_path.iterdir()
    assert folder.name == "cpu-core-stand-in-llama-c87m"
    assert (folder / "steps.csv.gz").is_file()
    assert read_yaml(folder / "scenario.yaml")["model"] == "llama-c87m"
    with (folder / "runs.csv").open(newline="") as file:
        assert {row["load"] for row in csv.DictReader(file)} >= {"burst, prefix-on", "60 %, prefix-on"}


def test_of_an_operator_timed_in_several_processes_the_median_stays(tmp_path):
    folder = Folder(tmp_path)
    operator = ["cpu-core", "vllm", "0.32.0", "gemm", *[""] * 16]
    other = [*operator[:3], "moe", *operator[4:]]
    for latency_us in (9.0, 1.0, 2.0):
        folder.add_kernels([[*operator, latency_us], [*other, 2 * latency_us]])
    folder.merge_kernels()
    with (tmp_path / "kernels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["op"], row["latency_us"]) for row in rows] == [("gemm", "2.00"), ("moe", "4.00")]


def test_two_jobs_with_the_same_settings_are_two_processes(tmp_path):
    """Each begins with nothing prepared."""
    path = tmp_path / "cpu-core-stand-in-llama-c57m"
    record(path, replace(JOB, grid=None))
    folder = record(path, JOB.changed("again-", (CHAT,)))
    runs = read_folder(path).stepwise.runs
    processes = [run["process"] for run in folder.runs()]
    assert processes == ["1"] * 3 + ["2"] * 3
    assert [not run.rows_met for run in runs] == [True, False, False] * 2


def test_a_run_says_in_what_its_engine_differs_from_the_scenario(tmp_path):
    path = tmp_path / "cpu-core-stand-in-llama-c57m"
    record(path, replace(JOB, grid=None))
    small = JOB.changed("small-", (CHAT,), num_gpu_blocks_override=30, enable_prefix_caching=False)
    folder = record(path, small)
    assert {run["set"] for run in folder.runs()} == {
        "",
        "engine.enable_prefix_caching=false;engine.num_gpu_blocks_override=30",
    }
    found = validate_folder(read_folder(path))
    assert all(not check.differences for check in found.stepwise.schedules)
    assert min(float(run["copy_ms"]) for run in folder.runs()) > 0
