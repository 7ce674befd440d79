"""Expectations: what a scenario may expect, what is said of it, and how the command ends."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from servesim import api
from servesim.analysis.expectations import check_expectations, metrics_of
from servesim.cli import main
from servesim.config.expect import Expectation
from servesim.errors import ConfigError

RESULT = {
    "completed": 40,
    "p99_ttft_ms": 120.5,
    "slo": [],
    "engine": {"mean_running": 3.0, "shares": {"tokens": 0.25}},
    "offered_request_rate": "inf",
    "mean_itl_ms": None,
}


def finding(**given: Any) -> Any:
    (one,) = check_expectations([Expectation.model_validate(given)], RESULT)
    return one


@pytest.mark.parametrize(
    ("given", "met"),
    [
        ({"metric": "completed", "value": 40, "tolerance": 0}, True),
        ({"metric": "completed", "value": 41, "tolerance": 0.5}, False),
        (
            {"metric": "engine.mean_running", "value": 2.9, "tolerance": 0.1},
            True,
        ),  # at the edge, but rounding
        ({"metric": "engine.mean_running", "value": 3.2, "tolerance_percent": 7}, True),
        ({"metric": "engine.mean_running", "value": 3.2, "tolerance_percent": 6}, False),
        ({"metric": "engine.mean_running", "value": -3, "tolerance_percent": 10}, False),
        ({"metric": "p99_ttft_ms", "at_most": 120.5}, True),
        ({"metric": "p99_ttft_ms", "at_most": 120}, False),
        ({"metric": "p99_ttft_ms", "at_least": 100, "at_most": 200}, True),
        ({"metric": "engine.shares.tokens", "at_least": 0.3}, False),
        ({"metric": "offered_request_rate", "at_least": 1e9}, True),
        ({"metric": "mean_itl_ms", "at_most": 1e9}, False),  # there is no such figure in this run
    ],
)
def test_a_figure_meets_or_misses(given: dict[str, Any], met: bool) -> None:
    assert finding(**given).met is met


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "expects nothing"),
        ({"value": 3}, "needs one tolerance"),
        ({"value": 3, "tolerance": 1, "tolerance_percent": 1}, "has two tolerances"),
        ({"tolerance": 1}, "needs a value"),
        ({"value": 3, "tolerance": 1, "at_most": 4}, "does not go with value"),
        ({"at_least": 4, "at_most": 3}, "is above at_most"),
        ({"value": 3, "tolerance": -1}, "greater than or equal to 0"),
    ],
)
def test_an_expectation_says_one_thing(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Expectation.model_validate({"metric": "completed", **given})


@pytest.mark.parametrize(
    ("metric", "hint"),
    [
        ("engine.mean_runing", "did you mean engine.mean_running?"),
        ("mean_running", "did you mean engine.mean_running?"),
        ("p99_ttft", "did you mean p99_ttft_ms?"),
        ("slo", "take a path of the JSON result"),  # a list is no number
    ],
)
def test_an_unknown_metric_is_told_with_its_neighbours(metric: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        finding(metric=metric, at_most=1)
    assert f"expect[0].metric  unknown metric  got {metric}" in str(caught.value)
    assert hint in str(caught.value)


def test_every_number_of_a_result_has_a_path() -> None:
    assert set(metrics_of(RESULT)) == {
        "completed",
        "p99_ttft_ms",
        "engine.mean_running",
        "engine.shares.tokens",
        "offered_request_rate",
        "mean_itl_ms",
    }


# ---- the command ------------------------------------------------------------------------------------

SCENARIO = """\
extends: poisson-chat
name: plan
workload: {num_requests: 50}
expect:
  - {metric: completed, value: 50, tolerance: 0, source: the workload}
"""


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Any:
    monkeypatch.chdir(tmp_path)

    def run(text: str, *words: str) -> tuple[int, str, str]:
        Path("plan.yaml").write_text(text)
        monkeypatch.setattr(sys, "argv", ["servesim", "run", "plan.yaml", *words])
        status = 0
        try:
            main()
        except SystemExit as stopped:
            status = int(stopped.code or 0)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def test_a_run_that_meets_its_expectations_ends_with_0(command: Any) -> None:
    status, out, _ = command(SCENARIO, "--expect")
    assert status == 0
    assert "ok completed 50 +- 0 50" in " ".join(out.split())
    assert "the workload" in out
    assert " 1 of 1 expectations met " in out


def test_a_missed_expectation_ends_with_1_after_everything_is_written(command: Any, tmp_path: Path) -> None:
    text = SCENARIO + "  - {metric: engine.mean_running, at_most: 0.001}\n"
    status, out, _ = command(text, "--expect")
    assert status == 1
    assert "MISSED engine.mean_running at most 0.001 1.637" in " ".join(out.split())
    assert (tmp_path / "out/plan/report.html").is_file()
    status, out, _ = command(text)
    assert status == 0, "only --expect asks"
    assert "Expectations" not in out


def test_json_has_the_expectations(command: Any) -> None:
    status, out, _ = command(
        SCENARIO, "--expect", "--json", "--set", "expect=[{metric: failed, at_least: 1}]"
    )
    assert status == 1
    assert json.loads(out)["expectations"] == [
        {"metric": "failed", "at_least": 1.0, "simulated": 0.0, "met": False}
    ]


def test_mistakes_are_found_before_anything_is_simulated(
    command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("servesim.api.run_prepared", lambda *args, **options: pytest.fail("simulated"))
    status, _, err = command(SCENARIO.replace("completed", "engine.completed"), "--expect")
    assert status == 2
    assert "plan.yaml  expect[0].metric  unknown metric  got engine.completed  did you mean completed?" in err
    status, _, err = command(SCENARIO.split("expect")[0], "--expect")
    assert status == 2
    assert "plan.yaml  expect  the scenario expects nothing  -> add a list" in err


def test_metrics_that_some_runs_have_are_known_where_they_are(command: Any) -> None:
    expect = "expect=[{metric: spec_decode_acceptance_rate, at_least: 1}]"
    assert command(SCENARIO, "--expect", "--set", expect)[0] == 2
    draft = "engine.speculative={method: ngram, num_speculative_tokens: 2, acceptance: {law: iid, rate: 0.6}}"
    assert command(SCENARIO, "--expect", "--set", expect, "--set", draft)[0] == 0


def test_what_is_expected_does_not_change_the_configuration(command: Any) -> None:
    command(SCENARIO)
    other = "expect=[{metric: failed, value: 0, tolerance: 0}]"
    few = ["workload.num_requests=5"]
    first, second = (api.simulate("plan.yaml", overrides=each) for each in (few, [*few, other]))
    assert first.run.config_hash == second.run.config_hash
    assert [one.met for one in second.expectations] == [True]
