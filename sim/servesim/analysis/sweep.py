"""Many simulations side by side: a sweep with a run folder to resume from, on local cores or a cluster."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeVar

from servesim.analysis.grid import Axis, Point, grid_points, latin_points
from servesim.analysis.points import PointTask, digest_of, ready, run_point
from servesim.analysis.run_folder import RunFolder
from servesim.config.load import LoadedScenario, load_scenario
from servesim.errors import ConfigError, Problem, ServesimError, StudyError, blamed_on

__all__ = ["OnDone", "SweepPlan", "Workers", "ignore", "in_order", "plan_sweep", "run_sweep", "spread"]

Item = TypeVar("Item")
Found = TypeVar("Found")


OnDone = Callable[[int, int], None]
"""Called with (done, total)."""


def ignore(done: int, total: int) -> None:
    """An OnDone that does nothing."""


@dataclass(frozen=True, slots=True)
class Workers:
    """Where simulations run: on ``jobs`` cores of this machine (None: all), or on a Dask cluster."""

    backend: Literal["local", "dask"] = "local"
    jobs: int | None = None
    scheduler: str | None = None
    """Address of the cluster's scheduler, such as tcp://10.0.0.1:8786."""

    def __post_init__(self) -> None:
        if (self.backend == "dask") != (self.scheduler is not None):
            step = "give both --backend dask and --scheduler ADDRESS, or neither"
            raise StudyError(
                Problem("a cluster needs an address, and only a cluster has one", next_step=step)
            )


@dataclass(frozen=True, slots=True)
class SweepPlan:
    """The points of a sweep: those to simulate, and those that cannot be, with the reason."""

    manifest: dict[str, Any]
    tasks: tuple[PointTask, ...]
    refused: dict[int, dict[str, Any]]


def plan_sweep(
    source: str | Path,
    overrides: Sequence[str],
    axes: Sequence[Axis],
    latin: int | None = None,
    replications: int = 1,
) -> SweepPlan:
    """Load and check every point without simulating any.

    A point that a model's or a GPU's limits forbid becomes a refused one. Raises ConfigError for a value that
    no point can take.
    """
    if not axes:
        raise ConfigError(Problem("nothing varies", next_step="add --vary path=value,value,..."))
    paths = [axis.path for axis in axes]
    for path in paths:
        if paths.count(path) > 1:
            step = "give all its values in one --vary"
            raise ConfigError(Problem("varies twice", "--vary", path=path, next_step=step))
    base = load_scenario(source, overrides)
    points = latin_points(axes, latin, base.scenario.seed) if latin else grid_points(axes)
    tasks, refused, failures = [], {}, {}
    for number, point in enumerate(points):
        values = dict(zip(paths, point, strict=True))
        given = (*overrides, *(f"{path}={value}" for path, value in values.items()))
        try:
            with blamed_on(dict.fromkeys(paths, "--vary")):
                loaded = load_scenario(source, given)
        except ConfigError as error:
            failures[number] = error
            refused[number] = {"values": values, "digest": "", "error": str(error)}
            continue
        digest = digest_of(loaded)
        try:
            ready(loaded)
        except ServesimError as error:
            refused[number] = {"values": values, "digest": digest, "error": str(error)}
        else:
            tasks.append(PointTask(number, str(base.file), given, values, replications, digest))
    _refuse_wrong_values(points, failures)
    manifest = {
        "servesim": version("servesim"),
        "scenario": base.scenario.name,
        "vary": {axis.path: list(axis.values or (f"{axis.low:g}", f"{axis.high:g}")) for axis in axes},
        "latin": latin,
        "replications": replications,
        "points": len(points),
        "digest": _digest(base, tasks, refused),
    }
    return SweepPlan(manifest, tuple(tasks), refused)


def _refuse_wrong_values(points: Sequence[Point], failures: dict[int, ConfigError]) -> None:
    """Raise when all points with one value of one axis fail: the value, not the combination, is wrong."""
    for axis in range(len(points[0])):
        for value in dict.fromkeys(point[axis] for point in points):
            numbers = [number for number, point in enumerate(points) if point[axis] == value]
            if all(number in failures for number in numbers):
                raise failures[numbers[0]]


def _digest(base: LoadedScenario, tasks: Sequence[PointTask], refused: dict[int, dict[str, Any]]) -> str:
    parts = [digest_of(base), *(task.digest for task in tasks), *(one["digest"] for one in refused.values())]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def run_sweep(
    plan: SweepPlan,
    folder: RunFolder,
    workers: Workers,
    on_point: OnDone = ignore,
) -> list[dict[str, Any]]:
    """The records of all points in order; those in the folder are taken from it, the others are added to it.

    ``on_point(done, total)`` is called after each one.
    """
    records = {**folder.finished(), **plan.refused}
    open_ = [task for task in plan.tasks if task.number not in records]
    total = len(plan.tasks) + len(plan.refused)
    for number, record in spread(run_point, open_, workers):
        if "failed" in record:
            step = "give all workers the same files and the same servesim; finished points are kept"
            raise StudyError(
                Problem("a worker could not simulate a point", got=record["failed"], next_step=step)
            )
        task = open_[number]
        records[task.number] = record
        folder.keep(task.number, record)
        on_point(len(records), total)
    return [records[number] for number in sorted(records)]


def in_order(
    function: Callable[[Item], Found], items: Sequence[Item], workers: Workers, on_done: OnDone = ignore
) -> list[Found]:
    """``function`` of every item, in the items' order."""
    found: dict[int, Found] = {}
    for number, result in spread(function, items, workers):
        found[number] = result
        on_done(len(found), len(items))
    return [found[number] for number in range(len(items))]


def spread(
    function: Callable[[Item], Found], items: Sequence[Item], workers: Workers
) -> Iterator[tuple[int, Found]]:
    """(number, function of the item) as they are finished, in whatever order that is."""
    if workers.backend == "local":
        jobs = min(workers.jobs or _cores(), len(items))
        if jobs <= 1:
            yield from ((number, function(item)) for number, item in enumerate(items))
            return
        yield from _parallel(function, items, jobs)
        return
    with _cluster(workers.scheduler or ""):
        yield from _parallel(function, items, -1)


def _parallel(
    function: Callable[[Item], Found], items: Iterable[Item], jobs: int
) -> Iterator[tuple[int, Found]]:
    import joblib
    from joblib.externals.loky.process_executor import TerminatedWorkerError

    parallel = joblib.Parallel(n_jobs=jobs, return_as="generator_unordered", batch_size=1)
    calls = (joblib.delayed(_numbered)(function, number, item) for number, item in enumerate(items))
    try:
        with _deaf_children():
            results = parallel(calls)
        yield from results
    except TerminatedWorkerError as error:
        step = "use fewer --jobs; what is finished is kept"
        raise StudyError(Problem("a worker process died, perhaps out of memory", next_step=step)) from error


@contextmanager
def _deaf_children() -> Iterator[None]:
    """Processes that begin meanwhile do not hear Ctrl-C: it is for the one that began them to end them.

    They take over that it is ignored. A mask would not do, since multiprocessing takes SIGINT out of it.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _numbered(function: Callable[[Item], Found], number: int, item: Item) -> tuple[int, Found]:
    return number, function(item)


@contextmanager
def _cluster(address: str) -> Iterator[None]:
    """joblib's calls go to the Dask cluster at ``address`` meanwhile."""
    if find_spec("distributed") is None:
        step = "pip install 'servesim[dask]'"
        raise StudyError(Problem("--backend dask needs the extra servesim[dask]", next_step=step))
    import distributed
    import joblib

    connect: Any = distributed.Client  # untyped, where it is installed at all
    try:
        client = connect(address, timeout="5s")
    except (OSError, ValueError) as error:
        step = "start one with `dask scheduler` and `dask worker ADDRESS`, and give its address"
        words = str(error).split("\n")[0]
        problem = Problem("no Dask cluster answers", path=f"--scheduler {address}", got=words, next_step=step)
        raise StudyError(problem) from error
    with client, joblib.parallel_config(backend="dask"):
        _refuse_unlike_workers(client)
        yield


def _refuse_unlike_workers(client: Any) -> None:
    """Raise StudyError unless every worker has this machine's servesim."""
    ours = version("servesim")
    told = client.run(_version, on_error="return")
    unlike = {worker: found for worker, found in told.items() if found != ours}
    if not client.scheduler_info()["workers"]:
        raise StudyError(
            Problem("the Dask cluster has no workers", next_step="start some with `dask worker`")
        )
    if unlike:
        worker, found = next(iter(unlike.items()))
        step = f"install servesim {ours} on every worker"
        raise StudyError(
            Problem("a worker has another servesim, or none", path=worker, got=str(found), next_step=step)
        )


def _version() -> str:
    return version("servesim")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
