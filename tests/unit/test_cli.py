"""The commands as a user meets them: what they print, what they write, and how they refuse."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import servesim as servesim_package
from servesim.cli import main

SMALL = ("--set", "workload.trace.max_requests=60")
SCENARIO = """\
name: small
model: llama-3.1-8b
hardware: {gpu: h100-sxm}
engine: {max_model_len: 4096}
workload:
  num_requests: 40
  arrivals: {process: poisson, rate_per_s: 20}
  prompt_tokens: {law: fixed, tokens: 200}
  output_tokens: {law: geometric, mean_tokens: 30}
"""
WORKLOAD = SCENARIO[SCENARIO.index("workload:") :]


class Outcome:
    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err


@pytest.fixture
def servesim(monkeypatch, capsys, tmp_path):
    """Run a command line in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["servesim", *words])
        status = 0
        try:
            main()
        except SystemExit as stopped:
            status = int(stopped.code or 0)
        captured = capsys.readouterr()
        return Outcome(status, captured.out, captured.err)

    return run


def scenario_file(folder: Path, *changes: tuple[str, str]) -> str:
    text = SCENARIO
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (folder / "small.yaml").write_text(text)
    return "small.yaml"


def test_run_prints_the_result_and_writes_every_file(servesim, tmp_path):
    done = servesim("run", "azure-conv-h100", *SMALL)
    assert done.status == 0
    assert "Serving Benchmark Result" in done.out
    assert "Successful requests:                     60" in done.out
    assert "KV-cache memory" in done.out
    written = sorted(path.name for path in (tmp_path / "out/azure-conv-h100").iterdir())
    assert written == ["kv.csv", "report.html", "requests.csv", "result.json", "steps.csv"]
    assert "out/azure-conv-h100" in done.err


def test_json_is_one_object_and_writes_nothing(servesim, tmp_path):
    done = servesim("run", "azure-conv-h100", *SMALL, "--json")
    result = json.loads(done.out)
    assert result["completed"] == 60
    assert {"mean_ttft_ms", "p99_tpot_ms", "output_throughput", "request_throughput"} <= result.keys()
    assert not list(tmp_path.iterdir())


def test_same_seed_same_bytes(servesim, tmp_path):
    runs = [
        servesim("run", "poisson-chat", "--set", "workload.num_requests=150", "--out", name) for name in "ab"
    ]
    assert runs[0].out == runs[1].out
    for file in ("requests.csv", "steps.csv", "kv.csv", "result.json", "report.html"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
    other = servesim("run", "poisson-chat", "--set", "workload.num_requests=150", "--seed", "2", "--out", "c")
    assert other.out != runs[0].out


def test_compare_shows_both_and_writes_a_page(servesim, tmp_path):
    done = servesim("compare", "azure-conv-h100", "azure-conv-h100-contiguous", *SMALL, "--out", "c")
    assert done.status == 0
    assert "A: azure-conv-h100\n" in done.out
    assert "B: azure-conv-h100-contiguous\n" in done.out
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["compare.html", "compare.json"]


def test_compare_warns_where_the_traffic_differs(servesim, tmp_path):
    words = ("compare", "azure-conv-h100", "twice.yaml", *SMALL)
    (tmp_path / "twice.yaml").write_text(
        "extends: azure-conv-h100\nname: twice\nworkload: {trace: {rate_scale: 2}}\n"
    )
    done = servesim(*words)
    assert "azure-conv-h100 and twice do not serve the same requests (" in done.out
    assert "prompt tokens" not in done.out.split("the same requests")[1].split(":")[0]
    [page] = tmp_path.glob("out/*/compare.html")
    assert "Azure-conv-h100 and twice do not serve" in page.read_text()
    warned = json.loads(servesim(*words, "--json").out)["warnings"]
    assert [one["kind"] for one in warned] == ["other_traffic"]
    many = json.loads(servesim(*words, "azure-conv-h100", "--json").out)["warnings"]
    assert [one["text"].split(" do not")[0] for one in many] == ["azure-conv-h100 and twice"]
    same = servesim("compare", "azure-conv-h100", "azure-conv-h100-contiguous", *SMALL, "--json")
    assert json.loads(same.out)["warnings"] == []
    fewer = servesim("compare", "poisson-chat", "azure-conv-h100", "--json")
    assert "6,000 and 19,366 requests" in json.loads(fewer.out)["warnings"][0]["text"]


def test_arrivals_that_wait_for_answers_are_no_other_traffic(servesim, tmp_path):
    (tmp_path / "b.yaml").write_text("extends: closed-loop-sharegpt\nname: b\nengine: {max_num_seqs: 4}\n")
    few = ("--set", "workload.trace.max_requests=200", "--json")
    done = servesim("compare", "closed-loop-sharegpt", "b.yaml", *few)
    assert json.loads(done.out)["warnings"] == []


def test_paged_memory_serves_a_larger_batch_than_contiguous(servesim):
    busy = ("--set", "workload.trace.rate_scale=4", "--set", "workload.trace.max_requests=2000")
    done = servesim("compare", "azure-conv-h100", "azure-conv-h100-contiguous", *busy, "--json")
    both = json.loads(done.out)
    paged, contiguous = both["a"], both["b"]
    assert contiguous["max_concurrent_requests"] > 26  # it queues: 26 reservations of 16,384 tokens fit
    assert paged["output_throughput"] > 1.5 * contiguous["output_throughput"]
    assert paged["mean_ttft_ms"] < contiguous["mean_ttft_ms"] / 10


def test_check_list_show_schema(servesim):
    assert "ok; 19,366 requests" in servesim("check", "azure-conv-h100").out
    assert "h200-sxm" in servesim("list", "gpus").out
    assert len(json.loads(servesim("list", "models", "--json").out)) == 32
    shown = servesim("show", "h100-sxm").out
    assert "3.35e+12" in shown
    assert "NVIDIA data sheet" in shown
    assert json.loads(servesim("show", "deepseek-v3", "--json").out)["num_layers"] == 61
    assert json.loads(servesim("schema").out)["title"] == "servesim scenario"


@pytest.mark.parametrize("name", ["poisson-chat", "azure-conv-h100"])
def test_check_refuses_what_serves_nobody(servesim, name):
    refused = servesim("check", name, "--set", "engine.max_model_len=2")
    assert refused.status == 2
    assert "every request would be refused" in refused.err
    assert "raise engine.max_model_len" in refused.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("sweep", "poisson-chat", "--vary", "engine.blok_size=8,16"), "--vary  engine.blok_size"),
        (("sweep", "poisson-chat", "--vary", "seed=1,2", "--set", "engine.blok=8"), "--set  engine.blok"),
        (("plan", "poisson-chat", "--rate", "5", "--gpus", "h100"), "--gpus  hardware.gpu  no such GPU"),
        (
            ("plan", "poisson-chat", "--rate", "5", "--tensor-parallel", "x"),
            "--tensor-parallel  engine.tensor",
        ),
        (("plan", "poisson-chat", "--rate", "5", "--slo", "ttft_p9=1"), "--slo  slo.ttft_p9  unknown key"),
        (("plan", "poisson-chat", "--rate", "5", "--vary", "engine.blok_size=8"), "--vary  engine.blok_size"),
        (
            ("plan", "poisson-chat", "--rate", "5", "--vary", "hardware.gpu=h100"),
            "--vary  hardware.gpu  no such GPU",
        ),
        (("plan", "poisson-chat", "--rate", "5", "--slo", "0.5"), "--slo  not a limit  got 0.5  -> write"),
        (("capacity", "poisson-chat", "--slo", "a..b=3"), "--slo  not a limit  got a..b=3  -> write"),
        (("plan", "poisson-chat", "--rate", "5", "--budget", "-5"), "--budget"),
        (("capacity", "poisson-chat", "--slo", "ttft_p9=1"), "--slo  slo.ttft_p9  unknown key"),
        (("calibrate", "no.json"), "no.json  cannot be read  got No such file or directory  -> give"),
        (("run", "nothing.yaml"), 'no such scenario  got "nothing.yaml"  -> check the path, or take a name'),
        (("run", "std1k.yaml"), 'no such scenario  got "std1k.yaml"  did you mean std10k?  -> see'),
    ],
)
def test_a_mistake_is_told_by_the_option_that_it_came_by(servesim, tmp_path, words, message):
    refused = servesim(*words)
    assert refused.status == 2
    assert message in refused.err
    assert not list(tmp_path.iterdir())


MISTAKES = [
    ("max_model_len", "max_modle_len", "small.yaml:4:10  engine.max_modle_len  unknown key"),
    ("max_model_len", "max_modle_len", "did you mean max_model_len?"),
    ("h100-sxm", "h100-smx", 'small.yaml:3:17  hardware.gpu  no such GPU  got "h100-smx"'),
    ("h100-sxm", "h100-smx", "did you mean h100-sxm?"),
    ("model: llama-3.1-8b", "model: lama-3.1-8b", "did you mean llama-3.1-8b?"),
    ("tokens: 200", "tokens: many", 'prompt_tokens.tokens  must be a whole number  got "many"'),
    ("rate_per_s: 20", "rate_per_s: -3", "workload.arrivals.rate_per_s  must be greater than 0  got -3"),
    ("num_requests: 40", "num_requests: 0", "workload.num_requests  must be 1 or more  got 0"),
    ("name: small", "name: small\nname: large", 'small.yaml:2:1  the key "name" is on line 1 already'),
]


@pytest.mark.parametrize(("right", "wrong", "message"), MISTAKES)
def test_a_mistake_in_a_file_is_named_with_its_place(servesim, tmp_path, right, wrong, message):
    refused = servesim("run", scenario_file(tmp_path, (right, wrong)))
    assert refused.status == 2
    assert message in refused.err
    assert "Traceback" not in refused.err
    assert not refused.out
    assert not (tmp_path / "out").exists()


def test_a_mistake_in_an_override_is_named(servesim):
    refused = servesim("run", "azure-conv-h100", "--set", "engine.blok_size=3")
    assert refused.status == 2
    assert "--set" in refused.err
    assert "did you mean block_size?" in refused.err


def test_a_missing_trace_is_named(servesim, tmp_path):
    file = scenario_file(tmp_path, (WORKLOAD, "workload: {trace: {file: no.csv, format: azure}}\n"))
    refused = servesim("run", file)
    assert refused.status == 2
    assert 'workload.trace.file  no such trace  got "no.csv"' in refused.err


def test_a_malformed_trace_row_is_named(servesim, tmp_path):
    (tmp_path / "bad.csv").write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,374,44\n2023-11-16 18:15:50,x,1\n"
    )
    file = scenario_file(tmp_path, (WORKLOAD, "workload: {trace: {file: bad.csv, format: azure}}\n"))
    refused = servesim("run", file)
    assert refused.status == 2
    assert "bad.csv:3" in refused.err
    assert "got 'x'  -> mend or remove the row" in refused.err


def test_a_model_that_does_not_fit_is_refused_with_remedies(servesim):
    refused = servesim("run", "azure-conv-h100", "--set", "model=llama-3.1-70b")
    assert refused.status == 2
    assert "131.4" in refused.err  # GiB of weights
    assert "tensor_parallel_size" in refused.err


def test_prompts_that_are_too_long_are_refused_one_by_one_and_reported(servesim):
    done = servesim("run", "azure-conv-h100", *SMALL, "--set", "engine.max_model_len=1000")
    assert done.status == 0
    failed = int(
        next(line.split()[-1] for line in done.out.splitlines() if line.startswith("Failed requests"))
    )
    assert 0 < failed < 60
    assert "max_model_len" in done.out


def test_that_nobody_is_served_is_said_on_stderr(servesim):
    words = ("azure-conv-h100", *SMALL, "--set", "engine.max_model_len=2", "--json")
    told = "not one of 60 requests was completed, so most figures are n/a -> the warnings"
    done = servesim("run", *words)
    assert done.status == 0
    assert done.err.startswith(f"servesim: azure-conv-h100: {told}")
    assert "refused" in json.loads(done.out)["warnings"][1]["text"]
    assert servesim("compare", "azure-conv-h100", *words).err.count(told) == 2


def test_an_output_folder_that_cannot_be_written_is_refused_before_simulating(servesim, tmp_path):
    (tmp_path / "taken").write_text("a file")
    refused = servesim("run", "azure-conv-h100", *SMALL, "--out", "taken")
    assert refused.status == 2
    assert "taken" in refused.err
    assert "--out" in refused.err
    assert not refused.out


def test_a_mistake_leaves_a_folder_of_the_users_alone(servesim, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    too_large = ("run", "azure-conv-h100", "--set", "model=llama-3.1-70b", "--out")
    for folder in ("mine", "mine/new/newer", str(tmp_path / "mine")):
        refused = servesim(*too_large, folder)
        assert (refused.status, "does not fit" in refused.err) == (2, True)
        assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["mine"]
    monkeypatch.chdir(tmp_path / "mine")
    assert servesim(*too_large, ".").status == 2


@pytest.mark.parametrize(
    "words",
    [("fragmentation", "std10k", "--block-sizes", "0"), ("prefix-cache", "std10k", "--sizes", "x")],
)
def test_an_option_that_is_none_leaves_no_folder(servesim, tmp_path, words):
    refused = servesim(*words)
    assert refused.status == 2
    assert words[2] in refused.err
    assert not list(tmp_path.iterdir())


def test_a_table_with_semicolons_is_no_csv(servesim, tmp_path):
    (tmp_path / "a.csv").write_text("arrival_s;prompt_tokens;output_tokens\n0.0;374;44\n")
    refused = servesim("run", "azure-conv-h100", "--set", "workload.trace={file: a.csv, format: csv}")
    told = "servesim: a.csv:1  has no commas between its columns  -> separate the columns by commas\n"
    assert (refused.status, refused.err) == (2, told)


def test_what_is_no_benchmark_says_what_one_is(servesim, tmp_path):
    for text in ("name: x\n", "[]"):
        (tmp_path / "a.json").write_text(text)
        refused = servesim("calibrate", "a.json")
        assert refused.status == 2
        assert "-> give a folder of recorded runs, or the JSON of `vllm bench serve" in refused.err


def test_an_unknown_scenario_is_named(servesim):
    refused = servesim("run", "azure-conv-h10")
    assert refused.status == 2
    assert "did you mean azure-conv-h100" in refused.err


def test_interrupting_keeps_a_partial_result_and_says_so(tmp_path):
    command = [sys.executable, "-c", "from servesim.cli import main; main()", "run", "mooncake-conv-h100"]
    process = subprocess.Popen(
        [*command, "--set", "workload.trace.rate_scale=2"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not (tmp_path / "out").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.7)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "partial" in err
    assert "interrupted" in out
    assert (tmp_path / "out/mooncake-conv-h100/report.html").exists()


@pytest.mark.parametrize("code", ["import servesim", "import servesim.cli"])
def test_importing_is_light(code):
    loaded = subprocess.run(
        [sys.executable, "-c", f"{code}; import sys; print(*sys.modules)"],
        capture_output=True, text=True, check=True, env={**os.environ, "PYTHONWARNINGS": "default"},
    ).stdout.split()  # fmt: skip
    assert not {"pandas", "plotly", "numpy", "simpy", "pydantic"} & set(loaded)


def test_overrides_of_a_loaded_scenario_are_refused_and_not_dropped():
    loaded = servesim_package.load("std10k")
    with pytest.raises(servesim_package.ServesimError, match=r"takes no overrides.*servesim\.load"):
        servesim_package.simulate(loaded, overrides=["engine.block_size=32"])
