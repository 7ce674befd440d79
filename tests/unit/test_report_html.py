"""The HTML pages: complete, self-contained, and safe with any name. Drawn in a browser in tests/ui."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from plotly.offline import get_plotlyjs

from handmade import handmade_log, handmade_run
from servesim import api
from servesim.analysis.metrics import summarise
from servesim.analysis.series import time_series
from servesim.engine.events import Log
from servesim.report import charts
from servesim.report.html import comparison_html, report_html
from servesim.units import format_seconds

ALL_FIGURES = {"cdf-ttft", "cdf-tpot", "cdf-itl", "cdf-e2el", "throughput", "load", "kv", "memory"}


def _report(**changes):
    run = handmade_run(**changes)
    return report_html(run, summarise(run))


def _comparison():
    a, b = handmade_run(), handmade_run(name="other", seed=8)
    return comparison_html((a, summarise(a)), (b, summarise(b)))


def _figures(page: str) -> dict:
    [text] = re.findall(r'<script type="application/json" id="figures">(.*?)</script>', page, re.DOTALL)
    return json.loads(text)


def _without_plotly(page: str) -> str:
    assert page.count(get_plotlyjs()) == 1
    return page.replace(get_plotlyjs(), "")


@pytest.mark.parametrize("page", [_report, _comparison])
def test_nothing_is_asked_from_the_network(page):
    own = _without_plotly(page())
    assert not re.findall(r"https?://", own)
    assert not re.findall(r"""(?:src|href)\s*=\s*(?!["']?(?:data:|#)).*""", own)
    assert "@import" not in own
    assert "default-src 'none'" in own


def test_the_report_has_every_figure_and_a_place_for_it():
    page = _report()
    figures = _figures(page)
    assert set(figures) == ALL_FIGURES
    for name, figure in figures.items():
        assert re.search(f'<div class="chart" id="{name}" role="img" aria-label="[^"]+">', page)
        assert figure["data"]


@pytest.mark.parametrize("name", ["cdf-ttft", "throughput", "load", "kv", "memory"])
def test_axes_have_titles_with_units(name):
    layout = _figures(_report())[name]["layout"]
    assert layout["xaxis"]["title"]["text"].endswith((")",))
    if name != "memory":
        assert layout["yaxis"]["title"]["text"]


def test_slo_lines_stand_at_their_limits():
    layout = _figures(_report())["cdf-ttft"]["layout"]
    assert [shape["x0"] for shape in layout["shapes"]] == [400]
    assert [note["text"] for note in layout["annotations"]] == ["SLO 400 ms"]
    assert not _figures(_report(slo={}))["cdf-ttft"]["layout"]["shapes"]


def test_the_stacked_pool_is_the_pool_at_every_instant():
    stack = [trace for trace in _figures(_report())["kv"]["data"] if "stackgroup" in trace]
    assert len(stack) == 7
    for slots in zip(*(trace["y"] for trace in stack), strict=True):
        assert sum(slots) == pytest.approx(56, rel=1e-4)


def test_preemptions_are_marked_when_they_happen():
    run = handmade_run(handmade_log())
    run.log.steps.columns["preemptions"][3] = 2
    figure = charts.kv_over_time(time_series(run), summarise(run).kv, 56 * 2**30)
    marks = figure["data"][-1]
    assert (marks["name"], marks["customdata"]) == ("Preemptions", [2])
    assert marks["x"][0] == pytest.approx(1.0, abs=2.3 / 20)  # in the bin where the row begins


def test_tables_tell_configuration_memory_warnings_and_provenance():
    page = _report()
    for text in (
        "engine.max_num_batched_tokens",
        "Token states",
        "Left to others",
        "Next: raise engine.max_model_len",
        "Configuration hash",
        handmade_run().config_hash,
        "unverified",
    ):
        assert text in page, text
    assert page.count("<th scope=") > 60
    assert '<html lang="en">' in page


def test_a_name_cannot_break_out_of_the_page():
    page = _report(name="</script><script>alert(1)</script>", description="<b>bold & bad</b>")
    assert "<script>alert" not in page
    assert "<b>bold" not in page
    assert "&lt;b&gt;bold &amp; bad" in page


def test_the_page_is_the_same_bytes_for_the_same_run():
    assert _report() == _report()


def test_the_data_of_a_long_run_stays_small():
    log = Log()
    for step in range(50_000):
        tokens = step % 900
        pool = [tokens, 20, 20, 20, 20, 20, 920 - tokens, tokens]
        log.steps.append(step * 0.01, 0.01, 0.0, 1, 5, 0, 0, 99, 5, 5, 5, step % 7, 0, 0, *(pool * 2))
    for index in range(5000):
        log.requests.append(index / 10, index / 10, index / 10 + 0.1, index / 10 + 1, index, 9, 9, 9, 0, 0, 0)
    run = handmade_run(log)
    page = _without_plotly(report_html(run, summarise(run)))
    assert len(page) < 300_000


def test_a_run_without_requests_still_makes_a_page():
    run = handmade_run(Log())
    assert set(_figures(report_html(run, summarise(run)))) == {"memory"}


def test_the_comparison_overlays_both_runs_and_names_what_differs():
    page = _comparison()
    figures = _figures(page)
    assert {"cdf-ttft", "cdf-e2el", "load", "kv-bars"} <= set(figures)
    for name in ("cdf-ttft", "load"):
        assert [trace["name"] for trace in figures[name]["data"]] == ["A: by-hand", "B: other"]
    bars = figures["kv-bars"]["data"]
    assert all(len(trace["x"]) == 4 for trace in bars)  # two runs, whole and while requests wait
    assert sum(trace["y"][0] for trace in bars) == pytest.approx(100, rel=1e-4)
    for text in ("Settings that differ", ">seed<", "B to A"):
        assert text in page, text


CHATS = ["workload.num_requests=150", "engine.max_num_seqs=8"]


def test_the_report_says_where_the_time_goes():
    result = api.simulate("poisson-chat", overrides=CHATS, split_latencies=True)
    page = result.to_html()
    figures = _figures(page)
    assert set(figures) == {*ALL_FIGURES, "parts"}
    rows = dict.fromkeys(figures["parts"]["data"][0]["y"], 0.0)
    for part in figures["parts"]["data"]:
        for label, share in zip(part["y"], part["x"], strict=True):
            rows[label] += share
    assert list(rows) == ["E2E, tail", "E2E, typical", "TTFT, tail", "TTFT, typical"]
    assert all(total == pytest.approx(100, abs=0.5) for total in rows.values())
    of = result.attribution
    slow = of.e2e_s >= np.quantile(of.e2e_s, 0.99)
    told = re.search(r"<th scope=\"row\">Sum</th>(.*?)</tr>", page, re.DOTALL)[1]
    assert format_seconds(of.e2e_s[slow].mean()) in told
    assert "Waiting for a slot" in page


def test_a_run_without_notes_or_without_ends_says_nothing_of_parts():
    assert "Where the time goes</h2>" not in api.simulate("poisson-chat", overrides=CHATS).to_html()
    stopped = api.simulate("poisson-chat", overrides=CHATS, split_latencies=True, stop=lambda: True)
    assert "Where the time goes</h2>" not in stopped.to_html()


def test_taking_notes_changes_no_result():
    plain, noted = (
        api.simulate("poisson-chat", overrides=CHATS, split_latencies=split) for split in (False, True)
    )
    assert noted.to_json() == plain.to_json()


def test_notes_are_taken_beside_a_step_trace():
    lines = []
    overrides = [*CHATS, "workload.num_requests=20"]
    result = api.simulate("poisson-chat", overrides=overrides, split_latencies=True, step_trace=lines.append)
    of = result.attribution
    np.testing.assert_allclose(of.parts_s.sum(axis=1), of.e2e_s, rtol=1e-9)
    assert len(lines) > 100
