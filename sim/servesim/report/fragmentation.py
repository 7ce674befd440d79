"""The fragmentation lab's result as text, as JSON and as the tables of its page."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from textwrap import wrap
from typing import Any

from servesim.analysis.fragmentation import Fragmentation
from servesim.analysis.lab import BlockSize, Entry, Lab
from servesim.analysis.memory_map import MemoryMap
from servesim.analysis.shares import FRAGMENT_CLASSES, Shares
from servesim.analysis.slo_capacity import Capacity
from servesim.report.as_json import plain
from servesim.report.sections import Table
from servesim.report.words import FRAGMENT_LABELS
from servesim.units import GIB

__all__ = [
    "account_json",
    "account_table",
    "account_words",
    "block_table",
    "checks",
    "consequences",
    "hole_table",
    "lab_json",
    "lab_text",
    "left_out",
    "period",
    "share_table",
]

_LABEL, _COLUMN = 34, 15
_DENIED = {
    "admission_failures_seats": "Waited for a seat",
    "admission_failures_memory": "Waited for memory",
    "admission_failures_fit": "Waited for a hole that fits",
    "admission_failures_watermark": "Waited for the watermark",
}


def lab_text(lab: Lab) -> str:
    """One table: a column for each allocator, then the block sizes."""
    accounts = [entry.account for entry in lab.entries]
    column = max(_COLUMN, *(len(account.name) + 2 for account in accounts))
    width = _LABEL + column * len(accounts)

    def row(label: str, cells: Sequence[str]) -> str:
        return f"{label:<{_LABEL}}" + "".join(f"{cell:>{column}}" for cell in cells)

    lines = [f"{' KV-memory fragmentation ':=^{width}}", row("", [account.name for account in accounts])]
    lines.append(f"{f' {period(accounts)} (% of the pool) ':-^{width}}")
    lines += [
        row(FRAGMENT_LABELS[name], [_share(account.pressed, name) for account in accounts])
        for name in _present(accounts)
    ]
    lines.append(row("Lost in all", [f"{account.pressed.lost * 100:.1f}" for account in accounts]))
    shared = any(account.sharing > 1.005 for account in accounts)
    what = "Closed form, as if nothing were shared" if shared else "Closed form, from the lengths alone"
    if any(account.predicted for account in accounts):
        lines.append(f"{f' {what} ':-^{width}}")
    for name in ("tokens", "reserved", "internal", "round_up", "holes"):
        values = [(account.predicted_shares() or {}).get(name, math.nan) for account in accounts]
        if any(value > 0 for value in values):
            label = FRAGMENT_LABELS.get(name, name)
            lines.append(row(label, [_number(value * 100, 1) for value in values]))
    lines.append(f"{' What it costs ':-^{width}}")
    for label, of in _figures(lab.entries):
        lines.append(row(label, [of(entry) for entry in lab.entries]))
    if lab.block_sizes:
        lines.append(f"{' Block size (paged) ':-^{width}}")
        table = block_table(lab.block_sizes)
        widths = [max(len(cells[i]) for cells in (table.head, *table.rows)) for i in range(len(table.head))]
        lines += [
            "  ".join(cell.rjust(w) for cell, w in zip(cells, widths, strict=True))
            for cells in (table.head, *table.rows)
        ]
    if lab.left_out:
        lines.append(f"{' Left out ':-^{width}}")
        lines += [line for what, why in left_out(lab) for line in wrap(f"{what}: {why}", width)]
    lines.append("=" * width)
    return "\n".join(line.rstrip() for line in lines) + "\n"


def lab_json(lab: Lab) -> str:
    """Everything but the pictures."""
    value = {
        "servesim": version("servesim"),
        "allocators": {entry.account.name: _entry_json(entry) for entry in lab.entries},
        "holes": {one.name: asdict(one.holes) for one in lab.maps if one.holes},
        "memory_maps": {one.name: {"begin_s": one.begin_s, "end_s": one.end_s} for one in lab.maps},
        "block_sizes": [asdict(point) for point in lab.block_sizes],
        "left_out": lab.left_out,
    }
    return json.dumps(plain(value), indent=2, allow_nan=False) + "\n"


def account_json(account: Fragmentation) -> dict[str, Any]:
    """The account of one run."""
    predicted = account.predicted
    return {
        "allocator": account.allocator,
        "block_size": account.block_size,
        "seeds": list(account.seeds),
        "identity": asdict(account.identity) | {"holds": account.identity.holds},
        "whole": _shares_json(account.whole),
        "in_queue": _shares_json(account.in_queue) if account.in_queue else None,
        "pressed": {"period": period([account]), **_shares_json(account.pressed)},
        "closed_form": asdict(predicted) | {"shares": account.predicted_shares()} if predicted else None,
        "running": account.running,
        "running_in_queue": account.running_in_queue,
        "sharing_factor": account.sharing,
        "waste_per_request": {
            "mean_slots": account.waste.mean,
            "over_reservation": account.waste.over_reservation,
            "edges": list(account.waste.edges),
            "counts": list(account.waste.counts),
        },
        "cost": asdict(account.cost),
        "counters": {
            "preemptions": account.preemptions,
            "evicted_blocks": account.evicted_blocks,
            "refused": account.refused,
            "failed_fit_rate": account.failed_fit_rate,
            **account.failures,
        },
        "request_throughput": account.request_throughput,
        "output_throughput": account.output_throughput,
    }


def period(accounts: Sequence[Fragmentation]) -> str:
    """What the shares are means over, in words."""
    queued = [account.has_queue for account in accounts]
    if all(queued):
        return "While requests wait"
    return "While requests wait, or the whole run of those that have no queue" if any(queued) else "Whole run"


def share_table(accounts: Sequence[Fragmentation], *, whole: bool) -> Table:
    """The classes of every allocator, means with their intervals, in percent."""
    rows = []
    classes = _present(accounts)
    for name in classes:
        shares = [account.whole if whole else account.pressed for account in accounts]
        cells = [_quantiles(each, name) if whole else _share(each, name) for each in shares]
        rows.append((FRAGMENT_LABELS[name], *cells))
    caption = (
        "Whole run: mean (5th and 95th percentile over time, peak), in % of the pool"
        if whole
        else f"{period(accounts)}: mean and 95 % interval (none if the run is too short), in % of the pool"
    )
    head = ("Class", *(account.name for account in accounts))
    return Table(caption, head, tuple(rows), swatches=tuple(classes))


def account_table(account: Fragmentation) -> Table:
    """One run: every class as simulated and by closed form, and how it varied over time."""
    predicted = account.predicted_shares() or {}
    classes = _present([account])
    rows = []
    for name in classes:
        share = account.pressed.of[name]
        expected = f"{predicted[name] * 100:.1f}" if name in predicted else ""
        low, high, peak = (f"{value * 100:.1f}" for value in (share.p5, share.p95, share.peak))
        rows.append((FRAGMENT_LABELS[name], _share(account.pressed, name), expected, low, high, peak))
    head = ("Class", "Mean ±95 %", "Closed form", "5th pct.", "95th pct.", "Peak")
    caption = f"{period([account])}, in % of the pool"
    return Table(caption, head, tuple(rows), swatches=tuple(classes))


def account_words(account: Fragmentation) -> str:
    """What a run lost, in a sentence or two."""
    cost, fits = account.cost, ""
    if account.predicted:
        fits = f"; by closed form {_number(account.predicted.requests_that_fit, 1)} would fill the pool"
    money = "" if cost.lost_usd_per_hour is None else f", ${cost.lost_usd_per_hour:.2f} an hour"
    lost = f"{account.pressed.lost * 100:.1f} % of the pool ({cost.lost_bytes / GIB:.2f} GiB{money})"
    return (
        f"{period([account])}, {lost} holds nothing that is needed and cannot be given to the next request. "
        f"{account.pressed_running:.1f} requests run at a time{fits}. A request is given "
        f"{account.waste.mean:,.1f} slots that it never fills."
    )


def consequences(entries: Sequence[Entry]) -> Table:
    """Batch, throughput, latency, capacity and money of every allocator."""
    rows = tuple((label, *(of(entry) for entry in entries)) for label, of in _figures(entries))
    return Table("What the loss means", ("Figure", *(entry.account.name for entry in entries)), rows)


def hole_table(maps: Sequence[MemoryMap]) -> Table:
    """Holes of the contiguous allocators."""
    rows = tuple(
        (
            one.name,
            f"{one.holes.mean_count:.1f}",
            f"{one.holes.mean_free:,.0f}",
            f"{one.holes.mean_largest:,.0f}",
            f"{one.holes.external_index:.3f}",
        )
        for one in maps
        if one.holes
    )
    head = ("Allocator", "Holes", "Free slots", "Largest hole", "External index")
    return Table("Holes between allocations, averaged over time", head, rows)


def block_table(points: Sequence[BlockSize]) -> Table:
    """The block-size sweep."""
    rows = tuple(
        (
            str(point.block_size),
            f"{point.num_blocks:,}",
            f"{point.blocks_per_table:,}",
            _number(point.empty_slots, 1),
            _number(point.predicted_empty_slots, 1),
            f"{point.lost * 100:.2f}",
            _number(point.running, 1),
            f"{point.request_throughput:.2f}",
            _number(point.hit_rate * 100, 1),
            f"{point.preemptions:,}",
        )
        for point in points
    )
    head = (
        "B", "Blocks", "Table", "Empty/req", "Closed form", "Lost %", "Batch", "req/s", "Hits %", "Preempt.",
    )  # fmt: skip
    return Table("Block sizes of the paged allocator", head, rows)


def left_out(lab: Lab) -> Iterator[tuple[str, str]]:
    """What the scenario cannot have, those with one reason together, and the reason."""
    for why in dict.fromkeys(lab.left_out.values()):
        yield ", ".join(name for name, reason in lab.left_out.items() if reason == why), why


def checks(lab: Lab) -> Table:
    """The identity of the classes, what is not here, and what it takes to get the same numbers again."""
    accounts = [entry.account for entry in lab.entries]
    rows = [
        (
            account.name,
            f"classes add up to the pool of {account.identity.pool_slots:,} slots at all "
            f"{account.identity.instants:,} instants; seeds {', '.join(map(str, account.seeds))}",
        )
        for account in accounts
    ]
    rows += [("left out", f"{what}: {why}") for what, why in left_out(lab)]
    return Table("Check", ("Allocator", "Identity"), (*rows, ("servesim", version("servesim"))), "words")


def _entry_json(entry: Entry) -> dict[str, Any]:
    summary = entry.summary
    return {
        **account_json(entry.account),
        "p99_ttft_ms": summary.ttft.p99_s * 1e3,
        "p99_tpot_ms": summary.tpot.p99_s * 1e3,
        "capacity": asdict(entry.capacity) if entry.capacity else None,
        "config_hash": summary.config_hash,
    }


def _shares_json(shares: Shares) -> dict[str, Any]:
    return {
        "time_s": shares.time_s,
        "interval": shares.interval,
        "lost": shares.lost,
        "classes": {name: asdict(share) for name, share in shares.of.items()},
    }


def _figures(entries: Sequence[Entry]) -> Iterator[tuple[str, Callable[[Entry], str]]]:
    """Label and value of every consequence, in the order in which they are shown."""
    pressed = any(entry.account.has_queue for entry in entries)
    yield "Batch attained" + (" while requests wait" if pressed else ""), _of("pressed_running", 1)
    yield (
        "Batch that fits, by closed form",
        lambda e: _number(e.account.predicted.requests_that_fit if e.account.predicted else math.nan, 1),
    )
    yield "Requests per second", _of("request_throughput", 2)
    yield "Output tokens per second", _of("output_throughput", 0)
    if any(entry.capacity for entry in entries):
        yield "Capacity at the SLO (req/s)", lambda e: _capacity(e.capacity)
        yield "What breaks first", lambda e: (e.capacity and e.capacity.reason) or "n/a"
    yield "P99 time to first token (ms)", lambda e: _number(e.account.p99_ttft_s * 1e3, 0)
    yield "P99 time per output token (ms)", lambda e: _number(e.account.p99_tpot_s * 1e3, 1)
    yield "Preemptions", lambda e: f"{e.account.preemptions:,}"
    yield "Lost memory (GiB)", lambda e: _number(e.account.cost.lost_bytes / GIB, 2)
    yield "Lost memory in GPUs", lambda e: _number(e.account.cost.lost_gpus, 2)
    if any(entry.account.cost.lost_usd_per_hour is not None for entry in entries):
        yield "Price of those GPUs ($/h)", lambda e: _optional(e.account.cost.lost_usd_per_hour, 2)
        yield (
            "$ per million output tokens",
            lambda e: _optional(e.account.cost.usd_per_million_output_tokens, 3),
        )
    yield "Slots never filled per request", lambda e: _number(e.account.waste.mean, 1)
    yield "Slots asked for over filled", lambda e: _number(e.account.waste.over_reservation, 2)
    yield "Sharing factor", _of("sharing", 3)
    if any(entry.account.failures.get("admission_failures_fit") for entry in entries):
        yield "Enough free, no hole fits (%)", lambda e: _number(e.account.failed_fit_rate * 100, 1)
    for key in dict.fromkeys(k for entry in entries for k, n in entry.account.failures.items() if n):
        label = _DENIED.get(key, key)
        yield label, lambda e, key=key: f"{e.account.failures.get(key, 0):,}"  # type: ignore[misc]


def _of(name: str, decimals: int) -> Callable[[Entry], str]:
    return lambda entry: _number(getattr(entry.account, name), decimals)


def _capacity(capacity: Capacity | None) -> str:
    if capacity is None:
        return "n/a"
    if math.isinf(capacity.missed):
        return f"over {capacity.kept:.2f}"
    return f"{capacity.kept:.2f} to {capacity.missed:.2f}"


def _present(accounts: Sequence[Fragmentation]) -> list[str]:
    """The classes that some allocator has at some time."""
    return [
        name
        for name in FRAGMENT_CLASSES
        if name in ("tokens", "free") or any(account.whole.of[name].peak > 0 for account in accounts)
    ]


def _share(shares: Shares, name: str) -> str:
    share = shares.of[name]
    if math.isnan(share.half_width):
        return f"{share.mean * 100:.1f}"
    return f"{share.mean * 100:.1f} ±{share.half_width * 100:.1f}"


def _quantiles(shares: Shares, name: str) -> str:
    share = shares.of[name]
    low, high, peak = (f"{value * 100:.0f}" for value in (share.p5, share.p95, share.peak))
    return f"{share.mean * 100:.1f} ({low}, {high}, {peak})"


def _number(value: float, decimals: int) -> str:
    return f"{value:,.{decimals}f}" if math.isfinite(value) else "n/a"


def _optional(value: float | None, decimals: int) -> str:
    return "n/a" if value is None else _number(value, decimals)
