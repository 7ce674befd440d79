"""Step traces: of a scenario, of settings and requests, and of files that are wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from servesim import ServesimError, api
from servesim.cli import main
from step_compare import first_difference

SETTINGS: dict[str, Any] = {
    "num_gpu_blocks": 20,
    "block_size": 4,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 32,
    "max_model_len": 64,
    "step_time": {"a": 0.01, "b": 1e-4, "c": 1e-6},
}
ARRIVALS = [(0.0, 20, 12), (0.004, 33, 9), (0.05, 7, 20), (0.051, 40, 3), (0.051, 12, 30), (0.9, 5, 1)]
REQUESTS = [
    {"id": f"line-{number + 2}", "arrival": arrival, "unique_len": prompt, "output_len": output}
    for number, (arrival, prompt, output) in enumerate(ARRIVALS)
]
SCENARIO = """\
name: traced
model: llama-3.1-8b
hardware: {gpu: h100-sxm}
engine:
  num_gpu_blocks_override: 20
  block_size: 4
  max_num_seqs: 4
  max_num_batched_tokens: 32
  max_model_len: 64
  async_scheduling: %s
  step_time: {law: linear, base_s: 0.01, per_token_s: 1.0e-4, per_context_token_s: 1.0e-6}
workload:
  trace: {file: requests.csv, format: csv}
"""


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "settings.json").write_text(json.dumps(SETTINGS))
    (tmp_path / "requests.jsonl").write_text("".join(json.dumps(r) + "\n" for r in REQUESTS))
    return tmp_path


def servesim(*words: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["servesim", *words])
        with pytest.raises(SystemExit) as end:
            main()
    if end.value.code:
        raise AssertionError(f"exit {end.value.code}")


def read(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]:
    head, *steps, last = [json.loads(line) for line in path.read_text().splitlines()]
    return head, steps, last["summary"]


def refusal(settings: Any = SETTINGS, requests: Any = REQUESTS, **options: Any) -> str:
    with pytest.raises(ServesimError) as refused:
        list(api.trace(settings, requests, **options))
    return str(refused.value)


# ---- what is written ---------------------------------------------------------------------------


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_scenario_and_its_bare_scheduler_leave_the_same_trace(files: Path, asynchronous: bool) -> None:
    rows = "".join(f"{arrival},{prompt},{output}\n" for arrival, prompt, output in ARRIVALS)
    (files / "requests.csv").write_text(f"arrival_s,prompt_tokens,output_tokens\n{rows}")
    (files / "traced.yaml").write_text(SCENARIO % str(asynchronous).lower())
    servesim("run", "traced.yaml", "--json", "--step-trace", "run.jsonl")
    (files / "settings.json").write_text(json.dumps({**SETTINGS, "async_scheduling": asynchronous}))
    servesim("trace", "--settings", "settings.json", "--requests", "requests.jsonl", "--out", "trace.jsonl")
    ours, theirs = read(files / "run.jsonl"), read(files / "trace.jsonl")
    assert len(ours[1]) > 40
    assert any(step["preempted"] for step in ours[1])
    assert first_difference(ours[1], theirs[1]) is None
    for key in ("t", "start", "dur"):
        expected = [step[key] for step in theirs[1]]
        assert [step[key] for step in ours[1]] == pytest.approx(expected, abs=2e-9), key
    assert ours[2] == pytest.approx(theirs[2])
    assert ours[2]["completed"] == len(ARRIVALS)
    assert ours[2]["output_tokens"] == sum(output for _, _, output in ARRIVALS)
    assert ours[0]["vllm"] == theirs[0]["vllm"] == "0.26"
    assert theirs[0]["settings"]["num_gpu_blocks"] == ours[0]["settings"]["engine"]["num_gpu_blocks_override"]


def test_a_step_trace_changes_no_result(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ("run", "poisson-chat", "--set", "workload.num_requests=60", "--json")
    servesim(*run)
    plain = json.loads(capsys.readouterr().out)
    servesim(*run, "--step-trace", "steps.jsonl")
    traced = json.loads(capsys.readouterr().out)
    _, steps, summary = read(files / "steps.jsonl")
    assert traced["total_output_tokens"] == plain["total_output_tokens"] == summary["output_tokens"]
    assert traced["duration"] == pytest.approx(plain["duration"], rel=1e-9)
    assert summary["mean_ttft_s"] * 1e3 == pytest.approx(plain["mean_ttft_ms"], rel=1e-9)
    assert sum(sum(step["emitted"].values()) for step in steps) == plain["total_output_tokens"]


def test_the_trace_goes_to_stdout_when_no_file_is_named(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    servesim("trace", "--settings", "settings.json", "--requests", "requests.jsonl", "--blocks")
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == json.loads(json.dumps(list(api.trace(SETTINGS, REQUESTS, blocks=True))))
    assert lines[1]["tables"] == {"line-2": [[1, 2, 3, 4, 5]]}


def test_prompts_by_token_ids_segments_and_prefixes_share_what_is_the_same() -> None:
    prompts = [
        {"prompt_token_ids": [7, 8, 9, 10, 11]},
        {"prompt_token_ids": [7, 8, 9, 10, 12]},
        {"segments": [["a", 5]]},
        {"prefix_id": "a", "prefix_len": 4, "unique_len": 2},
        {"segments": [["a", 4], ["out:2", 2], ["b", 3]]},
    ]
    requests = [
        {"id": number, "output_len": 2, "arrival_step": 9 * number, **prompt}
        for number, prompt in enumerate(prompts)
    ]
    hits: dict[str, int] = {}
    for step in api.trace(SETTINGS, requests):
        hits |= step.get("new", {})
    assert hits == {"0": 0, "1": 4, "2": 0, "3": 4, "4": 4}


def test_n_gram_drafts_pad_a_new_decode_out_of_a_step_that_has_no_room_for_them() -> None:
    """What vLLM 0.26 schedules; the conformance suite found it (docs/conformance.md)."""
    spec = {"num_tokens": 1, "acceptance": 0.0, "mode": "ngram", "seed": 0}
    settings = SETTINGS | {"num_gpu_blocks": 3, "block_size": 16, "max_model_len": 17, "spec": spec}
    settings |= {"max_num_batched_tokens": 3, "max_num_seqs": 2, "async_scheduling": False}
    requests = [
        {"id": f"r{number}", "segments": [[f"u{number}", 1]], "output_len": length, "arrival": 0.0}
        for number, length in enumerate((1, 2, 1))
    ]
    _, _, second, *_ = api.trace(settings, requests, version="0.26")
    assert second["sched"] == {"r1": [2, 1]}


# ---- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("acceptance", "words"),
    [
        ([0.5], "spec.acceptance  needs one rate for each of the 4 drafts"),
        (1.7, "spec.acceptance  must be 1 or less"),
        ([0.5, 0.5, 0.5, -0.1], "spec.acceptance[3]  must be 0 or more"),
    ],
)
def test_acceptance_is_a_rate_or_one_for_every_draft(acceptance: Any, words: str) -> None:
    settings = SETTINGS | {"spec": {"num_tokens": 4, "acceptance": acceptance}}
    with pytest.raises(ServesimError) as caught:
        api.trace(settings, REQUESTS)
    assert words in str(caught.value)


def test_every_problem_of_the_settings_is_told_with_its_line(files: Path) -> None:
    text = (
        '{\n "num_gpu_blocks": 20,\n "block_sise": 4,\n "watermark": 2,\n "kv_groups": [{"type": "sliding"}]}'
    )
    (files / "settings.json").write_text(text)
    told = refusal("settings.json", "requests.jsonl")
    assert "settings.json:3:2  block_sise  unknown key  did you mean block_size?" in told
    assert "settings.json:4:15  watermark" in told
    assert "window is missing" in told


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("[1, 2]", "is not a JSON object"),
        ('{"id": "x", "output_len": 3', "is not a JSON object"),
        ('{"id": "x", "output_len": 3}', "the prompt must be given in one way"),
        ('{"id": "x", "output_len": 0, "unique_len": 3}', "output_len  must be 1 or more  got 0"),
        ('{"id": "x", "output_len": 3, "unique_len": 0}', "the prompt is empty"),
        ('{"id": "x", "output_len": 3, "unique_len": 64}', "must be less than max_model_len (64)"),
        ('{"id": "x", "output_len": 3, "unique_len": 6, "prefix_id": "a"}', "go together"),
        ('{"id": "x", "output_len": 3, "unique_len": 6, "arrival": 1, "arrival_step": 2}', "both by step"),
        ('{"id": "x", "output_len": 3, "unique_len": 6, "arival": 1}', "did you mean arrival?"),
    ],
)
def test_a_wrong_request_is_told_with_its_line(files: Path, line: str, words: str) -> None:
    with (files / "requests.jsonl").open("a") as file:
        file.write(line + "\n")
    told = refusal("settings.json", "requests.jsonl")
    assert told.startswith(f"requests.jsonl:{len(REQUESTS) + 1}  ")
    assert words in told


def test_requests_that_contradict_one_another_are_refused(files: Path) -> None:
    by_step = {"id": "x", "output_len": 3, "unique_len": 6, "arrival_step": 2}
    assert "some requests arrive by step and some by time" in refusal(requests=[*REQUESTS, by_step])
    assert "two requests have one id" in refusal(requests=[*REQUESTS, REQUESTS[0]])
    assert "empty" in refusal(requests=[])
    assert "cannot be read" in refusal("settings.json", "absent.jsonl")


def test_what_can_never_run_is_refused() -> None:
    assert "request line-3  can never be admitted" in refusal({**SETTINGS, "num_gpu_blocks": 9})
    assert "unknown vLLM version" in refusal(version="0.99")


def test_a_trace_that_cannot_be_written_is_told_before_anything_runs(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for out in ("absent/trace.jsonl", "."):
        words = ("trace", "--settings", "settings.json", "--requests", "requests.jsonl", "--out", out)
        with pytest.raises(AssertionError, match="exit 2"):
            servesim(*words)
        assert "the step trace cannot be written" in capsys.readouterr().err
    assert sorted(path.name for path in files.iterdir()) == ["requests.jsonl", "settings.json"]
