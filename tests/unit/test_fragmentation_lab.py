"""servesim fragmentation and comparisons with finished reports: what is run, told, refused and written."""

from __future__ import annotations

import json
import math
import re

import pytest
from typer.testing import CliRunner

from servesim import api
from servesim.analysis.finished import Finished, compare_finished, read_finished
from servesim.analysis.lab import BLOCK_SIZES, allocator_names, run_lab, variant
from servesim.analysis.slo_capacity import find_capacity
from servesim.cli import app
from servesim.errors import ConfigError, ServesimError
from servesim.report import fragmentation_charts
from servesim.report.finished import finished_text
from servesim.report.fragmentation import account_words

FEW = ["workload.trace.max_requests=120"]


@pytest.fixture(scope="module")
def report():
    return api.fragmentation("chat-1000", overrides=["workload.trace.max_requests=500"], block_sizes=[16, 64])


def invoke(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


# ---- what is run -----------------------------------------------------------------------------------


def test_all_allocators_serve_the_same_requests(report):
    lab = report.lab
    assert tuple(entry.account.name for entry in lab.entries) == allocator_names()
    asked = [
        sorted(
            zip(
                *(e.run.log.requests.columns[c] for c in ("index", "prompt_tokens", "output_tokens")),
                strict=True,
            )
        )
        for e in lab.entries
    ]
    assert all(each == asked[0] for each in asked)
    assert all(entry.account.identity.holds for entry in lab.entries)
    assert [one.name for one in lab.maps] == list(allocator_names())
    assert len({(one.begin_s, one.end_s) for one in lab.maps}) == 1


def test_paged_holds_most_and_oracle_wastes_nothing(report):
    by_name = {entry.account.name: entry.account for entry in report.lab.entries}
    assert by_name["paged"].pressed.of["tokens"].mean > by_name["contiguous-oracle"].pressed.of["tokens"].mean
    assert by_name["contiguous-oracle"].pressed.of["internal"].mean == 0
    assert by_name["contiguous-oracle"].waste.mean == 0
    assert (
        by_name["contiguous-max"].waste.over_reservation > by_name["contiguous-pow2"].waste.over_reservation
    )
    holes = {one.name: one.holes for one in report.lab.maps}
    assert holes["paged"] is None
    assert holes["contiguous-pow2"].external_index > holes["contiguous-max"].external_index


def test_the_sweep_follows_the_closed_form(report):
    small, large = report.lab.block_sizes
    for point in (small, large):
        assert point.empty_slots == pytest.approx(point.predicted_empty_slots, rel=0.1)
    assert (small.uniform_empty_slots, large.uniform_empty_slots) == (7.5, 31.5)
    assert small.lost < large.lost
    assert small.blocks_per_table == 4 * large.blocks_per_table


def test_settings_and_scenarios_go_with_an_allocator():
    lab = run_lab(
        "chat-1000",
        FEW,
        allocators=["paged+block_size=64", "chat-1000-contiguous"],
        block_sizes=(),
        maps=False,
        replications=2,
    )
    first, second = lab.entries
    assert first.run.scenario.engine.block_size == 64
    assert second.run.scenario.engine.allocator == "contiguous-max"
    assert first.account.seeds == (1, 2)
    assert first.account.pressed.interval == "2 replications"


def test_what_goes_with_the_other_kind_is_taken_back():
    _, overrides = variant("pagedattention-vllm", [], "contiguous-max")
    assert "engine.watermark=0" in overrides
    run_lab("chat-1000-contiguous", FEW, allocators=["paged"], block_sizes=(), maps=False)


def test_only_what_a_scenario_can_have_is_tried_when_nothing_is_named():
    overrides = ["workload.num_requests=60"]
    lab = run_lab("pagedattention-alpaca-beam-4", overrides, block_sizes=())
    [entry] = lab.entries
    assert entry.account.name == "paged"
    assert entry.account.predicted is None
    assert entry.account.sharing > 1.5
    assert lab.maps[0].bands
    assert [bar["y"] for bar in fragmentation_charts.batch(lab.entries)["data"]][1] == [None]
    assert "closed form" not in account_words(entry.account)


def test_what_a_scenario_cannot_have_is_left_out_and_said():
    """Batches that end together need contiguous memory; nothing is lost by asking for all there is."""
    told = []
    small = ["workload.num_requests=20"]
    report = api.fragmentation("continuous-batching-static", overrides=small, on_run=told.append)
    names = [entry.account.name for entry in report.lab.entries]
    assert names == ["contiguous-max", "contiguous-pow2", "contiguous-oracle"]
    assert report.lab.block_sizes == ()
    assert not any("block size" in what for what in told)
    assert set(report.lab.left_out) == {"paged", *(f"block size {size}" for size in BLOCK_SIZES)}
    assert json.loads(report.to_json())["left_out"] == report.lab.left_out
    assert "paged, block size 1, block size 8" in str(report)
    assert "static needs a contiguous allocator" in report.to_html()


def test_a_block_size_at_which_the_longest_request_does_not_fit_is_left_out():
    """257 blocks of 16: a request of 4,096 tokens and the null block; blocks of 1,024 leave three."""
    few = [*FEW, "engine.num_gpu_blocks_override=257"]
    lab = run_lab("chat-1000", few, allocators=["paged"], block_sizes=(16, 1024), maps=False)
    assert [point.block_size for point in lab.block_sizes] == [16]
    assert list(lab.left_out) == ["block size 1024"]
    assert lab.left_out["block size 1024"].startswith("engine.max_model_len: one request of this length")


def test_the_sweep_compares_pools_of_the_same_bytes():
    few = [*FEW, "engine.num_gpu_blocks_override=800"]
    lab = run_lab("chat-1000", few, allocators=["paged"], block_sizes=(1, 16, 128), maps=False)
    assert [point.num_blocks + 1 for point in lab.block_sizes] == [12_800, 800, 100]


@pytest.mark.parametrize("settings", [{"allocators": ["paged", "contiguous-max"]}, {"capacity": True}])
def test_what_stops_a_run_is_said_before_anything_is_simulated(settings):
    """With windows a request of 65,536 tokens fits in pages, not in one piece; and no SLO is set."""
    told = []
    long = ["model=gemma-3-27b", "engine.max_model_len=65536", "hardware.gpu=h100-sxm"]
    with pytest.raises(ServesimError, match=r"contiguous slots|needs limits"):
        run_lab("chat-1000", [*FEW, *long], on_run=told.append, **settings)
    assert told == []


def test_replications_draw_a_trace_again():
    few = ["workload.trace.max_requests=200", "workload.trace.rate_scale=6"]
    only = {"allocators": ["paged"], "block_sizes": (), "maps": False}
    [entry] = run_lab("azure-conv-h100", few, replications=2, **only).entries
    assert entry.account.whole.of["tokens"].half_width > 0
    [alone] = run_lab("azure-conv-h100", few, **only).entries
    assert alone.summary.ttft == api.simulate("azure-conv-h100", overrides=few).summary.ttft


def test_a_fleet_has_no_memory_map_and_that_is_said():
    few = [*FEW, "hardware.replicas=2"]
    lab = run_lab("chat-1000", few, allocators=["paged"], block_sizes=())
    assert lab.maps == ()
    assert "one engine" in lab.left_out["memory map"]


def test_a_run_that_takes_no_time_is_refused():
    still = [*FEW, "engine.step_time={law: linear, base_s: 0}"]
    with pytest.raises(ConfigError, match="takes no time"):
        run_lab("chat-1000", still, allocators=["paged"], block_sizes=(), maps=False)


@pytest.mark.parametrize("wrong", ["pagd", "paged+block_size", "", "+x=1"])
def test_a_wrong_allocator_is_refused(wrong):
    with pytest.raises(ConfigError):
        run_lab("chat-1000", FEW, allocators=[wrong], block_sizes=(), maps=False)


# ---- capacity --------------------------------------------------------------------------------------


def test_a_capacity_lies_between_a_rate_that_keeps_the_slo_and_one_that_does_not():
    base = ["workload.trace.max_requests=400", "slo.tpot_p99_s=0.02", "slo.ttft_p99_s=2"]
    found = find_capacity("azure-conv-h100", base)
    assert 0 < found.kept < found.missed <= found.kept * 1.05 + 1e-9 or found.trials == 10
    assert found.reason
    offered = api.simulate("azure-conv-h100", overrides=base).summary.offered_rate
    for rate, met in ((found.kept, True), (found.missed, False)):
        run = api.simulate(
            "azure-conv-h100", overrides=[*base, f"workload.trace.rate_scale={rate / offered!r}"]
        )
        assert all(check.met for check in run.summary.slo) is met


def test_what_breaks_first_is_told_beside_the_capacity():
    base = ["--set", "workload.trace.max_requests=300", "--allocators", "paged", "--block-sizes", "none"]
    told = invoke("fragmentation", "azure-conv-h100", *base, "--capacity", "--json")
    entry = json.loads(told.stdout)["allocators"]["paged"]
    shown = invoke("fragmentation", "azure-conv-h100", *base, "--capacity").stdout
    [line] = [line for line in shown.splitlines() if line.startswith("What breaks first")]
    assert line.split("first")[1].strip() == entry["capacity"]["reason"] != ""


def test_a_capacity_needs_limits_and_a_rate():
    with pytest.raises(ConfigError, match="needs limits"):
        find_capacity("std10k", FEW)
    with pytest.raises(ConfigError, match="without a rate"):
        find_capacity("chat-1000", [*FEW, "slo.ttft_p99_s=1"])


# ---- what is told ----------------------------------------------------------------------------------


def test_the_text_has_a_column_for_each(report):
    lines = str(report).splitlines()
    head = lines[1].split()
    assert head == list(allocator_names())
    simulated, predicted = [line for line in lines if line.startswith("Token states")]
    assert len(re.findall(r"±", simulated)) >= 3
    assert "±" not in predicted
    assert "Closed form" in str(report)
    assert str(report) == str(report)


def test_the_json_is_complete(report):
    told = json.loads(report.to_json())
    assert set(told["allocators"]) == set(allocator_names())
    for account in told["allocators"].values():
        assert account["identity"] == {
            "pool_slots": account["identity"]["pool_slots"],
            "instants": account["identity"]["instants"],
            "worst_slots": 0,
            "holds": True,
        }
        assert sum(share["mean"] for share in account["whole"]["classes"].values()) == pytest.approx(1)
    assert set(told["holes"]) == {"contiguous-max", "contiguous-pow2", "contiguous-oracle"}
    assert len(told["block_sizes"]) == 2


def test_the_page_is_small_and_says_everything(report):
    page = report.to_html()
    assert len(page.encode()) < 8_000_000
    for name in allocator_names():
        assert f"<h3>{name}</h3>" in page
    assert page.count('class="map-base"') == 4
    for section in ("Where the pool goes", "Memory map", "What it costs", "Over time", "Holes", "Block size"):
        assert f"<h2>{section}</h2>" in page


def test_the_command_writes_and_prints(tmp_path):
    options = ["--allocators", "paged,contiguous-max", "--block-sizes", "none", "--set", FEW[0]]
    done = invoke("fragmentation", "chat-1000", *options, "--out", tmp_path)
    assert done.exit_code == 0, done.output
    assert "KV-memory fragmentation" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"fragmentation.html", "fragmentation.json"}
    again = invoke("fragmentation", "chat-1000", *options, "--json")
    told = json.loads(again.stdout)
    assert told["memory_maps"] == {}
    assert told["allocators"] == json.loads((tmp_path / "fragmentation.json").read_text())["allocators"]


@pytest.mark.parametrize("sizes", ["0", "x", "8,-1"])
def test_wrong_block_sizes_are_refused(sizes):
    assert invoke("fragmentation", "chat-1000", "--block-sizes", sizes).exit_code == 2


# ---- finished reports ------------------------------------------------------------------------------


def test_finished_reports_and_scenarios_are_compared(tmp_path):
    for name in ("chat-1000", "chat-1000-contiguous"):
        assert invoke("run", name, "--set", FEW[0], "--out", tmp_path / name).exit_code == 0
    files = [tmp_path / name / "result.json" for name in ("chat-1000", "chat-1000-contiguous")]
    done = invoke("compare", *files, "--out", tmp_path / "c")
    assert done.exit_code == 0, done.output
    assert "A: chat-1000\nB: chat-1000-contiguous\n" in done.stdout
    mixed = invoke("compare", files[0], "chat-1000-contiguous", "--set", FEW[0], "--out", tmp_path / "d")
    assert mixed.stdout == done.stdout
    three = invoke("compare", *files, files[0], "--json")
    rows = {row["label"]: row["values"] for row in json.loads(three.stdout)["rows"]}
    lost = rows["Lost of the pool (%)"]
    assert lost[0] == lost[2] < lost[1]
    assert rows["Successful requests"] == [120, 120, 120]
    assert "Where the pool goes" in (tmp_path / "c/compare.html").read_text()


def test_two_scenarios_show_the_difference_in_fragmentation():
    comparison = api.compare("chat-1000", "chat-1000-contiguous", overrides=FEW)
    assert "Lost memory (GiB)" in str(comparison)
    assert "<h2>Fragmentation</h2>" in comparison.to_html()
    labels = {row["label"] for row in json.loads(comparison.to_json())["fragmentation"]}
    assert "Pool share: internal (%)" in labels


@pytest.mark.parametrize(
    ("text", "what"), [("[1", "is not JSON"), ("{}", "is not the result"), ("[]", "is not the result")]
)
def test_a_file_that_is_no_result_is_refused(tmp_path, text, what):
    path = tmp_path / "result.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=what):
        read_finished(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_finished(tmp_path / "none.json")


def test_an_older_result_lacks_figures_but_compares():
    old = Finished("old", {"completed": 5, "kv_cache": {"mean_share": {"tokens": 0.5}}})
    rows = {row.label: row.values for row in compare_finished([old, old])}
    assert rows["Successful requests"] == (5, 5)
    assert "Mean TTFT (ms)" not in rows
    assert math.isnan(old.figure("fragmentation.cost.lost_bytes"))
    assert "Successful requests" in finished_text([old, old])
