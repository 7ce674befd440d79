"""The fragmentation lab: several allocators on the same requests."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from servesim.analysis.fragmentation import Fragmentation, average, fragmentation
from servesim.analysis.memory_map import MemoryMap, busiest_stretch, map_memory
from servesim.analysis.metrics import summarise
from servesim.analysis.prepared import build_replica
from servesim.analysis.replications import resampled, with_seed
from servesim.analysis.run import Run
from servesim.analysis.simulation import Prepared, prepare, run_prepared
from servesim.analysis.slo_capacity import Capacity, find_capacity, rate_setting
from servesim.analysis.summary import Summary
from servesim.config.files import list_data
from servesim.config.load import LoadedScenario, load_scenario
from servesim.config.scenario import EngineConfig, Scenario
from servesim.cost.step_time import build_step_time
from servesim.errors import ConfigError, Problem, ServesimError, did_you_mean

__all__ = ["BLOCK_SIZES", "BlockSize", "Entry", "Lab", "allocator_names", "run_lab"]

BLOCK_SIZES = (1, 8, 16, 32, 64, 128, 256)

Variant = tuple[str, list[str]]
"""A scenario, and overrides."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One allocator: its run (of the first seed), its account, and the capacity if it was asked for."""

    run: Run
    summary: Summary
    account: Fragmentation
    capacity: Capacity | None


@dataclass(frozen=True, slots=True)
class BlockSize:
    """One point of the block-size sweep; everything is of the time in which memory is short."""

    block_size: int
    num_blocks: int
    blocks_per_table: int
    """Entries of the block table of a request of max_model_len."""
    empty_slots: float
    """Mean empty slots of a running request."""
    predicted_empty_slots: float
    """From the lengths, by closed form."""
    uniform_empty_slots: float
    """(B - 1) / 2 for each group of layers, where the ends of the requests fall anywhere in a block."""
    lost: float
    running: float
    request_throughput: float
    hit_rate: float
    preemptions: int


@dataclass(frozen=True, slots=True)
class Lab:
    """All that the fragmentation report shows."""

    scenario: Scenario
    entries: tuple[Entry, ...]
    maps: tuple[MemoryMap, ...]
    block_sizes: tuple[BlockSize, ...]
    left_out: Mapping[str, str]
    """What the scenario cannot have, and why."""


def allocator_names() -> tuple[str, ...]:
    """Every allocator that a scenario can name."""
    return get_args(EngineConfig.model_fields["allocator"].annotation)


def run_lab(
    source: str,
    overrides: Sequence[str] = (),
    *,
    allocators: Sequence[str] = (),
    replications: int = 1,
    block_sizes: Sequence[int] = BLOCK_SIZES,
    capacity: bool = False,
    maps: bool = True,
    on_run: Callable[[str], None] = lambda what: None,
) -> Lab:
    """Serve the scenario's requests with every allocator; ``on_run(what)`` is called before each simulation.

    An allocator is a name, a name with other settings of the engine (``paged+block_size=32``), or another
    scenario. Raises ConfigError for one that cannot be had, before anything is simulated.
    """
    _know(allocators)
    settings = {name: variant(source, overrides, name) for name in dict.fromkeys(allocators)}
    for each in settings.values() or ((source, [*overrides]),):
        _check(*each, capacity=capacity)
    base, left_out = prepare(load_scenario(source, overrides)), dict[str, str]()
    if not settings:
        every = {name: variant(source, overrides, name) for name in allocator_names()}
        settings = _possible(every, base, left_out)
    sizes = {f"block size {size}": _of_block_size(source, overrides, size, base) for size in block_sizes}
    sizes = _possible(sizes, base, left_out)
    entries = [_entry(*each, name, replications, capacity, on_run) for name, each in settings.items()]
    if maps and any(_is_fleet(entry.run.scenario) for entry in entries):
        maps, left_out["memory map"] = False, "it is of one engine (hardware.replicas=1, fleet=null)"
    stretch = busiest_stretch([entry.run for entry in entries]) if maps else (0.0, 0.0)
    drawn = []
    if stretch[1] > stretch[0]:
        for name, each in settings.items():
            on_run(f"{name}, memory map")
            drawn.append(map_memory(_drawn(load_scenario(*each), 0, replications), name, *stretch))
    swept = []
    for name, each in sizes.items():
        on_run(name)
        swept.append(_block_size(*each))
    return Lab(base.loaded.scenario, tuple(entries), tuple(drawn), tuple(swept), left_out)


def _know(allocators: Sequence[str]) -> None:
    """Complain of every name that is neither an allocator nor a scenario."""
    known = [*allocator_names(), *list_data("scenarios")]
    names = [allocator.split("+")[0] for allocator in allocators]
    wrong = [name for name in names if name and "." not in name and "/" not in name and name not in known]
    if wrong:
        problems = [
            Problem(
                "no such allocator or scenario",
                path="--allocators",
                got=name,
                hint=did_you_mean(name, allocator_names()),
                next_step="give an allocator's name, or a scenario's name or path",
            )
            for name in wrong
        ]
        raise ConfigError(problems)


def _check(
    source: str, overrides: Sequence[str], like: Prepared | None = None, *, capacity: bool = False
) -> None:
    """Raise ServesimError for what would stop a run of the scenario; its requests are those of ``like``."""
    loaded = load_scenario(source, overrides)
    if loaded.scenario.fleet is not None and loaded.scenario.fleet.pools:
        step = "study one of the pools: --set fleet=null, with its GPU and its engine"
        raise ConfigError(
            Problem("a memory study is of equal KV pools", file=source, path="fleet.pools", next_step=step)
        )
    if capacity:
        rate_setting(loaded)
    prepared = prepare(loaded, like.workload if like else None)
    build_replica(prepared, build_step_time(prepared.model, prepared.gpu, prepared.engine, prepared.draft))


def _possible(
    variants: Mapping[str, Variant], base: Prepared, left_out: dict[str, str]
) -> dict[str, Variant]:
    """Those of the variants of ``base`` that can be had; the others are noted with the reason."""
    found = {}
    for name, each in variants.items():
        try:
            _check(*each, base)
            found[name] = each
        except ServesimError as error:
            first = error.problems[0]
            left_out[name] = f"{first.path}: {first.problem}"
    return found


def _is_fleet(scenario: Scenario) -> bool:
    return scenario.num_replicas > 1 or scenario.fleet is not None


def variant(source: str, overrides: Sequence[str], allocator: str) -> Variant:
    """The scenario that an entry means, and the overrides that make it use the allocator.

    What goes with the other kind of allocator only is taken back.
    """
    name, *settings = allocator.split("+")
    if not name or not all("=" in setting for setting in settings):
        problem = Problem(
            "an allocator is a name, with +KEY=VALUE for each setting of the engine that goes with it",
            path="--allocators",
            got=allocator,
            hint=f"names: {', '.join(allocator_names())}; or another scenario",
        )
        raise ConfigError(problem)
    own = [f"engine.{setting}" for setting in settings]
    if name not in allocator_names():
        return name, [*overrides, *own]
    plain = ["contiguous_fit=first"] if name == "paged" else ["enable_prefix_caching=false", "watermark=0"]
    return source, [*overrides, *(f"engine.{setting}" for setting in plain), f"engine.allocator={name}", *own]


def _of_block_size(source: str, overrides: Sequence[str], block_size: int, base: Prepared) -> Variant:
    """The scenario with paged memory in blocks of that size, of as many bytes also where it counts blocks."""
    source, changes = variant(source, overrides, "paged")
    changes.append(f"engine.block_size={block_size}")
    blocks = base.engine.num_gpu_blocks_override
    if blocks is not None:
        changes.append(f"engine.num_gpu_blocks_override={blocks * base.engine.block_size // block_size}")
    return source, changes


def _drawn(loaded: LoadedScenario, number: int, replications: int) -> Prepared:
    """One of the replications; each of several draws its requests again from a trace."""
    if replications == 1:
        return prepare(loaded)
    loaded = with_seed(loaded, loaded.scenario.seed + number)
    return resampled(loaded, prepare(loaded))


def _entry(
    source: str,
    overrides: list[str],
    name: str,
    replications: int,
    capacity: bool,
    on_run: Callable[[str], None],
) -> Entry:
    loaded = load_scenario(source, overrides)
    runs, summaries, accounts = [], [], []
    for number in range(replications):
        on_run(name if replications == 1 else f"{name}, seed {loaded.scenario.seed + number}")
        runs.append(run_prepared(_drawn(loaded, number, replications)))
        summaries.append(summarise(runs[-1]))
        accounts.append(_account(source, runs[-1], summaries[-1], name))
    found = None
    if capacity:
        found = find_capacity(source, overrides, lambda: on_run(f"{name}, capacity"))
    return Entry(runs[0], summaries[0], average(accounts), found)


def _account(source: str, run: Run, summary: Summary, name: str) -> Fragmentation:
    account = fragmentation(run, summary, name)
    if account is None:
        problem, step = "no request was ever scheduled", "raise engine.max_model_len"
        if len(run.log.steps):
            problem, step = "the whole run takes no time", "let a step take some: engine.step_time"
        raise ConfigError(Problem(problem, file=source, next_step=step))
    return account


def _block_size(source: str, overrides: list[str]) -> BlockSize:
    run = run_prepared(prepare(load_scenario(source, overrides)))
    summary, block_size = summarise(run), run.scenario.engine.block_size
    account = _account(source, run, summary, summary.name)
    shares, pool, predicted = account.pressed, account.identity.pool_slots, account.predicted
    empty = (shares.of["reserved"].mean + shares.of["internal"].mean) * pool
    assert run.scenario.engine.max_model_len is not None
    return BlockSize(
        block_size=block_size,
        num_blocks=run.memory.num_gpu_blocks - 1,
        blocks_per_table=-(-run.scenario.engine.max_model_len // block_size),
        empty_slots=empty / account.pressed_running if account.pressed_running else float("nan"),
        predicted_empty_slots=predicted.reserved + predicted.internal if predicted else float("nan"),
        uniform_empty_slots=(block_size - 1) / 2 * len(run.memory.kv_layout.group_windows),
        lost=shares.lost,
        running=account.pressed_running,
        request_throughput=summary.request_throughput,
        hit_rate=summary.load.prefix_cache_hit_rate,
        preemptions=summary.load.preemptions,
    )
