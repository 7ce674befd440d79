"""The memory map: who held which slots of the KV pool during a stretch of a run.

Times are ticks, ``TICKS`` of them in the stretch; addresses and sizes are token slots.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from servesim.analysis.run import Run
from servesim.analysis.simulation import Prepared, run_prepared
from servesim.analysis.timeline import KV_CLASSES, Timeline, expand_steps, timeline
from servesim.engine.kv_recorder import Holding, KvRecorder, Moment, Stay
from servesim.engine.scheduler import Scheduler

__all__ = [
    "MAX_ENDS",
    "TICKS",
    "Band",
    "Holes",
    "MappedRequest",
    "MemoryMap",
    "busiest_stretch",
    "map_memory",
]

Floats = NDArray[np.float64]

TICKS = 4000
MAX_ENDS = 800
"""The stretch lies before this many requests have ended, since each step up to it is computed on its own."""
_MOST_BANDS = 24_000
_CLOSE_UP = 200  # blocks of a paged pool in which single requests can be told apart
_STAYS = 3.0  # mean stays of a request that a stretch lasts
_INSTANTS = 400
_SIZES = tuple(2**k for k in range(21))


class Band(NamedTuple):
    """Slots ``address`` to ``address + slots - 1`` from tick ``begin`` to tick ``end``.

    ``request``: index into ``MemoryMap.requests``, -1 for a cached prefix that nobody uses. ``offset``: the
    place of the first slot's token in the request; of shared slots, how many requests use them.
    """

    request: int
    address: int
    slots: int
    offset: int
    begin: int
    end: int


class MappedRequest(NamedTuple):
    """A request of the map: ``written`` are (tick, tokens) between which it grew evenly."""

    index: int  # type: ignore[assignment]  # the field's name, not tuple.index
    prompt_tokens: int
    final_slots: int
    written: tuple[tuple[int, int], ...]
    preempted: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Holes:
    """Free slots between allocations, seen at evenly spaced instants of the whole recording."""

    sizes: tuple[int, ...]
    counts: tuple[float, ...]
    """Mean number of holes of at least sizes[i] and less than sizes[i + 1] slots."""
    mean_count: float
    mean_free: float
    """Slots that nobody holds."""
    mean_largest: float
    external_index: float
    """Mean of 1 - largest hole / free slots; 0: all free slots in one piece."""


@dataclass(frozen=True, slots=True)
class MemoryMap:
    """A stretch of a run as bands of memory."""

    name: str
    begin_s: float
    end_s: float
    pool_slots: int
    block_size: int | None
    drawn: tuple[int, int]
    """The addresses of which the bands are here; all of them, unless there would be too many bands."""
    close_up: tuple[int, int]
    """The part to look at first: in a large paged pool, where most blocks change hands."""
    requests: tuple[MappedRequest, ...]
    bands: tuple[Band, ...]
    shared: tuple[Band, ...]
    holes: Holes | None
    """None for a paged pool, in which every free block is as good as any other."""


def busiest_stretch(runs: Sequence[Run]) -> tuple[float, float]:
    """When all these runs of one workload hold most, in seconds of simulated time.

    As long as three mean stays of a request, and before ``MAX_ENDS`` requests have ended in any of them.
    """
    lines, stays_s, limits_s = [], [], []
    for run in runs:
        column = {name: np.array(values) for name, values in run.log.requests.columns.items()}
        ended = ~np.isnan(column["finish_s"])
        lines.append(timeline(run.log.steps, float(column["arrival_s"].min())))
        if ended.any():
            stays_s.append(float((column["finish_s"] - column["scheduled_s"])[ended].mean()))
            limits_s.append(float(np.sort(column["finish_s"][ended])[:MAX_ENDS][-1]))
    if not stays_s:
        return 0.0, 0.0
    first_s, limit_s = float(lines[0].start_s[0]), min(limits_s)
    length_s = min(_STAYS * float(np.median(stays_s)), limit_s - first_s)
    starts_s = np.linspace(first_s, limit_s - length_s, 200)
    use = np.min([_use(line, starts_s, length_s) for line in lines], axis=0)
    begin_s = float(starts_s[int(np.argmax(use))])
    return begin_s, begin_s + length_s


def map_memory(prepared: Prepared, name: str, begin_s: float, end_s: float) -> MemoryMap:
    """Simulate up to ``end_s``, step by step, and draw up who held what from ``begin_s`` on."""
    recorders: list[KvRecorder] = []

    def observe(scheduler: Scheduler) -> None:
        recorders.append(KvRecorder(scheduler))

    run = run_prepared(prepared, observe=observe, stop=lambda: recorders[0].now_s > end_s)
    return memory_map(run, recorders[0], name, begin_s, end_s)


def memory_map(run: Run, recorder: KvRecorder, name: str, begin_s: float, end_s: float) -> MemoryMap:
    """The bands of a recorded run between two times; of a part of the addresses where there are too many."""
    clock = _Clock(run, begin_s, end_s)
    steps, engine = run.log.steps.columns, run.scenario.engine
    pool_slots = sum(int(steps[f"kv_{name}"][0]) for name in KV_CLASSES) if len(run.log.steps) else 0
    found = [(holding, *clock.span(holding)) for holding in recorder.holdings]
    by_address: dict[int, list[tuple[Holding, int, int]]] = defaultdict(list)
    for each in found:
        by_address[each[0].address].append(each)
    shown = [each for each in found if each[1] < TICKS and each[2] > 0]
    places = {request: at for at, request in enumerate(dict.fromkeys(each[0].request for each in shown))}
    bands = _joined(
        Band(places[h.request], h.address, h.slots, h.offset, max(begin, 0), min(end, TICKS))
        for h, begin, end in shown
    )
    bands += _joined(_cached(by_address))
    block_size = engine.block_size if engine.allocator == "paged" else None
    drawn = _drawn_part(bands, pool_slots, block_size or 1)
    bands = _within(bands, drawn)
    stays = {stay.request: stay for stay in recorder.stays}
    return MemoryMap(
        name=name,
        begin_s=begin_s,
        end_s=end_s,
        pool_slots=pool_slots,
        block_size=block_size,
        drawn=drawn,
        close_up=_close_up(bands, drawn, block_size) if block_size else drawn,
        requests=tuple(_mapped(stays[request], clock) for request in places),
        bands=tuple(bands),
        shared=tuple(_within(_joined(_shared(by_address)), drawn)),
        holes=None if block_size else _holes(found, clock.first_tick, pool_slots),
    )


def _drawn_part(bands: Sequence[Band], pool_slots: int, unit: int) -> tuple[int, int]:
    """The whole pool, or where as many bands as can be drawn lie closest together."""
    if len(bands) <= _MOST_BANDS:
        return 0, pool_slots
    addresses = np.sort([band.address for band in bands])
    best = int(np.argmin(addresses[_MOST_BANDS:] - addresses[:-_MOST_BANDS]))
    low, high = int(addresses[best]), int(addresses[best + _MOST_BANDS])
    return low, max(high, low + unit)


def _within(bands: Sequence[Band], part: tuple[int, int]) -> list[Band]:
    return [band for band in bands if part[0] <= band.address < part[1]]


def _close_up(bands: Sequence[Band], drawn: tuple[int, int], block_size: int) -> tuple[int, int]:
    """Where most blocks change hands between requests within the stretch."""
    low, high = drawn
    length = _CLOSE_UP * block_size
    if high - low <= length:
        return drawn
    edges = np.arange(low, high, length // 2)
    changes = [b.address for b in bands if b.request >= 0 and (b.begin > 0 or b.end < TICKS)]
    counts = np.histogram(changes, np.append(edges, high))[0]
    best = int(np.argmax(counts[:-1] + counts[1:]))
    begin = min(low + best * (length // 2), high - length)
    return begin, begin + length


class _Clock:
    """From moments of the recording to ticks of the stretch; ticks below 0 come before it."""

    def __init__(self, run: Run, begin_s: float, end_s: float) -> None:
        steps = expand_steps(timeline(run.log.steps, 0.0))
        ends_s = steps.end_s
        self._begins_s = ends_s - steps.duration_s
        self._begin_s, self._per_s = begin_s, TICKS / max(end_s - begin_s, 1e-9)
        self._last = TICKS if not len(ends_s) else max(TICKS, self._tick(float(ends_s[-1])))
        self.first_tick = self._tick(float(self._begins_s[0])) if len(ends_s) else 0

    def tick(self, moment: Moment | None) -> int:
        """The tick of a moment; what never ended goes on after the last one."""
        if moment is None:
            return self._last
        if moment.step < 0:
            return self._tick(moment.time_s)
        begun = moment.step < len(self._begins_s)
        return self._tick(float(self._begins_s[moment.step])) if begun else self._last

    def span(self, holding: Holding) -> tuple[int, int]:
        """Ticks of the begin and the end of a holding."""
        return self.tick(holding.begin), self.tick(holding.end)

    def _tick(self, time_s: float) -> int:
        return round((time_s - self._begin_s) * self._per_s)


def _use(line: Timeline, starts_s: Floats, length_s: float) -> Floats:
    """Mean slots held by live requests in each stretch of ``length_s`` from ``starts_s`` on."""
    live = line.live()
    return np.array(
        [line.bin_means(np.array([start_s, start_s + length_s]), *live)[0] for start_s in starts_s]
    )


def _mapped(stay: Stay, clock: _Clock) -> MappedRequest:
    points = [(clock.tick(moment), tokens) for moment, tokens in stay.written]
    inside = [i for i, (tick, _) in enumerate(points) if 0 <= tick <= TICKS]
    low, high = (max(inside[0] - 1, 0), inside[-1] + 2) if inside else (0, len(points))
    preempted = (clock.tick(moment) for moment in stay.preemptions)
    return MappedRequest(
        stay.request,
        stay.prompt_tokens,
        stay.final_slots,
        tuple(points[low:high]),
        tuple(tick for tick in preempted if 0 <= tick <= TICKS),
    )


def _joined(bands: Iterator[Band]) -> list[Band]:
    """Neighbours in memory that belong together for the same time, as one band."""
    joined: list[Band] = []
    for band in sorted(b for b in bands if b.end > b.begin):
        if joined:
            last = joined[-1]
            follows = band.address == last.address + last.slots and band.request == last.request
            tokens_follow = band.request < 0 or band.offset == last.offset + last.slots
            if follows and tokens_follow and (band.begin, band.end) == (last.begin, last.end):
                joined[-1] = last._replace(slots=last.slots + band.slots)
                continue
        joined.append(band)
    return joined


def _cached(by_address: dict[int, list[tuple[Holding, int, int]]]) -> Iterator[Band]:
    """Blocks that nobody holds, from when they were given back with a hash to when they are taken again."""
    for address, held in by_address.items():
        held = sorted(held, key=lambda each: each[1:])
        for at, (holding, _, end) in enumerate(held):
            until = held[at + 1][1] if at + 1 < len(held) else TICKS
            still_used = any(other_end > end for _, _, other_end in held[:at])
            if holding.cached and end < until and not still_used and until > 0 and end < TICKS:
                yield Band(-1, address, holding.slots, 0, max(end, 0), min(until, TICKS))


def _shared(by_address: dict[int, list[tuple[Holding, int, int]]]) -> Iterator[Band]:
    """Where two requests or more hold the same slots, and how many."""
    for address, held in by_address.items():
        if len(held) < 2:
            continue
        changes = sorted([(begin, 1) for _, begin, _ in held] + [(end, -1) for _, _, end in held])
        users, since = 0, 0
        for tick, change in changes:
            if users > 1 and tick > since and tick > 0 and since < TICKS:
                yield Band(-1, address, held[0][0].slots, users, max(since, 0), min(tick, TICKS))
            users, since = users + change, tick


def _holes(found: list[tuple[Holding, int, int]], first_tick: int, pool_slots: int) -> Holes | None:
    """Sizes of the free runs from the begin of the recording to the end of the stretch."""
    if not found:
        return None
    begin, end = (np.array([each[1 + i] for each in found]) for i in (0, 1))
    address = np.array([each[0].address for each in found])
    size = np.array([each[0].slots for each in found])
    counts: Counter[int] = Counter()
    free, largest, number, index = [], [], [], []
    for tick in np.linspace(first_tick, TICKS, _INSTANTS + 2)[1:-1]:
        live = (begin <= tick) & (end > tick)
        order = np.argsort(address[live])
        low = np.append(address[live][order], pool_slots)
        high = np.insert((address + size)[live][order], 0, 0)
        gaps = (low - high)[low > high]
        counts.update(np.searchsorted(_SIZES, gaps, side="right").tolist())
        free.append(int(gaps.sum()))
        largest.append(int(gaps.max(initial=0)))
        number.append(len(gaps))
        index.append(1 - largest[-1] / free[-1] if free[-1] else 0.0)
    return Holes(
        sizes=_SIZES,
        counts=tuple(counts[k + 1] / _INSTANTS for k in range(len(_SIZES))),
        mean_count=float(np.mean(number)),
        mean_free=float(np.mean(free)),
        mean_largest=float(np.mean(largest)),
        external_index=float(np.mean(index)),
    )
