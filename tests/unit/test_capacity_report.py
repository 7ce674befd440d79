"""What is said of a capacity study: no more than its verdicts do."""

from __future__ import annotations

import json
import math

import pytest

from servesim import api
from servesim.analysis.bisection import Verdict
from servesim.analysis.capacity import Bracket, Decision
from servesim.analysis.capacity_study import CapacityStudy
from servesim.analysis.intervals import Interval
from servesim.analysis.plan_bounds import Analytic
from servesim.analysis.plan_setup import traffic_in
from servesim.config.load import load_scenario
from servesim.report.capacity import capacity_html, capacity_json, capacity_text

LOADED = load_scenario("poisson-chat", ["workload.num_requests=100"])
ANALYTIC = Analytic(LOADED, traffic_in(LOADED), LOADED.scenario.slo)


def study(low: float, high: float, *verdicts: Verdict) -> CapacityStudy:
    decisions = tuple(
        Decision(float(rate), Interval(1.0, 0.9, 1.1, 8), verdict)
        for rate, verdict in enumerate(verdicts, start=1)
    )
    return CapacityStudy(LOADED, ANALYTIC, 10.0, Bracket(low, high, decisions), {}, "")


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (
            study(0, math.inf, "undecided", "undecided"),
            "surely kept at no rate, and surely missed at no rate; 10 to 20 req/s were tried.",
        ),
        (
            study(0, 2, "undecided", "missed"),
            "surely kept at no rate, and missed from 20 req/s on; 10 to 20 req/s were tried.",
        ),
        (
            study(1, math.inf, "kept", "undecided"),
            "kept up to 10 req/s, and surely missed at no rate; 10 to 20 req/s were tried.",
        ),
        (study(1, 2, "kept", "missed"), "It takes 10 req/s, 1 times this traffic; at 20 req/s"),
    ],
)
def test_what_is_not_decided_is_not_said(found: CapacityStudy, said: str) -> None:
    assert said in capacity_text(found)
    assert "20" in capacity_html(found)
    assert json.loads(capacity_json(found))["missed_from_per_s"] == (
        None if math.isinf(found.bracket.high) else 20
    )


def test_a_limit_on_what_no_request_has_breaks_with_the_queue() -> None:
    """Answers of one token have no TPOT: all that is left to miss is that the engine keeps up."""
    lengths = [
        "workload.prompt_tokens={law: fixed, tokens: 4000}",
        "workload.output_tokens={law: fixed, tokens: 1}",
    ]
    changes = [*lengths, "workload.sessions=null", "workload.num_requests=1500", "slo.ttft_p99_s=null"]
    found = api.capacity("poisson-chat", overrides=changes, jobs=1)
    low, high = found.bracket_per_s
    assert 0 < low < high < math.inf
    assert json.loads(found.files()["capacity.json"])["kept_up_to_per_s"] == low
