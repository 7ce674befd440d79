"""Simulation against recordings that hold every step: schedules, step times, what clients and operators see.

Three questions: is the schedule the same when requests come at the same step; does the law give the time of a
recorded step; and, with both at work on a clock of their own, do latencies, queues and memory come out.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from servesim.analysis.figures import METRICS, request_figures
from servesim.analysis.measured import simulated_latencies
from servesim.analysis.metrics import summarise
from servesim.analysis.recorded import RecordedSteps
from servesim.analysis.run import Run
from servesim.analysis.schedule_replay import step_seconds
from servesim.analysis.simulation import Prepared, prepare, run_prepared
from servesim.analysis.step_times import StepErrors, TimedSteps, errors_of, law_of, timed_steps
from servesim.analysis.stepwise import StepwiseRun
from servesim.analysis.validate import (
    FITTED_TO,
    Finding,
    Refusal,
    about,
    listed,
    memory_findings,
    regime_of,
    with_profile,
)
from servesim.config.load import LoadedScenario

__all__ = ["ScheduleCheck", "StepwiseFindings", "validate_steps"]

OTHER_RUNS, ANOTHER_MODEL = "other runs", "another model"
"""judged_on: runs of the model that the calibration was fitted to, and runs of a model it never saw."""


@dataclass(frozen=True, slots=True)
class ScheduleCheck:
    """Whether the simulator schedules recorded runs as vLLM did, step by step."""

    source: str
    load: str
    runs: int
    steps: int
    preemptions: int
    differences: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StepwiseFindings:
    """Everything found in one folder of such recordings."""

    findings: tuple[Finding, ...]
    steps: tuple[StepErrors, ...]
    schedules: tuple[ScheduleCheck, ...]
    refusals: tuple[Refusal, ...]
    """Runs that the simulator does not serve."""


def validate_steps(source: str, recorded: RecordedSteps, on_group: Callable[[], None]) -> StepwiseFindings:
    """Replay all runs; ``on_group()`` is called after each group of repeats."""
    groups: defaultdict[str, list[StepwiseRun]] = defaultdict(list)
    for run in recorded.runs:
        groups[run.group].append(run)
    findings: list[Finding] = []
    refusals: list[Refusal] = []
    timed: defaultdict[tuple[str, str], list[tuple[StepwiseRun, TimedSteps]]] = defaultdict(list)
    with listed(refusals, source, "start-up"):
        loaded = recorded.runs[0].load_scenario()
        findings += memory_findings(source, "start-up", loaded, recorded.memory)
    for group, repeats in groups.items():
        with listed(refusals, source, group):
            replays = [(run, timed_steps(run)) for run in repeats]
            if repeats[0].load not in _NOT_SERVED:
                findings += _served(source, recorded, repeats)
            timed[repeats[0].load, _part(recorded, repeats[0])] += replays
        on_group()
    schedules = tuple(_check(source, load, runs) for (load, _), runs in timed.items())
    steps: list[StepErrors] = []
    for (load, part), runs in timed.items():
        with listed(refusals, source, f"steps, {load}"):
            steps += _step_errors(source, recorded, runs, part)
    return StepwiseFindings(tuple(findings), tuple(steps), schedules, tuple(refusals))


_NOT_SERVED = ("grid",)  # experiments whose latencies are their step times


def _part(recorded: RecordedSteps, run: StepwiseRun) -> str:
    """What the calibration knows of a run, as judged_on says it."""
    if recorded.profile is None:
        return "all steps"
    if not recorded.fitted_here:
        return ANOTHER_MODEL
    return OTHER_RUNS if run.judged else FITTED_TO


def _check(source: str, load: str, runs: Sequence[tuple[StepwiseRun, TimedSteps]]) -> ScheduleCheck:
    return ScheduleCheck(
        source=source,
        load=load,
        runs=len(runs),
        steps=sum(timed.replay.steps for _, timed in runs),
        preemptions=sum(len(step.preempted) for run, _ in runs for step in run.steps),
        differences=tuple(
            f"{run.name}: {timed.replay.difference}" for run, timed in runs if timed.replay.difference
        ),
    )


def _step_errors(
    source: str, recorded: RecordedSteps, runs: Sequence[tuple[StepwiseRun, TimedSteps]], part: str
) -> Iterator[StepErrors]:
    """Of the runs of one part at one load, under the uncalibrated law and under the calibrated one."""
    steps = [timed for _, timed in runs]
    about_them: dict[str, object] = {"source": source, "load": runs[0][0].load, "judged_on": part}
    yield from errors_of(steps, [timed.law for timed in steps], {**about_them, "calibrated": False})
    if recorded.profile is not None:
        laws = {run.overrides: run for run, _ in runs}
        known = {
            overrides: law_of(prepare(with_profile(run.load_scenario(), recorded.profile)))
            for overrides, run in laws.items()
        }
        calibrated = [known[run.overrides] for run, _ in runs]
        yield from errors_of(steps, calibrated, {**about_them, "calibrated": True})


def _served(source: str, recorded: RecordedSteps, repeats: Sequence[StepwiseRun]) -> Iterator[Finding]:
    """Repeats of one workload against its simulation, without and with calibration."""
    run = repeats[0]
    loaded = run.load_scenario()
    yield from _replayed(source, repeats, loaded, calibrated=False, judged_on="all requests")
    if recorded.profile is not None:
        profiled = with_profile(loaded, recorded.profile)
        yield from _replayed(source, repeats, profiled, calibrated=True, judged_on=_part(recorded, run))


def _replayed(
    source: str, repeats: Sequence[StepwiseRun], loaded: LoadedScenario, *, calibrated: bool, judged_on: str
) -> Iterator[Finding]:
    prepared = prepare(loaded, repeats[0].workload())
    known = replace(prepared, rows_met=repeats[0].rows_met, drafts=repeats[0].drafts)
    simulated_run = run_prepared(known)
    summary = summarise(simulated_run)
    hits = summary.load.prefix_cache_hits > 0
    found = about(source, prepared, regime_of(summary), hits=hits)
    simulated = {**request_figures(simulated_latencies(simulated_run)), **_simulated_state(simulated_run)}
    real = [{**request_figures(run.latencies), **_recorded_state(run, prepared)} for run in repeats]
    for metric, value in simulated.items():
        times = [one[metric] for one in real]
        least = METRICS[metric].least
        if max(value, *times) <= least:
            continue  # both say that there is next to nothing of it
        value, times = max(value, least), [max(one, least) for one in times]
        yield replace(
            found,
            row=repeats[0].group,
            load=repeats[0].load,
            metric=metric,
            real=math.exp(float(np.mean(np.log(times)))),
            simulated=value,
            calibrated=calibrated,
            judged_on=judged_on,
            repeats=len(times),
            noise=float(np.std(np.log(times), ddof=1)) if len(times) > 1 else math.nan,
        )


def _simulated_state(run: Run) -> dict[str, float]:
    """What operators watch, besides latencies."""
    summary = summarise(run)
    load, kv = summary.load, summary.kv
    return {
        "mean_running": load.mean_running,
        "mean_waiting": load.mean_waiting,
        "mean_kv_usage": kv.mean_usage,
        "peak_kv_usage": kv.peak_usage,
        "preemptions": float(load.preemptions),
        "prefix_hit_tokens": float(sum(run.log.requests.columns["cached_tokens"])),
    }


def _recorded_state(run: StepwiseRun, prepared: Prepared) -> dict[str, float]:
    """The same from recorded steps: means over the time from the first arrival to the last end."""
    steps, pool = run.steps, prepared.memory.num_gpu_blocks - 1  # without the null block
    begin_s = min(request.arrival_s for request in run.requests)
    horizon_s = max(request.finish_s for request in run.requests) - begin_s
    seconds = step_seconds(run)
    used = [1.0 - step.free_blocks / pool for step in steps]
    hits: dict[int, int] = {}
    for step in steps:
        for request, _, before in step.scheduled:
            hits.setdefault(request, before)

    def mean(values: Sequence[float]) -> float:
        return float(np.asarray(values) @ seconds) / horizon_s

    return {
        "mean_running": mean([step.running for step in steps]),
        "mean_waiting": mean([step.waiting for step in steps]),
        "mean_kv_usage": mean(used),
        "peak_kv_usage": max(used),
        "preemptions": float(sum(len(step.preempted) for step in steps)),
        "prefix_hit_tokens": float(sum(hits.values())),
    }
