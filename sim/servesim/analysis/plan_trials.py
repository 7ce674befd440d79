"""One trial of a plan: some replicas of a fleet under one seed, and what they attain."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from servesim.analysis.capacity import at_load
from servesim.analysis.intervals import needed_samples
from servesim.analysis.judgement import overload_per_s
from servesim.analysis.metrics import request_times
from servesim.analysis.replications import is_resampled, with_seed
from servesim.analysis.run import Run
from servesim.analysis.simulation import prepare, run_prepared
from servesim.analysis.steady import steady_window_s
from servesim.analysis.timeline import Timeline, timeline
from servesim.config.load import LoadedScenario
from servesim.config.scenario import Router
from servesim.config.workload import TimedTrace
from servesim.cost.step_time import StepShape
from servesim.engine.events import Log
from servesim.engine.router import BLIND
from servesim.errors import Problem, StudyError
from servesim.workload.build import build_workload
from servesim.workload.request import Request
from servesim.workload.resampled import ResampledWorkload

__all__ = ["LIMITS", "Trial", "TrialTask", "p99_of", "recorded", "run_trial", "simulated_replicas"]

LIMITS = {"ttft": "ttft_p99_s", "tpot": "tpot_p99_s", "e2e": "e2e_p99_s"}
"""Latency by the limit of the SLO."""
_COUNTED = 2500  # requests of a trial, about
_LEAST = 1e-3  # of a limit that is attained, also where there is nothing to limit: searches take logarithms
WARM_UP = 0.1
"""Share of the time of arrivals that is left out at the begin."""


class TrialTask(NamedTuple):
    """What a worker simulates: ``simulated`` of ``replicas`` replicas at ``factor`` times the load."""

    loaded: LoadedScenario
    factor: float
    replicas: int
    simulated: int
    router: Router
    seed: int


class Trial(NamedTuple):
    """What they attained."""

    p99_s: dict[str, float]
    attained: float
    """The worst P99 over its limit."""
    worst: str
    """Whose it is."""
    is_stable: bool
    counted: int
    """Requests that the percentiles are of."""
    seats: float
    """Share of the requests that waited for a slot, and for KV blocks; the latter with the preempted."""
    memory: float
    shape: StepShape
    """The mean step: of those that prefill, if the TTFT is worst, else as the decoding requests see it."""

    @property
    def keeps(self) -> bool:
        """Whether all limits are kept at once, and not only for as long as the trial."""
        return self.attained <= 1 and self.is_stable


def simulated_replicas(replicas: int, num_requests: int, router: Router) -> int:
    """How many of a fleet's replicas a trial simulates; all, where the router looks at them."""
    return min(replicas, math.ceil(_COUNTED * replicas / num_requests)) if router in BLIND else replicas


def run_trial(task: TrialTask) -> Trial:
    """Simulate a task; raises StudyError when too few requests are left to judge a P99."""
    if not is_resampled(task.loaded):
        run = run_prepared(prepare(at_load(_fleet(task), task.factor)))
    elif task.router == "round-robin":
        run = _one_by_one(task)
    else:
        whole = Requests(tuple(_redrawn(task).some(slice(None), task.factor)))
        run = run_prepared(prepare(_fleet(task), whole))
    return _judge(run, task)


def _fleet(task: TrialTask) -> LoadedScenario:
    loaded = with_seed(task.loaded, task.seed)
    scenario = loaded.scenario
    changes = {"replicas": task.replicas, "simulated_replicas": task.simulated, "router": task.router}
    hardware = scenario.hardware.model_copy(update=changes)
    return replace(loaded, scenario=scenario.model_copy(update={"hardware": hardware}))


def _one_by_one(task: TrialTask) -> Run:
    """The replicas in turn, each with every n-th request: what none of them gets is not even drawn."""
    drawn, replicas = _redrawn(task), task.replicas
    each = (drawn.some(slice(number, None, replicas), task.factor) for number in range(task.simulated))
    prepared = prepare(_fleet(task._replace(replicas=1, simulated=1)), Requests(()))
    runs = [run_prepared(replace(prepared, workload=Requests(tuple(part)))) for part in each]
    return replace(runs[0], log=Log.of_fleet([run.log for run in runs]))


def _judge(run: Run, task: TrialTask) -> Trial:
    slo, times = run.scenario.slo, request_times(run.log)
    column = run.log.requests.columns
    arrival_s = column["arrival_s"]
    if not len(arrival_s):
        raise _too_few(0, task)
    begin_s, end_s = steady_window_s(run, WARM_UP)
    counted = times.completed & (arrival_s >= begin_s) & (arrival_s <= end_s)
    line = timeline(run.log.steps, float(arrival_s.min()))
    is_stable = not overload_per_s(run, line)
    if counted.sum() < needed_samples(0.99) and is_stable:
        raise _too_few(int(counted.sum()), task)
    sample = {"ttft": times.ttft_s, "tpot": times.tpot_s, "e2e": times.e2e_s}
    p99_s = {name: p99_of(of[counted]) for name, of in sample.items()}
    limits = {name: getattr(slo, key) for name, key in LIMITS.items()}
    given = {name: limit for name, limit in limits.items() if limit is not None}
    ratios = {name: float(np.fmax(p99_s[name] / limit, _LEAST)) for name, limit in given.items()}
    worst = max(ratios, key=lambda name: ratios[name])
    failed, count = run.log.counters, len(arrival_s)
    return Trial(
        p99_s,
        ratios[worst],
        worst,
        is_stable,
        int(counted.sum()),
        failed.get("admission_failures_seats", 0) / count,
        (failed.get("admission_failures_memory", 0) + int((column["preemptions"] > 0).sum())) / count,
        _mean_shape(line, worst),
    )


def _too_few(count: int, task: TrialTask) -> StudyError:
    step = "raise num_requests, or take more of the trace"
    got = f"{count:,} of {task.simulated:,} replicas, warm-up left out"
    return StudyError(Problem("too few requests to judge a P99", got=got, next_step=step))


def p99_of(values: NDArray[np.float64]) -> float:
    """NaN where no request has such a latency, as answers of one token have no TPOT."""
    known = values[np.isfinite(values)]
    return float(np.quantile(known, 0.99)) if len(known) else math.nan


def _mean_shape(line: Timeline, worst: str) -> StepShape:
    of = line.columns
    weights = of["steps"] * (of["prefills"] > 0) if worst == "ttft" else of["steps"] * of["decodes"]
    total = max(1, int(weights.sum()))

    def mean(name: str) -> int:
        return round(float(of[name] @ weights) / total)

    chunk, decodes = mean("prefill_tokens"), mean("decodes")
    return StepShape(decodes, (mean("context_tokens"),), ((chunk, 0),) if chunk else (), max(1, decodes))


# ---- the traffic -----------------------------------------------------------------------------------


_Key = tuple[str | int, ...]
_drawn: dict[_Key, ResampledWorkload] = {}
_KEPT = 12


def _redrawn(task: TrialTask) -> ResampledWorkload:
    """The trace drawn again under the task's seed; kept, since other fleets of a plan serve it, too."""
    key = (*_source(task.loaded), task.seed)
    if key not in _drawn:
        if len(_drawn) >= _KEPT:
            del _drawn[next(iter(_drawn))]
        _drawn[key] = ResampledWorkload(recorded(task.loaded), task.seed)
    return _drawn[key]


_read: dict[_Key, Requests] = {}


def recorded(loaded: LoadedScenario) -> Requests:
    """The requests of a scenario's trace; kept, since a plan asks for them again and again."""
    scenario, key = loaded.scenario, _source(loaded)
    if key not in _read:
        _read.clear()
        find = partial(loaded.find, "traces")
        _read[key] = Requests(tuple(build_workload(scenario.workload, scenario.seed, find).arrivals()))
    return _read[key]


def _source(loaded: LoadedScenario) -> _Key:
    """What the requests of a trace depend on: settings, the seed of its jitter, the file as it is now."""
    workload = loaded.scenario.workload
    assert isinstance(workload.trace, TimedTrace)
    file = loaded.find("traces", workload.trace.file).resolve()
    about = file.stat()
    return workload.model_dump_json(), loaded.scenario.seed, str(file), about.st_mtime_ns, about.st_size


class Requests:
    """A workload of given requests."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self._requests = requests

    @property
    def num_requests(self) -> int:
        """All of them."""
        return len(self._requests)

    def arrivals(self) -> Iterator[Request]:
        """As they are."""
        return iter(self._requests)

    def follow_up(self, finished: Request, now_s: float) -> Request | None:
        """None: nobody waits."""
        return None
