"""Recorded step times against the law: batch composition in, seconds out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from servesim.analysis.schedule_replay import ScheduleReplay, replay_schedule
from servesim.analysis.simulation import Prepared, prepare
from servesim.analysis.stepwise import StepwiseRun
from servesim.cost.first_calls import after
from servesim.cost.step_time import StepTime, build_step_time
from servesim.errors import ConfigError, Problem

__all__ = ["KINDS", "StepErrors", "TimedSteps", "errors_of", "law_of", "predicted_s", "timed_steps"]

Floats = NDArray[np.float64]
StepKind = Literal["decodes only", "with prompt chunks"]
KINDS: tuple[StepKind, ...] = ("decodes only", "with prompt chunks")


@dataclass(frozen=True, slots=True)
class TimedSteps:
    """The steps of one recorded run, and the deployment they ran on."""

    group: str
    replay: ScheduleReplay
    law: StepTime
    """The law of its deployment, without calibration."""
    rows_met: tuple[int, ...]
    """As of StepwiseRun."""

    def of(self, kind: StepKind) -> NDArray[np.bool_]:
        """Which steps are of a kind."""
        chunks = np.array([bool(shape.chunks) for shape in self.replay.shapes], dtype=np.bool_)
        return chunks if kind == "with prompt chunks" else ~chunks


@dataclass(frozen=True, slots=True)
class StepErrors:
    """How far the law is from the recorded times of one kind of step, and those from one another."""

    source: str
    load: str
    kind: StepKind
    calibrated: bool
    judged_on: str
    steps: int
    mean_s: float
    """Recorded."""
    bias: float
    """Mean of ln(law / recorded)."""
    median: float
    """Of its size."""
    p90: float
    noise: float
    """Median of |ln| between the repeats of one step and their mean; NaN where no step was repeated."""


def timed_steps(run: StepwiseRun) -> TimedSteps:
    """Replay the schedule of a run; raises ServesimError when the simulator does not serve its scenario."""
    prepared = prepare(run.load_scenario(), run.workload())
    if prepared.engine.speculative is not None and prepared.engine.async_scheduling:
        raise ConfigError(
            Problem(
                "steps with speculation are replayed only where each waits for the output of the one before",
                path="engine.async_scheduling",
                next_step="keep the recording for readers, or record it with async_scheduling off",
            )
        )
    return TimedSteps(run.group, replay_schedule(run, prepared), law_of(prepared), run.rows_met)


def law_of(prepared: Prepared) -> StepTime:
    """The law of step time that a simulation of a deployment would use."""
    return build_step_time(prepared.model, prepared.gpu, prepared.engine, prepared.draft)


def predicted_s(steps: TimedSteps, law: StepTime) -> Floats:
    """What the law says for every step."""
    of_process = after(law, steps.rows_met)
    return np.array([of_process.step_s(shape) for shape in steps.replay.shapes])


def errors_of(
    runs: Sequence[TimedSteps], laws: Sequence[StepTime], about: dict[str, object]
) -> list[StepErrors]:
    """The errors of some runs by kind of step, each under its law; ``about`` is what else to say of them."""
    predicted = [predicted_s(run, law) for run, law in zip(runs, laws, strict=True)]
    found = []
    for kind in KINDS:
        chosen = [(run, run.of(kind)) for run in runs]
        real = np.concatenate([run.replay.seconds[mark] for run, mark in chosen])
        if not len(real):
            continue
        law_s = np.concatenate([of_run[mark] for of_run, (_, mark) in zip(predicted, chosen, strict=True)])
        errors = np.log(law_s / real)
        sizes = np.abs(errors)
        found.append(
            StepErrors(
                **about,  # type: ignore[arg-type]
                kind=kind,
                steps=len(real),
                mean_s=float(real.mean()),
                bias=float(errors.mean()),
                median=float(np.median(sizes)),
                p90=float(np.percentile(sizes, 90)),
                noise=_noise(chosen),
            )
        )
    return found


def _noise(chosen: Sequence[tuple[TimedSteps, NDArray[np.bool_]]]) -> float:
    """Steps of one place in repeats that scheduled the very same from begin to end."""
    repeats: defaultdict[object, list[Floats]] = defaultdict(list)
    for run, mark in chosen:
        repeats[run.group, run.replay.shapes].append(run.replay.seconds[mark])
    sizes = []
    for times in repeats.values():
        if len(times) > 1 and len(times[0]):
            logs = np.log(np.array(times))
            # Their mean is nearer to each of them than the true time is.
            sizes.append(np.abs(logs - logs.mean(axis=0)).ravel() * np.sqrt(len(times) / (len(times) - 1)))
    return float(np.median(np.concatenate(sizes))) if sizes else float("nan")
