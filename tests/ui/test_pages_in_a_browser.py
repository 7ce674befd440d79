"""The HTML pages in headless Chromium: everything is drawn, nothing fails, nothing is asked from the network.

Chromium writes its console and a log of all its network events; every host name is mapped to nowhere.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from handmade import handmade_run
from servesim import api, studies
from servesim.analysis.metrics import summarise
from servesim.report.html import comparison_html, report_html

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on the PATH"),
]

_SWITCHES = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-extensions",
    "--disable-sync",
    "--no-first-run",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--enable-logging=stderr",
    "--virtual-time-budget=10000",
    "--window-size=1280,1000",
    "--dump-dom",
)


class Visit(NamedTuple):
    """What a browser saw."""

    dom: str
    console: list[str]
    requested: set[str]


def visit(page: str, folder: Path) -> Visit:
    """Open a page from disk and wait until its scripts are done."""
    path, net_log = folder / "page.html", folder / "net.json"
    path.write_text(page, encoding="utf-8")
    done = subprocess.run(
        [
            CHROMIUM,
            *_SWITCHES,
            f"--user-data-dir={folder / 'profile'}",
            f"--log-net-log={net_log}",
            path.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    return Visit(done.stdout, console, _requested(net_log))


def _requested(net_log: Path) -> set[str]:
    """URLs that a page asked for. Chromium's own errands, if any, are logged as initiated by no origin."""
    none = "not an origin"
    parameters = [event.get("params") for event in json.loads(net_log.read_text())["events"]]
    asked = [each for each in parameters if isinstance(each, dict) and each.get("initiator", none) != none]
    urls = {each["url"] for each in asked if "url" in each}
    return {url for url in urls if not url.startswith(("data:", "file:"))}


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    a, b = handmade_run(), handmade_run(name="other", seed=8)
    return {
        "report": report_html(a, summarise(a)),
        "compare": comparison_html((a, summarise(a)), (b, summarise(b))),
    }


@pytest.mark.parametrize("name", ["report", "compare"])
def test_a_page_draws_all_its_figures_in_silence(name, pages, tmp_path):
    seen = visit(pages[name], tmp_path)
    places = re.findall(r'<div class="chart[^"]*" id="([^"]+)"', seen.dom)
    assert len(places) >= 6
    assert f'data-drawn="{len(places)}"' in seen.dom
    assert seen.dom.count('class="main-svg"') >= len(places)
    assert seen.console == []
    assert seen.requested == set()


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("studies") / "chat.yaml"
    path.write_text(
        "name: <b>chat</b>\nmodel: llama-3.1-8b\nhardware: {gpu: h100-sxm}\nengine: {max_model_len: 2048}\n"
        "workload:\n  num_requests: 30\n  arrivals: {process: poisson, rate_per_s: 20}\n"
        "  prompt_tokens: {law: fixed, tokens: 200}\n  output_tokens: {law: geometric, mean_tokens: 20}\n"
        "slo: {ttft_p99_s: 0.1}\n"
    )
    return path


GRID = ("engine.max_num_seqs=1,2,4", "model=llama-3.1-8b,llama-3.1-70b,qwen3-8b")
LATIN = ("engine.max_num_seqs=1:9", "workload.arrivals.rate_per_s=1.0:9.0")


@pytest.mark.parametrize(("vary", "latin", "charts"), [(GRID, None, 2), (GRID[:1], None, 1), (LATIN, 6, 1)])
def test_a_sweeps_page_draws_what_its_sliders_say(chat, tmp_path, vary, latin, charts):
    found = studies.sweep(chat, vary, latin=latin, out=tmp_path / "s", replications=2, jobs=1)
    seen = visit(found.to_html(), tmp_path)
    assert seen.console == []
    assert seen.requested == set()
    assert seen.dom.count('class="main-svg"') >= charts
    assert f'data-drawn="{charts}"' in seen.dom
    assert seen.dom.count('type="range"') == (1 if latin else len(vary))
    assert "Output token throughput (tok/s)" in seen.dom
    assert "<b>chat" not in seen.dom
    tiles = seen.dom[seen.dom.index('id="chosen"') :]
    assert "Mean TTFT (ms)" in tiles[: tiles.index("</section>")]


def test_moving_a_slider_shows_another_point(chat, tmp_path):
    found = studies.sweep(chat, GRID, out=tmp_path / "s", jobs=1)
    move = (
        "<script>addEventListener('load', () => { const s = document.querySelectorAll('input[type=range]');"
        "s[0].value = 2; s[0].dispatchEvent(new Event('input'));"
        "s[1].value = 1; s[1].dispatchEvent(new Event('input')); });</script></body>"
    )
    seen = visit(found.to_html().replace("</body>", move), tmp_path)
    assert seen.console == []
    assert "max_num_seqs 4, model llama-3.1-70b</h2>" in seen.dom
    assert "does not fit" in seen.dom[seen.dom.index('id="chosen-about"') :]


def test_pages_of_replications_draw_warm_up_and_differences(chat, tmp_path):
    (tmp_path / "other.yaml").write_text(f"extends: {chat}\nname: other\nengine: {{max_num_seqs: 3}}\n")
    one = studies.replicate(chat, 2, jobs=1)
    two = studies.replicate_compared(chat, tmp_path / "other.yaml", 2, jobs=1)
    for page, charts in ((one.to_html(), 2), (two.to_html(), 3)):
        seen = visit(page, tmp_path)
        assert f'data-drawn="{charts}"' in seen.dom
        assert seen.console == []
        assert seen.requested == set()
        assert "Mean TTFT (ms)" in seen.dom


def test_a_sensitivity_page_draws_its_tornadoes(chat, tmp_path):
    found = studies.sensitivity(chat, 2, jobs=1)
    seen = visit(found.to_html(), tmp_path)
    places = re.findall(r'<div class="chart[^"]*" id="([^"]+)"', seen.dom)
    assert places == ["mean_ttft_ms", "mean_tpot_ms", "output_throughput"]  # P99 needs 1,000 requests
    assert f'data-drawn="{len(places)}"' in seen.dom
    assert seen.console == []
    assert seen.requested == set()


def test_the_report_of_a_run_draws_where_the_time_goes(chat, tmp_path):
    seen = visit(api.simulate(chat, split_latencies=True).to_html(), tmp_path)
    places = re.findall(r'<div class="chart[^"]*" id="([^"]+)"', seen.dom)
    assert "parts" in places
    assert f'data-drawn="{len(places)}"' in seen.dom
    assert seen.console == []


def test_an_explanation_draws_its_bars(chat, tmp_path):
    found = studies.explain(chat, jobs=1)
    seen = visit(found.to_html(), tmp_path)
    assert re.findall(r'<div class="chart[^"]*" id="([^"]+)"', seen.dom) == ["parts"]
    assert 'data-drawn="1"' in seen.dom
    assert "Cause: " in seen.dom
    assert seen.console == []
    assert seen.requested == set()


@pytest.fixture(scope="module")
def lab_page() -> str:
    overrides = [
        "workload.num_requests=150",
        "engine.num_gpu_blocks_override=700",
        "engine.max_model_len=4000",
    ]
    allocators = ["paged", "contiguous-max", "contiguous-pow2", "contiguous-oracle"]
    return api.fragmentation(
        "poisson-chat", overrides=overrides, allocators=allocators, block_sizes=[16, 64]
    ).to_html()


def test_the_fragmentation_page_draws_its_figures_and_memory_maps_in_silence(lab_page, tmp_path):
    assert len(lab_page.encode()) < 8_000_000
    seen = visit(lab_page, tmp_path)
    places = re.findall(r'<div class="chart[^"]*" id="([^"]+)"', seen.dom)
    assert {"bars", "batch", "waste", "holes", "block-sizes"} <= set(places)
    assert f'data-drawn="{len(places)}"' in seen.dom
    assert 'data-maps="4"' in seen.dom
    painted = [int(bands) for bands in re.findall(r'data-painted="(\d+)"', seen.dom)]
    assert len(painted) == 4
    assert min(painted) > 4
    told = re.findall(r"<output[^>]*>([^<]*)</output>", seen.dom)
    assert len(told) == 4
    assert all(re.search(r"\d+ requests · written [\d.]+ %", text) for text in told)
    assert any("shared" in text or "cached" in text for text in told)
    assert seen.console == []
    assert seen.requested == set()


def test_the_slider_moves_every_map_to_its_instant(lab_page, tmp_path):
    """The instant is told again for all maps, and what they hold then adds up to the pool."""
    move = """<script>
      const slider = document.querySelector(".map-tools input");
      slider.value = "1000"; slider.dispatchEvent(new Event("input"));
      const over = document.querySelectorAll(".map-over")[1], box = over.getBoundingClientRect();
      over.dispatchEvent(new PointerEvent("pointermove",
        { clientX: box.left + box.width / 2, clientY: box.top + box.height - 40, bubbles: true }));
    </script></body>"""
    before = visit(lab_page, tmp_path)
    after = visit(lab_page.replace("</body>", move), tmp_path)
    texts = [re.findall(r"<output[^>]*>([^<]*)</output>", seen.dom) for seen in (before, after)]
    assert all(old != new for old, new in zip(*texts, strict=True))
    assert "fills" in texts[1][1], "the request under the pointer"
    assert "fills" not in texts[1][0]
    for text in texts[1]:
        parts = re.findall(r"(written|will be filled|never filled|cached|free) (-?[\d.]+) %", text)
        assert sum(float(share) for _, share in parts) == pytest.approx(100, abs=0.3)
        assert all(float(share) >= 0 for _, share in parts)
    assert after.console == []


def test_finished_results_and_cache_sizes_are_drawn(tmp_path):
    few = ["workload.num_requests=60"]
    result = api.simulate("poisson-chat", overrides=few).finished()
    pages = [
        api.FinishedComparison((result, result, result)).to_html(),
        api.prefix_cache("poisson-chat", overrides=few).files()["prefix-cache.html"],
    ]
    for page in pages:
        seen = visit(page, tmp_path)
        assert 'data-drawn="1"' in seen.dom
        assert seen.console == []
        assert seen.requested == set()


@pytest.fixture(scope="module")
def plan_page() -> str:
    small = ("workload.num_requests=3000", "workload.sessions=null", "workload.shared_prefixes=null")
    asked = ["hardware.gpu=h100-sxm,a100-80gb-sxm,l40s"]
    return studies.plan("poisson-chat", 30, asked, overrides=small, jobs=1).to_html()


def test_the_page_of_a_plan_draws_prices_against_latencies(plan_page, tmp_path):
    seen = visit(plan_page, tmp_path)
    assert 'data-drawn="1"' in seen.dom
    assert "Breaks first" in seen.dom
    assert seen.console == []
    assert seen.requested == set()


def on_a_phone(page: str, folder: Path) -> dict[str, list[float]]:
    """Width of the page, and heights of its plots without axes and legend, in a frame of 420 pixels."""
    tell = (
        "<script>addEventListener('load', () => parent.postMessage(JSON.stringify({"
        "width: [document.documentElement.scrollWidth],"
        "heights: [...document.querySelectorAll('.chart')].map((one) => one._fullLayout._size.h)"
        "}), '*'))</script>"
    )
    (folder / "inner.html").write_text(page.replace("</body>", f"{tell}</body>"), encoding="utf-8")
    frame = (
        "<body><script>addEventListener('message', (told) => document.body.append(told.data))</script>"
        '<iframe src="inner.html" style="width: 420px; height: 900px; border: 0"></iframe></body>'
    )
    told: dict[str, list[float]] = json.loads(re.findall(r'{"width".*}', visit(frame, folder).dom)[0])
    return told


def test_pages_fit_on_a_phone(pages, plan_page, lab_page, tmp_path):
    """Nothing but tables is wider than the screen, and legends leave the plots room."""
    for page in (*pages.values(), plan_page, lab_page):
        told = on_a_phone(page, tmp_path)
        assert told["width"][0] <= 420
        least, *others = sorted(told["heights"])  # the least is a single bar
        assert least >= 90
        assert all(height >= 150 for height in others)


def test_a_page_that_fails_and_asks_would_be_caught(pages, tmp_path):
    """The two checks above see what they look for."""
    policy = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')
    bad = "<script>fetch('http://example.invalid/x').catch(() => console.error('asked'))</script></body>"
    seen = visit(policy.sub("", pages["report"]).replace("</body>", bad), tmp_path)
    assert any("asked" in line for line in seen.console)
    assert "http://example.invalid/x" in seen.requested


def test_the_page_forbids_what_it_does_not_need(pages, tmp_path):
    """With the page's own policy such a request is not even begun."""
    bad = "<script>fetch('http://example.invalid/x').catch(() => 0)</script></body>"
    seen = visit(pages["report"].replace("</body>", bad), tmp_path)
    assert any("Content Security Policy" in line for line in seen.console)
    assert seen.requested == set()
