"""The commands of many simulations as a user meets them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from servesim.cli import main

SMALL = """\
name: small
model: llama-3.1-8b
hardware: {gpu: h100-sxm}
engine: {max_model_len: 2048}
workload:
  num_requests: 40
  arrivals: {process: poisson, rate_per_s: 20}
  prompt_tokens: {law: fixed, tokens: 200}
  output_tokens: {law: geometric, mean_tokens: 30}
slo: {ttft_p99_s: 0.2}
"""


@pytest.fixture
def servesim(monkeypatch, capsys, tmp_path):
    """Run a command line in a folder that holds small.yaml; returns status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text(SMALL)

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["servesim", *words])
        status = 0
        try:
            main()
        except SystemExit as stopped:
            status = int(stopped.code or 0)
        return status, *capsys.readouterr()

    return run


def test_run_with_replications_prints_intervals_and_writes_them(servesim):
    status, out, err = servesim("run", "small.yaml", "--replications", "3", "--jobs", "1")
    assert status == 0
    assert "3 replications (seeds 1 to 3); means with 95 % intervals" in out
    assert sorted(path.name for path in Path("out/small-replicated").iterdir()) == [
        "replications.csv",
        "replications.html",
        "result.json",
    ]
    assert "Wrote out/small-replicated" in err
    rows = Path("out/small-replicated/replications.csv").read_text().splitlines()
    assert len(rows) == 4
    assert rows[0].startswith("seed,completed,")


def test_compare_with_replications_prints_differences(servesim):
    words = ("compare", "small.yaml", "small.yaml", "--replications", "2", "--jobs", "1", "--json")
    status, out, _ = servesim(*words)
    assert status == 0
    found = json.loads(out)
    assert not any(row["told_apart"] for row in found["differences"])
    assert not Path("out").exists()


def test_compared_replications_warn_where_the_traffic_differs(servesim):
    Path("fast.yaml").write_text("extends: small.yaml\nname: fast\nworkload: {arrivals: {rate_per_s: 30}}\n")
    Path("few.yaml").write_text("extends: small.yaml\nname: few\nengine: {max_num_seqs: 4}\n")
    words = ("--replications", "2", "--jobs", "1", "--out", "c")
    told = "mall and fast do not serve the same requests (their workloads differ)"
    other, same = (servesim("compare", "small.yaml", name, *words)[1] for name in ("fast.yaml", "few.yaml"))
    assert f"Warning: s{told}" in other
    assert "the same requests" not in same
    assert "the same requests" not in Path("c/compare.html").read_text()
    assert json.loads(Path("c/compare.json").read_text())["warnings"] == []
    servesim("compare", "small.yaml", "fast.yaml", *words)
    assert told in Path("c/compare.html").read_text()
    [warned] = json.loads(Path("c/compare.json").read_text())["warnings"]
    assert (warned["kind"], told in warned["text"]) == ("other_traffic", True)


def test_replications_that_serve_nobody_say_so(servesim):
    words = ("run", "small.yaml", "--replications", "2", "--jobs", "1", "--set")
    told = "Warning (small): no request was completed -> `servesim run` says why"
    assert told in servesim(*words, "engine.max_model_len=100")[1]
    assert told not in servesim(*words, "engine.max_model_len=1000")[1]


def test_one_replication_and_a_step_trace_of_many_are_refused(servesim):
    assert servesim("run", "small.yaml", "--replications", "1")[0] == 2
    status, _, err = servesim("run", "small.yaml", "--replications", "2", "--step-trace", "t.jsonl")
    assert status == 2
    assert "--step-trace" in err


def test_an_error_in_another_process_reads_as_in_this_one(servesim):
    words = ("run", "small.yaml", "--set", "model=llama-3.1-70b", "--replications", "2")
    here, there = (servesim(*words, "--jobs", jobs) for jobs in "12")
    assert there == here
    assert here[0] == 2
    [line] = here[2].splitlines()
    assert "llama-3.1-70b does not fit on h100-sxm" in line


def test_a_sweep_prints_a_line_per_point_and_is_the_same_when_asked_again(servesim):
    words = ("sweep", "small.yaml", "--vary", "engine.max_num_seqs=2,4", "--jobs", "1")
    status, out, _ = servesim(*words)
    assert status == 0
    assert [line.split()[0] for line in out.splitlines()] == ["small:", "max_num_seqs", "2", "4"]
    names = sorted(path.name for path in Path("out/small-sweep").iterdir())
    assert names == ["manifest.json", "points", "sweep.csv", "sweep.html", "sweep.json"]
    assert servesim(*words)[:2] == (0, out)
    status, out, _ = servesim(*words, "--figure", "mean_e2el_ms", "--json")
    assert json.loads(out)["points"] == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--vary", "engine.block_size=8,16", "--figure", "p99_tfft_ms"], "did you mean p99_ttft_ms"),
        (["--vary", "engine.blok_size=8,16"], "did you mean block_size"),
        (["--vary", "engine.block_size=8:16"], "add --latin N"),
        (["--vary", "seed=1,2", "--vary", "seed=3"], "--vary  seed  varies twice  -> give all its values"),
        (["--vary", "seed=1,2", "--figure", "ttft"], "did you mean mean_ttft_ms or median_ttft_ms or p99"),
        ([], "add --vary"),
        (["--vary", "engine.block_size=8,16", "--backend", "dask"], "--scheduler ADDRESS"),
    ],
)
def test_mistakes_in_a_sweep_are_named(servesim, words, message):
    status, out, err = servesim("sweep", "small.yaml", *words)
    assert status == 2
    assert message in err
    assert "Traceback" not in err
    assert not out
    assert not Path("out").exists()


def test_a_run_folder_that_cannot_be_written_is_named(servesim):
    Path("taken").write_text("a file")
    words = ("sweep", "small.yaml", "--vary", "engine.block_size=8,16", "--out", "taken")
    status, _, err = servesim(*words)
    assert status == 2
    assert "the run folder cannot be written" in err
    assert "--out" in err


def test_sensitivity_prints_tornadoes_and_odds(servesim):
    status, out, _ = servesim(
        "sensitivity", "small.yaml", "--replications", "2", "--jobs", "1", "--figure", "mean_ttft_ms"
    )
    assert status == 0
    assert "Mean TTFT (ms)" in out
    assert "Mean TPOT (ms)" not in out
    assert "P99 TTFT <= 200 ms" in out
    names = sorted(path.name for path in Path("out/small-sensitivity").iterdir())
    assert names == ["sensitivity.html", "sensitivity.json"]


def test_an_interrupted_sweep_says_how_to_go_on(tmp_path):
    (tmp_path / "small.yaml").write_text(SMALL.replace("num_requests: 40", "num_requests: 400"))
    vary = ["--vary", "engine.max_num_seqs=1,2,3,4,5,6,7,8", "--vary", "engine.block_size=8,16,32,64"]
    vary += ["--vary", "workload.arrivals.rate_per_s=5,10,15,20,25"]
    heed = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "  # also in the background
    )
    program = heed + "from servesim.cli import main; main()"
    command = [sys.executable, "-c", program, "sweep", "small.yaml", *vary]
    process = subprocess.Popen(
        [*command, "--jobs", "2"], cwd=tmp_path, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    points = tmp_path / "out/small-sweep/points"
    deadline = time.monotonic() + 60
    while len(list(points.glob("*.json"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it: to the workers, too
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "the same command goes on from them" in err
    assert "Traceback" not in err
    assert not out
    assert 3 <= len(list(points.glob("*.json"))) < 160
