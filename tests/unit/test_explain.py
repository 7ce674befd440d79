"""`servesim explain` as a user meets it, and the rules by which it names a cause."""

from __future__ import annotations

import html
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from servesim import api
from servesim.analysis.attribution import PARTS
from servesim.analysis.explain import explain_scenario
from servesim.analysis.explain_cause import cause_of
from servesim.analysis.explain_trials import Trial, run_trial
from servesim.analysis.remedies import Remedy, applied, remedies_of
from servesim.analysis.simulation import prepare
from servesim.cli import main
from servesim.config.load import load_scenario
from servesim.errors import ConfigError, StudyError
from servesim.report.explain import explanation_text
from servesim.report.explain_words import CAUSE_WORDS, PART_LABELS

SMALL = """\
name: small
model: llama-3.1-8b
hardware: {gpu: h100-sxm}
engine: {max_model_len: 2048, max_num_seqs: 4}
workload:
  num_requests: 150
  arrivals: {process: poisson, rate_per_s: 20}
  prompt_tokens: {law: fixed, tokens: 200}
  output_tokens: {law: geometric, mean_tokens: 30}
"""


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "small.yaml"
    file.write_text(SMALL)
    return file


def servesim(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str):
    monkeypatch.setattr(sys, "argv", ["servesim", *words])
    status = 0
    try:
        main()
    except SystemExit as stopped:
        status = int(stopped.code or 0)
    return status, *capsys.readouterr()


def test_the_command_prints_and_writes(small, monkeypatch, capsys):
    status, out, err = servesim(monkeypatch, capsys, "explain", "small.yaml", "--jobs", "1")
    assert status == 0
    assert "Why P99 TTFT is" in out
    assert "Cause: too few slots" in out
    assert "Set: engine.max_num_seqs=" in out
    assert "on other requests -" in out
    assert "Warning: P99 of 150 requests rests on 2 of them" in out
    assert "Wrote out/small-explained" in err
    folder = Path("out/small-explained")
    assert sorted(path.name for path in folder.iterdir()) == ["explain.html", "explain.json", "parts.csv"]
    page = (folder / "explain.html").read_text()
    assert "too few slots" in page
    assert "Waiting for a slot" in page
    rows = (folder / "parts.csv").read_text().splitlines()
    assert len(rows) == 151
    again = servesim(monkeypatch, capsys, "explain", "small.yaml", "--jobs", "2")[1]
    assert again == out


def test_json_holds_every_part_and_trial(small, monkeypatch, capsys):
    words = ["explain", "small.yaml", "--metric", "e2e_p99", "--json", "--jobs", "1"]
    status, out, _ = servesim(monkeypatch, capsys, *words)
    assert status == 0
    assert not Path("out").exists()
    of = json.loads(out)
    assert of["metric"] == "e2e_p99"
    assert set(of["parts_s"]["tail"]) == set(PARTS)
    base = api.simulate("small.yaml").summary.e2el.p99_s
    assert of["value_s"] == pytest.approx(base)
    changes = [one["change"] for one in of["remedies"] if "change" in one]
    assert changes == sorted(changes)
    assert set(of["recommended"]) <= {one["key"] for one in of["remedies"]}


def test_parts_of_every_metric_add_up(small):
    of = api.explain(small, jobs=1).explanation.attribution
    for metric in ("ttft", "tpot", "e2e"):
        values = of.metric_s(metric)
        known = values == values
        assert of.parts_of(metric)[known].sum(axis=1) == pytest.approx(values[known], rel=1e-9)


def test_mistakes_are_told(small, monkeypatch, capsys):
    with pytest.raises(ConfigError, match="ttft_p99, tpot_p99 or e2e_p99"):
        api.explain(small, "p99")
    assert servesim(monkeypatch, capsys, "explain", "nothing.yaml")[0] == 2
    single = load_scenario(small, ["workload.output_tokens={law: fixed, tokens: 1}"])
    with pytest.raises(StudyError, match="no completed request has a TPOT"):
        explain_scenario(single, "tpot", lambda tasks: [run_trial(task) for task in tasks])


def test_what_cannot_be_had_is_said_with_its_reason(small):
    of = api.explain(small, overrides=["hardware.gpu=a100-80gb-sxm"], jobs=1).explanation
    [fp8] = [one for one in of.remedies if one.key == "engine.kv_cache_dtype=fp8"]
    assert fp8.figures is None
    assert "fp8 KV cache" in fp8.refused
    assert "Not possible: engine.kv_cache_dtype=fp8" in explanation_text(of)
    assert fp8 not in of.ranked


def test_a_remedy_is_a_setting_that_set_takes(small):
    loaded = load_scenario(small, ["seed=3"])
    for remedy in remedies_of(prepare(loaded)):
        by_hand = load_scenario(small, ["seed=3", *remedy.text.split()])
        assert by_hand.scenario == applied(loaded, remedy).scenario


def test_a_remedy_against_the_rules_is_refused(small):
    remedy = Remedy({"engine.allocator": "contiguous-max", "engine.watermark": 0.1})
    with pytest.raises(ConfigError, match="needs allocator: paged"):
        applied(load_scenario(small), remedy)


def test_every_part_and_cause_has_words():
    assert set(PART_LABELS) == set(PARTS)
    assert all(len(words) == 3 for words in CAUSE_WORDS.values())


def test_what_was_never_tried_is_not_the_cause(small):
    """Nothing relaxes a linear law, and a prefix cache that is on cannot be switched on."""
    law = "{law: linear, base_s: 0.005, per_token_s: 0.0001}"
    engine = f"engine={{max_num_seqs: 64, enable_prefix_caching: true, step_time: {law}}}"
    of = api.explain(small, overrides=[engine], jobs=1).explanation
    assert not {"cold_cache", "compute", "bandwidth"} & {one.cause for one in of.relaxations}
    assert of.cause == "compute"


def test_what_saves_nothing_is_not_the_cause():
    seconds = np.array([float(part == "weights") for part in PARTS])
    for saved in ({"kv": 0.0, "slots": -0.1}, {"kv": float("nan")}, {}):
        assert cause_of("tpot", False, False, seconds, seconds, saved, 1.0) == "compute"
    assert cause_of("tpot", False, False, seconds, seconds, {"kv": 0.0, "slots": 0.01}, 1.0) == "slots"


@pytest.mark.parametrize("tokens", [1, 2])  # one has no TPOT
def test_where_nothing_is_drawn_there_are_no_other_requests(small, tokens):
    arrivals, outputs = "{process: constant, rate_per_s: 200}", f"{{law: fixed, tokens: {tokens}}}"
    drawn = [f"workload.arrivals={arrivals}", f"workload.output_tokens={outputs}", "engine.max_num_seqs=1"]
    found = api.explain(small, overrides=drawn, jobs=1)
    assert found.explanation.recommended
    assert found.explanation.checked == {}
    assert "on other requests" not in str(found)


def test_why_nothing_is_recommended_is_told(small):
    found = api.explain(small, jobs=1)
    of = found.explanation
    assert of.recommended
    chance = "What helps most on these requests does not save 5 % on others of their kind"
    nothing = "Nothing that was tried helps by 5 % or more"
    for change, told in (
        ({"checked": dict.fromkeys((one.key for one in of.candidates), 0.01)}, chance),
        ({"remedies": ()}, nothing),
    ):
        unadvised = replace(found, explanation=replace(of, **change))
        assert unadvised.explanation.recommended == []
        for shown in (str(unadvised), html.unescape(unadvised.to_html())):
            assert [text for text in (chance, nothing) if text in shown] == [told]


def test_a_remedy_shows_its_price_and_a_flag_costs_nothing(small, monkeypatch, capsys):
    words = ["explain", "small.yaml", "--jobs", "1", "--price", "h100-sxm=2", "--price", "b200=3"]
    of = json.loads(servesim(monkeypatch, capsys, *words, "--json")[1])
    assert of["usd_per_hour"] == 2
    prices = {one["key"]: one["usd_per_hour"] for one in of["remedies"] if "usd_per_hour" in one}
    assert prices["engine.max_num_seqs=8"] == 2
    assert prices["hardware.replicas=2"] == prices["engine.tensor_parallel_size=2"] == 4
    assert prices["hardware.gpu=b200"] == 3
    out = servesim(monkeypatch, capsys, *words)[1]
    [flag] = [line for line in out.splitlines() if line.startswith("Set: ")]
    [purchase] = [line for line in out.splitlines() if line.startswith("Or buy: ")]
    assert flag.endswith(", at no cost.")
    key = purchase.split()[2].rstrip(":")
    assert purchase.endswith(f", ${prices[key] - 2:.2f}/h more (${prices[key]:.2f} instead of $2.00).")


@pytest.mark.parametrize(
    ("price", "told"),
    [
        ("h100-sxm", "not a price"),
        ("h100-sxm=-1", "not a price"),
        ("h100-sxm=nan", "not a price"),
        ("h10-sxm=2", "did you mean h100-sxm"),
    ],
)
def test_a_price_that_is_none_is_told(small, monkeypatch, capsys, price, told):
    status, out, err = servesim(monkeypatch, capsys, "explain", "small.yaml", "--price", price)
    assert (status, out) == (2, "")
    assert told in err


def test_of_purchases_with_which_a_missed_slo_is_kept_the_cheapest_comes_first(small):
    def purchases(*slo: str) -> list[Trial]:
        prices = {"h100-sxm": 2, "b200": 5, "h200-sxm": 6}
        found = api.explain(small, overrides=slo, prices_usd_per_hour=prices, jobs=1).explanation
        [first] = [one for one in found.recommended if one.kind == "purchase"]
        return [first, *(one for one in found.ranked if one.kind == "purchase")]

    _, *others = purchases()
    best, second = others[:2]
    assert (best.key, second.key) == ("hardware.gpu=b200", "hardware.replicas=2")
    for limit_s, cheapest in (
        (best.figures.ttft, best),
        (second.figures.ttft, second),  # which costs less
        (999, purchases()[0]),  # nothing to mend
    ):
        assert purchases(f"slo.ttft_p99_s={limit_s}")[0].key == cheapest.key


def test_the_slo_is_told(small):
    missed, kept = (str(api.explain(small, overrides=[f"slo.ttft_p99_s={s}"], jobs=1)) for s in (0.001, 99))
    assert "SLO: P99 TTFT <= 1.00 ms is missed" in missed
    assert "SLO: P99 TTFT <= 1 min 39 s is kept" in kept


def test_the_replicas_of_a_fleet_are_told_apart(small):
    fleet = ["hardware.replicas=3", "workload.arrivals.rate_per_s=60"]
    of = api.explain(small, overrides=fleet, jobs=1)
    tails = of.explanation.replicas
    assert sorted(one.replica for one in tails) == [0, 1, 2]
    assert sum(one.requests for one in tails) == 150
    assert sum(one.in_tail for one in tails) == len(of.explanation.tail)
    assert [one.p99_s for one in tails] == sorted((one.p99_s for one in tails), reverse=True)
    assert f"Slowest replica: number {tails[0].replica}, counted from 0: P99 TTFT" in str(of)
    assert {one.key for one in of.explanation.remedies} >= {
        "hardware.replicas=4", "hardware.router=least-outstanding", "hardware.router=prefix-affinity",
    }  # fmt: skip
    assert of.frame.columns[0] == "replica"


def test_replicas_that_stand_for_others_are_explained(small):
    many = ["hardware.replicas=100", "hardware.simulated_replicas=2", "workload.arrivals.rate_per_s=2000",
            "workload.num_requests=6000"]  # fmt: skip
    of = api.explain(small, overrides=many, jobs=1).explanation
    assert len(of.replicas) == 2
    assert of.cause == "slots"
    assert any(one.key == "hardware.replicas=125" for one in of.ranked)
    [refused] = [one for one in of.remedies if one.key == "hardware.router=least-outstanding"]
    assert "hardware.simulated_replicas" in refused.refused or "does not go with" in refused.refused


def test_an_autoscaler_that_comes_late_is_the_cause_and_its_limits_are_remedies(small):
    scaler = "{min_replicas: 1, max_replicas: 3, target: 2, interval_s: 1, startup_s: 60}"
    overrides = [f"fleet={{autoscaler: {scaler}}}", "workload.num_requests=400"]
    of = api.explain(small, overrides=overrides, jobs=1).explanation
    assert of.cause == "autoscaler"
    tried = {one.key: one for one in of.remedies}
    at = "fleet.autoscaler"
    assert {f"{at}.interval_s={1 / 3}", f"{at}.target={2 / 1.5}", f"{at}.max_replicas=4"} <= set(tried)
    more = tried[f"{at}.min_replicas=2 hardware.replicas=2"]
    assert more.change(of.metric, of.figures) < -0.1
    assert of.extra_usd_per_hour(more) > 0
    run = api.simulate(small, overrides=overrides).summary
    assert of.usd_per_hour == pytest.approx(run.price_per_hour_usd)


def test_pools_and_their_prices(small):
    pools = "{one: {replicas: 2}, other: {gpu: b200, replicas: 1, weight: 2}}"
    overrides = [f"fleet={{pools: {pools}}}", "workload.arrivals.rate_per_s=60"]
    of = api.explain(small, overrides=overrides, prices_usd_per_hour={"h100-sxm": 2}, jobs=1).explanation
    assert of.usd_per_hour == pytest.approx(2 * 2 + 5.25)
    tried = {one.key: one for one in of.ranked}
    assert tried["fleet.pools.one.replicas=3"].usd_per_hour == pytest.approx(3 * 2 + 5.25)
    assert tried["fleet.pools.other.replicas=2"].usd_per_hour == pytest.approx(2 * 2 + 2 * 5.25)
    [slots] = [one for one in of.relaxations if one.key == "slots"]  # of every pool
    assert slots.change(of.metric, of.figures) < -0.5
