"""One point of a sweep: a scenario with some values set, and the figures that its simulation gives."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from servesim.analysis.metrics import summarise
from servesim.analysis.quantities import QUANTITIES, value_of
from servesim.analysis.replications import replicate
from servesim.analysis.simulation import Prepared, prepare, run_prepared
from servesim.config.load import LoadedScenario, load_scenario
from servesim.cost.step_time import build_step_time
from servesim.errors import ServesimError
from servesim.workload.request import Request, Workload

__all__ = ["PointTask", "digest_of", "ready", "run_point"]


class PointTask(NamedTuple):
    """What a worker needs to know of a point; it reads the files itself."""

    number: int
    source: str
    overrides: tuple[str, ...]
    values: dict[str, str]
    """By path, those that vary."""
    replications: int
    digest: str


def run_point(task: PointTask) -> dict[str, Any]:
    """The point's record; ``failed`` in it says that the worker could not do what the sweep could."""
    try:
        loaded = load_scenario(task.source, task.overrides)
        if digest_of(loaded) != task.digest:
            return {"failed": f"{loaded.file} and the files it names differ from those of this machine"}
        record = _figures(loaded, task.replications)
    except ServesimError as error:
        return {"failed": str(error)}
    return {"values": task.values, "digest": task.digest, **record}


def _figures(loaded: LoadedScenario, count: int) -> dict[str, Any]:
    """By key: the figures of one run; of several, their means with interval or refusal, and each value."""
    if count == 1:
        summary = summarise(run_prepared(prepare(loaded)))
        figures = {key: value_of(one, summary) for key, one in QUANTITIES.items()}
        return {"figures": _plain(figures), "warnings": [warned.caveat.key for warned in summary.warnings]}
    found = replicate(loaded, count)
    estimates = {one.quantity.key: one for one in found.estimates()}
    known = {key: one.interval for key, one in estimates.items() if one.interval is not None}
    return {
        "figures": {key: known[key].value if key in known else None for key in QUANTITIES},
        "intervals": {key: [one.low, one.high] for key, one in known.items()},
        "refused": {key: one.refused for key, one in estimates.items() if one.interval is None},
        "replications": {key: found.values(QUANTITIES[key]).tolist() for key in known},
        "warm_up_s": found.warm_up_s,
        "warnings": sorted({one.caveat.key for each in found.summaries for one in each.warnings}),
    }


def ready(loaded: LoadedScenario) -> Prepared:
    """Everything but the workload, read and checked; raises ServesimError when it cannot be simulated."""
    prepared = prepare(loaded, _Nothing())
    build_step_time(prepared.model, prepared.gpu, prepared.engine, prepared.draft)
    return prepared


def digest_of(loaded: LoadedScenario) -> str:
    """Sixteen hex digits that change with any value of the scenario and any file that it names."""
    texts: Sequence[str] = [
        json.dumps(loaded.scenario.model_dump(mode="json"), sort_keys=True),
        *(
            _file_digest(str(path), path.stat().st_mtime_ns, path.stat().st_size)
            for path in loaded.named_files()
        ),
    ]
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


@lru_cache(maxsize=256)
def _file_digest(path: str, changed_ns: int, size: int) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _plain(figures: dict[str, float]) -> dict[str, float | None]:
    return {key: value if math.isfinite(value) else None for key, value in figures.items()}


class _Nothing(Workload):
    """Stands for a workload that is not read yet."""

    @property
    def num_requests(self) -> int:
        return 0

    def arrivals(self) -> Any:
        return iter(())

    def follow_up(self, finished: Request, now_s: float) -> Request | None:
        return None
