"""Trials of a plan: what they attain, and whether the queue grows; and which requests they serve."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from servesim.analysis.caveats import Caveat
from servesim.analysis.metrics import summarise
from servesim.analysis.plan_trials import TrialTask, _drawn, _read, _redrawn, run_trial
from servesim.analysis.simulation import prepare, run_prepared
from servesim.config.load import LoadedScenario, load_scenario
from servesim.errors import StudyError


def test_overload_of_sessions_is_not_hidden_by_their_later_turns() -> None:
    """Chats begin for a minute, faster than they can be taken in; their last turns come in ten."""
    chats = ["workload.num_requests=4000", "engine.max_num_seqs=32", "workload.arrivals.rate_per_s=12"]
    loaded = load_scenario("poisson-chat", [*chats, "workload.sessions.think_time_s=100"])
    assert not run_trial(TrialTask(loaded, 1.0, 1, 1, "round-robin", 0)).is_stable
    assert Caveat.OVERLOAD in [one.caveat for one in summarise(run_prepared(prepare(loaded))).warnings]
    slower = TrialTask(loaded, 0.3, 1, 1, "round-robin", 0)
    assert run_trial(slower).is_stable


def test_a_limit_on_what_no_request_has_is_kept() -> None:
    """Answers of one token have no TPOT; what breaks is the queue alone."""
    one = ["workload.sessions=null", "workload.output_tokens={law: fixed, tokens: 1}"]
    loaded = load_scenario("poisson-chat", [*one, "slo.ttft_p99_s=null", "workload.num_requests=3000"])
    trial = run_trial(TrialTask(loaded, 1.0, 1, 1, "round-robin", 0))
    assert trial.keeps
    assert (trial.worst, trial.attained) == ("tpot", 1e-3)
    assert math.isnan(trial.p99_s["tpot"])


def test_replicas_that_get_nothing_are_too_few_requests() -> None:
    loaded = load_scenario("poisson-chat", ["workload.num_requests=10"])
    with pytest.raises(StudyError, match="too few requests"):
        run_trial(TrialTask(loaded, 1.0, 50, 1, "random", 0))


TRACED = """\
name: traced
model: llama-3.1-8b
hardware: {gpu: h100-sxm}
workload: {trace: {file: TRACE}}
slo: {ttft_p99_s: 1}
"""


def traced(folder: Path, trace: str) -> LoadedScenario:
    (folder / "traced.yaml").write_text(TRACED.replace("TRACE", trace))
    return load_scenario(folder / "traced.yaml")


def served(loaded: LoadedScenario, seed: int) -> list[tuple[float, int]]:
    drawn = _redrawn(TrialTask(loaded, 1.0, 1, 1, "round-robin", seed))
    return [(request.arrival_s, request.prompt_tokens) for request in drawn.arrivals()]


def test_what_a_trial_serves_does_not_depend_on_the_trials_before_it(tmp_path: Path) -> None:
    """Mooncake's times are spread by the seed: the scenario's, whichever trial reads the trace first."""
    lines = [
        {"timestamp": 3000 * (n // 4), "input_length": 10 + n, "output_length": 5, "hash_ids": [n]}
        for n in range(40)
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    loaded = traced(tmp_path, "chats.jsonl, format: mooncake")
    first = {seed: served(loaded, seed) for seed in (1, 2)}
    _drawn.clear()
    _read.clear()
    assert {seed: served(loaded, seed) for seed in (2, 1)} == first
    assert first[1] != first[2]


def test_traces_of_one_name_are_told_apart_and_an_edited_one_is_read_again(tmp_path: Path) -> None:
    def lengths(folder: Path, tokens: int) -> set[int]:
        folder.mkdir(exist_ok=True)
        rows = (f"{second},{tokens},5\n" for second in range(3))
        (folder / "trace.csv").write_text("".join(("arrival_s,prompt_tokens,output_tokens\n", *rows)))
        return {prompt for _, prompt in served(traced(folder, "trace.csv, format: csv"), 1)}

    assert lengths(tmp_path / "a", 100) == {100}
    assert lengths(tmp_path / "b", 200) == {200}
    assert lengths(tmp_path / "b", 3000) == {3000}
