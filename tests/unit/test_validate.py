"""Validation: recordings that are read without code, errors with a sign, gaps that are named."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Literal, get_args, get_origin

import numpy as np
import pytest
from typer.testing import CliRunner

from servesim import api
from servesim.analysis.coverage import cells_of, gaps_of, sorted_cells
from servesim.analysis.measured import read_measured, simulated_latencies
from servesim.analysis.recorded import find_folders, read_folder
from servesim.analysis.simulation import prepare, run_prepared
from servesim.analysis.validate import _features, validate_folder
from servesim.cli import app
from servesim.config.files import list_data
from servesim.config.load import load_scenario
from servesim.config.profiles import load_model
from servesim.config.scenario import EngineConfig
from servesim.errors import ConfigError, TraceError

META = {
    "title": "a test",
    "engine": "vLLM 0.26",
    "recorded": "2026",
    "source": "this test",
    "license": "none",
    "calibration": "none",
}
SCENARIO = """
name: recorded
model: llama-3.1-8b
hardware: {gpu: h100-sxm}
engine: {max_model_len: 4096}
workload: {trace: {file: requests.csv, format: csv}}
"""
BURST = """
name: table
model: llama-3.1-8b
hardware: {gpu: h100-sxm}
engine: {max_model_len: 4096}
workload:
  arrivals: {process: burst}
  num_requests: 8
  prompt_tokens: {law: fixed, tokens: 256}
  output_tokens: {law: fixed, tokens: 32}
"""


def record(folder, *, slower=1.0, requests=60):
    """A recording of a server that takes ``slower`` times as long as the simulation says."""
    folder.mkdir(exist_ok=True)
    (folder / "meta.json").write_text(json.dumps(META))
    (folder / "scenario.yaml").write_text(SCENARIO)
    arrivals = np.arange(requests) * 0.5
    rows = [(t, 300 + 7 * i, 40 + i % 5, t + 1, t + 2) for i, t in enumerate(arrivals.tolist())]
    write_requests(folder, rows)
    run = run_prepared(prepare(load_scenario(folder / "scenario.yaml")))
    found = simulated_latencies(run)
    rows = [
        (row[0], row[1], row[2], row[0] + slower * ttft, row[0] + slower * e2e)
        for row, ttft, e2e in zip(rows, found.ttft_s, found.e2e_s, strict=True)
    ]
    write_requests(folder, rows)
    return folder


def write_requests(folder, rows):
    head = "arrival_s,prompt_tokens,output_tokens,first_token_s,finish_s"
    lines = [",".join(f"{cell:.9g}" for cell in row) for row in rows]
    (folder / "requests.csv").write_text("\n".join([head, *lines]) + "\n")


def table(folder, rows, head="row,set,mean_tpot_ms"):
    folder.mkdir(exist_ok=True)
    (folder / "meta.json").write_text(json.dumps(META))
    (folder / "scenario.yaml").write_text(BURST)
    (folder / "results.csv").write_text("\n".join([head, *rows]) + "\n")
    return folder


def test_a_server_slower_by_a_known_factor_shows_that_factor(tmp_path):
    found = validate_folder(read_folder(record(tmp_path / "one", slower=1.25)))
    errors = {one.metric: one for one in found.findings}
    for metric in ("mean_ttft_ms", "mean_tpot_ms", "mean_e2el_ms", "p99_e2el_ms"):
        assert errors[metric].error == pytest.approx(-math.log(1.25), abs=1e-4)
        assert errors[metric].low == pytest.approx(-math.log(1.25), abs=1e-4)
    assert {one.regime for one in found.findings} == {"latency-bound"}
    assert {one.judged_on for one in found.findings} == {"all requests"}


def test_a_calibrated_run_is_judged_on_its_second_half(tmp_path):
    folder = record(tmp_path / "one", slower=1.25)
    (folder / "engine-profile.yaml").write_text(
        "name: x\nprovenance: this test\ngpu_time_factor: 1.25\nexposed_host_s: 0.00025\n"
    )
    found = validate_folder(read_folder(folder)).findings
    second = [one for one in found if one.judged_on == "second half"]
    plain = {one.metric: one.error for one in second if not one.calibrated}
    calibrated = {one.metric: one.error for one in second if one.calibrated}
    assert plain["mean_tpot_ms"] == pytest.approx(-math.log(1.25), abs=1e-3)
    assert calibrated["mean_tpot_ms"] == pytest.approx(0, abs=1e-3)
    assert set(plain) == set(calibrated)


def test_a_run_of_two_halves_is_counted_once(tmp_path):
    folder = record(tmp_path / "one", slower=1.25)
    (folder / "engine-profile.yaml").write_text("name: x\nprovenance: this test\ngpu_time_factor: 1.25\n")
    _, *rows = api.validate([folder]).files()["residuals.csv"].splitlines()
    runs = [row.rsplit(",", 1)[0] for row in rows]
    assert len(runs) == len(set(runs)) == 2 * 7, "plain and calibrated"


def test_calibrated_errors_stand_beside_the_plain_ones_of_the_same_runs(tmp_path):
    rows = [f"{n},workload.num_requests={n},p.yaml,{'fit' if n < 3 else 'judge'},{n}" for n in (1, 2, 3)]
    folder = table(tmp_path / "t", rows, "row,set,profile,part,mean_tpot_ms")
    (folder / "p.yaml").write_text("name: x\nprovenance: this test\ngpu_time_factor: 1.25\n")
    accuracy = api.validate([folder])
    short, _ = accuracy.files()["accuracy.md"].split("## In short")[1].split("\n## ", 1)
    found = {
        cells[2].strip(): cells[3:]
        for line in short.splitlines()
        if line.startswith("| t |") and (cells := line.strip("| ").split(" | "))
    }
    assert {kind: cells[0] for kind, cells in found.items()} == {"no": "3", "no, same runs": "1", "yes": "1"}
    judged = {one.calibrated: one.error for one in accuracy.validations[0].findings if one.row == "3"}
    for kind, calibrated in (("no, same runs", False), ("yes", True)):
        assert f"{abs(judged[calibrated]):.3f}" in found[kind]


def test_the_memory_that_a_run_recorded_is_judged_without_its_block_count(tmp_path):
    folder = record(tmp_path / "one")
    said = SCENARIO.replace("4096}", "4096, num_gpu_blocks_override: 9000}")
    (folder / "scenario.yaml").write_text(said)
    (folder / "memory.json").write_text(json.dumps({"num_gpu_blocks": 20_000, "note": "kept"}))
    (one,) = [each for each in validate_folder(read_folder(folder)).findings if each.regime == "memory"]
    assert (one.metric, one.real) == ("num_gpu_blocks", 20_000)
    assert one.simulated > 25_000


def test_a_table_row_is_a_run_of_its_own_settings(tmp_path):
    folder = table(
        tmp_path / "t",
        [
            "small,workload.num_requests=2,10",
            "large,workload.num_requests=200;workload.prompt_tokens.tokens=1000,10",
            "wrong,model=llama-3.1-405b,10",
        ],
    )
    found = validate_folder(read_folder(folder))
    small, large = found.findings
    assert small.simulated < large.simulated
    assert small.error == pytest.approx(math.log(small.simulated / 10))
    assert (small.regime, large.regime) == ("latency-bound", "saturated")
    (refused,) = found.refusals
    assert refused.row == "wrong"
    assert "does not fit" in refused.reason


def test_rows_of_memory_are_not_simulated(tmp_path):
    rows = ["one,workload.num_requests=100000000,54.0"]
    found = validate_folder(read_folder(table(tmp_path / "t", rows, "row,set,kv_cache_gib"))).findings
    assert [one.regime for one in found] == ["memory"]
    assert found[0].error == pytest.approx(0, abs=0.1)


@pytest.mark.parametrize("said", ["num_gpu_blocks_override: 9000", "profile: p.yaml"])
def test_what_a_recording_says_of_its_pool_does_not_judge_itself(tmp_path, said):
    folder = record(tmp_path / "one")
    (folder / "p.yaml").write_text("name: x\nprovenance: this test\nnum_gpu_blocks: 9000\n")
    (folder / "scenario.yaml").write_text(SCENARIO.replace("4096}", f"4096, {said}}}"))
    (folder / "memory.json").write_text(json.dumps({"num_gpu_blocks": 9000}))
    (one,) = [each for each in validate_folder(read_folder(folder)).findings if each.regime == "memory"]
    assert one.simulated > 25_000


def test_a_pool_that_the_server_was_given_is_not_judged(tmp_path):
    folder = record(tmp_path / "one")
    (folder / "scenario.yaml").write_text(
        SCENARIO.replace("4096}", "4096, kv_cache_memory_bytes: 8589934592}")
    )
    said = {"num_gpu_blocks": 4096, "kv_cache_gib": 8, "weights_gib": 15}
    (folder / "memory.json").write_text(json.dumps(said))
    found = [each for each in validate_folder(read_folder(folder)).findings if each.regime == "memory"]
    assert [one.metric for one in found] == ["weights_gib"]


def test_a_run_that_the_simulator_refuses_is_listed_beside_the_others(tmp_path):
    large, small = record(tmp_path / "large"), table(tmp_path / "small", ["one,,10"])
    (large / "scenario.yaml").write_text(SCENARIO.replace("llama-3.1-8b", "llama-3.1-405b"))
    accuracy = api.validate([large, small])
    (refused,) = accuracy.validations[0].refusals
    assert (refused.source, refused.row) == ("large", "recorded")
    assert "does not fit" in refused.reason
    page = accuracy.files()["accuracy.md"]
    assert "| large | recorded | " in page
    assert "| small |" in page


@pytest.mark.parametrize(
    ("head", "row", "words"),
    [
        ("row,set,request_throughput", "one,,3", r"results.csv:1 .*got request_throughput.*README"),
        ("row,set,p90_ttft_ms", "one,,3", r"got p90_ttft_ms.*did you mean p99_ttft_ms\?"),
        ("row,set,completed,mean_running", "one,,3,3", r"got completed(.|\n)*got mean_running"),
        ("row,set,mean_tpot_ms", "one,,0.0", r"results.csv:2 .*mean_tpot_ms 0.0.*leave others empty"),
        ("row,set,mean_tpot_ms", "one,,nan", r"results.csv:2 .*mean_tpot_ms nan"),
        ("row,set,mean_tpot_ms", "one", r"results.csv:2 .*not as many cells"),
        ("row,set,mean_tpot_ms", "one,,3,4", r"results.csv:2 .*not as many cells"),
    ],
)
def test_a_row_that_cannot_be_judged_is_refused(tmp_path, head, row, words):
    with pytest.raises(ConfigError, match=words):
        read_folder(table(tmp_path / "t", [row], head))


def test_memory_and_latency_of_one_row_are_judged_apart(tmp_path):
    rows = ["one,workload.num_requests=2,54.0,10", "two,workload.num_requests=2,,10"]
    folder = table(tmp_path / "t", rows, "row,set,kv_cache_gib,mean_tpot_ms")
    found = {(one.row, one.metric): one for one in validate_folder(read_folder(folder)).findings}
    assert set(found) == {("one", "kv_cache_gib"), ("one", "mean_tpot_ms"), ("two", "mean_tpot_ms")}
    assert found["one", "kv_cache_gib"].regime == "memory"
    assert found["one", "mean_tpot_ms"].error == found["two", "mean_tpot_ms"].error


def test_cells_keep_the_worst_first_and_every_gap_is_named(tmp_path):
    folder = table(tmp_path / "t", [f"{n},workload.num_requests={n},{n}" for n in (1, 2, 3)])
    findings = validate_folder(read_folder(folder)).findings
    (cell,) = cells_of(findings)
    sizes = sorted(abs(one.error) for one in findings)
    assert cell.median == sizes[1]
    assert cell.bias == pytest.approx(sum(one.error for one in findings) / 3)
    assert sizes[0] <= cell.low <= cell.median <= cell.high <= sizes[2]
    better = table(tmp_path / "u", [f"1,,{findings[0].simulated}"])
    both = sorted_cells(cells_of([*validate_folder(read_folder(better)).findings, *findings]))
    assert [one.source for one in both] == ["t", "u"]
    gaps = gaps_of(findings)
    assert {gap.name for gap in gaps if gap.kind == "GPU"} == set(list_data("gpus")) - {"h100-sxm"}
    assert "fp8 weights" in {gap.name for gap in gaps}
    assert "async scheduling" not in {gap.name for gap in gaps}


def test_the_interval_of_a_cell_is_of_the_median_size(tmp_path):
    """Errors of both signs: the size of none is below 0.28."""
    folder = table(tmp_path / "t", ["one,workload.num_requests=1,1"])
    (one,) = validate_folder(read_folder(folder)).findings
    errors = (-0.28, 0.96, 1.64, -1.0)
    (cell,) = cells_of([replace(one, simulated=one.real * math.exp(error)) for error in errors])
    assert cell.median == pytest.approx(0.98)
    assert 0.28 <= cell.low < cell.median < cell.high <= 1.64
    assert cell.bias == pytest.approx(0.33)


def test_every_feature_that_a_deployment_can_have_is_a_gap_until_it_is_recorded(tmp_path):
    """Every value of every setting with a list of values, and the switches and sections beside them."""
    (found,) = validate_folder(read_folder(table(tmp_path / "t", ["one,workload.num_requests=1,1"]))).findings
    base = EngineConfig(async_scheduling=True)
    changes = [
        {name: value}
        for name, field in EngineConfig.model_fields.items()
        if get_origin(field.annotation) is Literal
        for value in get_args(field.annotation)
    ]
    changes += [{"tensor_parallel_size": degree} for degree in (2, 4, 8)]
    changes += [{"pipeline_parallel_size": 2}, {"enable_expert_parallel": True}, {"enforce_eager": True}]
    changes += [{"enable_chunked_prefill": False}, {"speculative": object()}, {"kv_eviction": object()}]
    engines = [base, *(base.model_copy(update=change) for change in changes)]
    names = {
        name
        for engine in engines
        for model in ("llama-3.1-8b", "gpt-oss-20b", "deepseek-v3")
        for name in _features(engine, load_model(model), hits=True)
    }
    gaps = {gap.name for gap in gaps_of([replace(found, features=())]) if gap.kind == "feature"}
    assert names == gaps
    assert not [gap for gap in gaps_of([replace(found, features=tuple(names))]) if gap.kind == "feature"]


def test_the_gpus_of_all_stages_are_counted(tmp_path):
    rows = ["one,engine.tensor_parallel_size=2;engine.pipeline_parallel_size=4;workload.num_requests=1,1"]
    (found,) = validate_folder(read_folder(table(tmp_path / "t", rows))).findings
    assert found.num_gpus == 8


def test_the_page_says_everything_and_needs_no_network(tmp_path):
    folder = table(tmp_path / "t", ["one,,10", "wrong,model=llama-3.1-405b,10"])
    accuracy = api.validate([folder])
    pages = accuracy.files()
    for page in (text for name, text in pages.items() if not name.endswith(".csv")):
        for words in ("a test", "TPOT mean", "not validated", "b200", "does not fit", "h100-sxm"):
            assert words in page
    assert "<script" not in pages["accuracy.html"]
    assert "http" not in pages["accuracy.html"].replace('http-equiv="Content-Security-Policy"', "")
    plain = json.loads(accuracy.to_json())
    assert {"findings", "steps", "schedules", "refusals", "not_validated"} == set(plain)
    assert plain["findings"][0]["low"] is None


def test_the_command_writes_the_page(tmp_path):
    folder = table(tmp_path / "t", ["one,,10"])
    result = CliRunner().invoke(app, ["validate", str(folder), "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "The 1 worst cells of 1" in result.stdout
    assert (tmp_path / "out" / "accuracy.md").read_text().startswith("# Accuracy")


def test_a_folder_of_folders_is_read_and_an_empty_one_refused(tmp_path):
    table(tmp_path / "b", ["one,,10"])
    table(tmp_path / "a", ["one,,10"])
    assert [path.name for path in find_folders([tmp_path])] == ["a", "b"]
    with pytest.raises(ConfigError, match="holds no recorded run"):
        find_folders([tmp_path / "a" / "nothing"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("arrival_s,prompt_tokens\n0,1\n", "needs the columns.*no output_tokens"),
        ("arrival_s,prompt_tokens,output_tokens,first_token_s,finish_s\n", "at least one row"),
        ("arrival_s,prompt_tokens,output_tokens,first_token_s,finish_s\n0,1,1,x,2\n", "csv:2.*got 'x'"),
        ("arrival_s,prompt_tokens,output_tokens,first_token_s,finish_s\n0,1,1,1,nan\n", "csv:2.*got 'nan'"),
        ("arrival_s,prompt_tokens,output_tokens,first_token_s,finish_s\n0,1,1,1,inf\n", "csv:2.*got 'inf'"),
        ("arrival_s,prompt_tokens,output_tokens,first_token_s,finish_s\n0,0,1,1,2\n", "csv:2.*at least one"),
        ("arrival_s,prompt_tokens,output_tokens,first_token_s,finish_s\n0,1,0,1,2\n", "csv:2.*that failed"),
        (
            "arrival_s,prompt_tokens,output_tokens,first_token_s,finish_s\n0,1,1,1,2\n5,1,1,4,6\n",
            "csv:3.*must arrive before its first token.*one clock",
        ),
    ],
)
def test_requests_that_cannot_be_are_refused(tmp_path, text, words):
    (tmp_path / "requests.csv").write_text(text)
    with pytest.raises(TraceError, match=words):
        read_measured(tmp_path / "requests.csv")


def test_a_broken_folder_is_told_by_file(tmp_path):
    folder = table(tmp_path / "t", ["one,,ten"])
    with pytest.raises(ConfigError, match=r"results.csv:2.*could not convert"):
        read_folder(folder)
    one = record(tmp_path / "one", requests=3)
    (one / "memory.json").write_text('{"num_gpu_blocks": null, "note": "kept"}')
    with pytest.raises(ConfigError, match=r"memory.json.*must be an object of numbers.*NoneType"):
        read_folder(one)
    (folder / "meta.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"meta.json.*title.*is missing"):
        read_folder(folder)
