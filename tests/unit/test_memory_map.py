"""The recorder and the memory map: who holds what agrees with the manager and the log, at every instant."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from servesim import api
from servesim.analysis.memory_map import TICKS, busiest_stretch, map_memory, memory_map
from servesim.analysis.simulation import prepare, run_prepared
from servesim.analysis.timeline import timeline
from servesim.config.load import load_scenario
from servesim.engine.kv_recorder import KvRecorder
from servesim.report.fragmentation_page import map_data

CHAT = ["workload.num_requests=150", "engine.num_gpu_blocks_override=700", "engine.max_model_len=8192"]
CASES = {
    "paged": ("poisson-chat", CHAT),
    "max": ("chat-1000-contiguous", ["workload.trace.max_requests=100"]),
    "buddy": (
        "chat-1000-contiguous",
        [
            "workload.trace.max_requests=150",
            "engine.allocator=contiguous-oracle",
            "engine.contiguous_fit=buddy",
        ],
    ),
    "windows": ("poisson-chat", ["model=gpt-oss-20b", "workload.num_requests=60"]),
}


def recorded(name: str):
    source, overrides = CASES[name]
    recorders = []
    prepared = prepare(load_scenario(source, overrides))
    run = run_prepared(prepared, observe=lambda scheduler: recorders.append(KvRecorder(scheduler)))
    return run, recorders[0]


@pytest.fixture(scope="module", params=["paged", "max", "buddy", "windows"])
def case(request):
    return recorded(request.param)


def whole(run, recorder):
    return memory_map(run, recorder, "all", 0.0, run.log.end_s)


@pytest.mark.parametrize("name", ["paged", "max", "windows"])
def test_recording_changes_nothing(name):
    run, _ = recorded(name)
    plain = run_prepared(prepare(load_scenario(*CASES[name])))
    for column, values in plain.log.requests.columns.items():
        assert np.allclose(values, run.log.requests.columns[column], equal_nan=True), column


def test_everything_is_given_back_once(case):
    _, recorder = case
    assert recorder.holdings
    assert all(holding.end is not None for holding in recorder.holdings)
    held = Counter((h.address, h.begin, h.request) for h in recorder.holdings)
    assert max(held.values()) == 1
    assert {h.request for h in recorder.holdings} == {stay.request for stay in recorder.stays if stay.written}


@pytest.mark.parametrize("name", ["max", "buddy"])
def test_reservations_never_overlap(name):
    drawn = whole(*recorded(name))
    assert not drawn.shared
    live = sorted((band.address, band) for band in drawn.bands)
    for tick in range(50, TICKS, 100):
        end = 0
        for _, band in live:
            if band.begin <= tick < band.end:
                assert band.address >= end
                end = band.address + band.slots
        assert end <= drawn.pool_slots


@pytest.mark.parametrize("name", ["paged", "max", "buddy"])
def test_the_bands_add_up_to_the_log(name):
    """Physical slots held in the middle of a step are those of the log's classes."""
    run, recorder = recorded(name)
    line = timeline(run.log.steps, 0.0)
    live = sum(line.kv(part)[0] for part in ("tokens", "reserved", "internal", "round_up"))
    checked = 0
    for begin in range(0, len(line) - 40, len(line) // 7):
        begin_s, end_s = float(line.start_s[begin]), float(line.start_s[begin + 40])
        drawn = memory_map(run, recorder, "part", begin_s, end_s)
        for row in range(begin, begin + 40):
            middle_s = line.start_s[row] + line.duration_s[row] / 2
            tick = int((middle_s - begin_s) / (end_s - begin_s) * TICKS)
            held = sum(b.slots for b in drawn.bands if b.request >= 0 and b.begin <= tick < b.end)
            held -= sum((b.offset - 1) * b.slots for b in drawn.shared if b.begin <= tick < b.end)
            if line.columns["steps"][row]:
                assert held == live[row], (row, tick)
                checked += 1
    assert checked > 100


def test_shared_prefixes_are_drawn_as_shared():
    run, recorder = recorded("paged")
    drawn = whole(run, recorder)
    assert run.log.counters["prefix_cache_hits"] > 0
    assert drawn.shared
    assert all(band.offset >= 2 for band in drawn.shared)
    assert any(band.request < 0 for band in drawn.bands), "cached prefixes"
    for cached in [band for band in drawn.bands if band.request < 0][:200]:
        for band in drawn.bands:
            if band.request >= 0 and band.address < cached.address + cached.slots:
                apart = band.address + band.slots <= cached.address
                assert apart or band.end <= cached.begin or band.begin >= cached.end


def test_written_tokens_end_where_the_request_ends():
    run, recorder = recorded("max")
    column = run.log.requests.columns
    final = dict(
        zip(column["index"], np.array(column["prompt_tokens"]) + column["generated_tokens"] - 1, strict=True)
    )
    for stay in recorder.stays:
        assert stay.written[-1][1] == stay.final_slots == final[stay.request]
        assert [tokens for _, tokens in stay.written] == sorted(tokens for _, tokens in stay.written)
        assert len(stay.written) <= 4  # prefill at once, then a straight line


def test_windows_give_blocks_back_on_the_way():
    _, recorder = recorded("windows")
    ends = {holding.request: [] for holding in recorder.holdings}
    for holding in recorder.holdings:
        ends[holding.request].append(holding.end)
    assert any(len(set(moments)) > 1 for moments in ends.values())


def test_every_group_of_layers_begins_with_the_first_token():
    run, recorder = recorded("windows")
    longest = {stay.request: stay.final_slots for stay in recorder.stays}
    firsts = Counter(h.request for h in recorder.holdings if h.offset == 0)
    assert max(firsts.values()) == len(run.memory.kv_layout.group_windows) == 2
    assert all(h.offset < longest[h.request] for h in recorder.holdings)


def test_holes_of_equal_reservations():
    run, recorder = recorded("max")
    holes = whole(run, recorder).holes
    assert holes.mean_count >= 1
    assert 0 <= holes.external_index < 1
    assert holes.mean_largest <= holes.mean_free <= run.memory.contiguous_tokens
    assert whole(*recorded("paged")).holes is None


def test_the_busiest_stretch_lies_where_the_pool_is_full():
    run = api.simulate("poisson-chat", overrides=CHAT).run
    begin_s, end_s = busiest_stretch([run])
    line = timeline(run.log.steps, 0.0)
    live = sum(line.kv(part)[0] for part in ("tokens", "reserved", "internal"))
    inside = line.bin_means(np.array([begin_s, end_s]), live, live)[0]
    assert 0 <= begin_s < end_s <= run.log.end_s
    assert inside > line.mean(live, live)


def test_a_map_of_a_stretch_stops_there():
    source, overrides = CASES["paged"]
    drawn = map_memory(prepare(load_scenario(source, overrides)), "paged", 5.0, 12.0)
    assert (drawn.begin_s, drawn.end_s) == (5.0, 12.0)
    assert all(0 <= band.begin < band.end <= TICKS for band in drawn.bands)
    assert len({band.request for band in drawn.bands}) > 5
    data = map_data(drawn)
    assert len(data["bands"]) == 6 * len(drawn.bands)
    assert data["pool"] == drawn.pool_slots == 699 * 16
    assert max(data["bands"][1::6]) < 699


def test_too_many_bands_leave_a_part_of_the_pool(monkeypatch):
    run, recorder = recorded("paged")
    everything = whole(run, recorder)
    monkeypatch.setattr("servesim.analysis.memory_map._MOST_BANDS", len(everything.bands) // 3)
    part = whole(run, recorder)
    low, high = part.drawn
    assert 0.5 < len(part.bands) / (len(everything.bands) // 3) < 1.1
    assert all(low <= band.address < high for band in part.bands)
    assert set(part.bands) <= set(everything.bands)
