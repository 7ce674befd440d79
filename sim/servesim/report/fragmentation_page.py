"""The page of the fragmentation lab: pictures, tables, and the memory maps as data for their script."""

from __future__ import annotations

from typing import Any

from servesim.analysis.lab import Entry, Lab
from servesim.analysis.memory_map import TICKS, MemoryMap
from servesim.analysis.series import time_series
from servesim.report import charts, fragmentation, fragmentation_charts, sections
from servesim.report.html import embedded, figure_page
from servesim.units import GIB, format_count

__all__ = ["lab_html", "map_data"]

_MOST_CARDS = 8


def lab_html(lab: Lab) -> str:
    """The report of the lab as one offline page."""
    entries, accounts = lab.entries, [entry.account for entry in lab.entries]
    first = entries[0]
    figures = {
        "bars": fragmentation_charts.bars(accounts),
        "batch": fragmentation_charts.batch(entries),
        "waste": fragmentation_charts.waste_scatter(accounts),
        "waste-shares": fragmentation_charts.waste_histogram(accounts),
    }
    series = []
    for i, entry in enumerate(entries):
        over_time = time_series(entry.run)
        if over_time.bin_s:
            place = f"pool-{i}"
            pool_bytes = entry.summary.memory.kv_cache_bytes
            figures[place] = charts.kv_over_time(over_time, entry.summary.kv, pool_bytes)
            series.append((entry.account.name, place))
    holes = {one.name: one.holes for one in lab.maps if one.holes}
    if holes:
        figures["holes"] = fragmentation_charts.holes(holes, [account.name for account in accounts])
    if lab.block_sizes:
        figures["block-sizes"] = fragmentation_charts.block_sizes(lab.block_sizes)
    return figure_page(
        "fragmentation.html.j2",
        figures,
        title=lab.scenario.name,
        subtitle=_subtitle(first),
        description=lab.scenario.description,
        warnings=first.summary.warnings,
        warned=first.account.name,
        cards=tuple(_card(entry) for entry in entries[:_MOST_CARDS]),
        period=fragmentation.period(accounts),
        interval=accounts[0].pressed.interval,
        shares_blocks=any(account.sharing > 1.005 for account in accounts),
        shares=fragmentation.share_table(accounts, whole=False),
        whole=fragmentation.share_table(accounts, whole=True),
        consequences=fragmentation.consequences(entries),
        series=series,
        hole_table=fragmentation.hole_table(lab.maps),
        block_table=fragmentation.block_table(lab.block_sizes),
        checks=fragmentation.checks(lab),
        configuration=sections.configuration(first.run),
        maps=lab.maps,
        ticks=TICKS,
        map_data=embedded([map_data(one) for one in lab.maps]),
    )


def map_data(one: MemoryMap) -> dict[str, Any]:
    """A memory map for its script: addresses in blocks where there are blocks, lists of numbers laid flat."""
    unit = one.block_size or 1
    return {
        "name": one.name,
        "begin_s": round(one.begin_s, 4),
        "end_s": round(one.end_s, 4),
        "ticks": TICKS,
        "pool": one.pool_slots,
        "unit": unit,
        "drawn": list(one.drawn),
        "view": list(one.close_up),
        "requests": [
            [
                request.index,
                request.prompt_tokens,
                request.final_slots,
                [number for point in request.written for number in point],
                list(request.preempted),
            ]
            for request in one.requests
        ],
        "bands": [
            number
            for band in one.bands
            for number in (
                band.request,
                band.address // unit,
                band.slots // unit,
                band.offset // unit,
                band.begin,
                band.end,
            )
        ],
        "shared": [
            number
            for band in one.shared
            for number in (band.address // unit, band.slots // unit, band.offset, band.begin, band.end)
        ],
    }


def _subtitle(entry: Entry) -> str:
    run, summary = entry.run, entry.summary
    pool = summary.memory.kv_cache_bytes / GIB
    return (
        f"{run.model.label} on {summary.num_gpus} × {run.gpu.label}, KV pool {pool:.1f} GiB per GPU: "
        f"{format_count(summary.num_prompts)} requests"
    )


def _card(entry: Entry) -> sections.Card:
    account = entry.account
    return sections.Card(
        account.name,
        f"{account.pressed.of['tokens'].mean * 100:.1f}",
        "% hold tokens",
        f"{account.pressed.lost * 100:.1f} % lost; {account.pressed_running:.1f} requests at a time, "
        f"{account.request_throughput:.2f} req/s",
    )
