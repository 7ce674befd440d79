"""The scalars of a deployment from recorded step times: batch composition in, seconds out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from servesim.analysis.calibrate import Calibration
from servesim.analysis.fit import fit_identified
from servesim.analysis.recorded import RecordedSteps
from servesim.analysis.scalars import SCALARS, Deployment
from servesim.analysis.simulation import prepare
from servesim.analysis.step_times import KINDS, TimedSteps, predicted_s, timed_steps
from servesim.cost.step_time import build_step_time
from servesim.errors import CalibrationError, Problem

__all__ = ["calibrate_steps"]

Floats = NDArray[np.float64]
Timed = tuple[tuple[str, ...], TimedSteps]
"""A run's own settings, and its steps."""


def calibrate_steps(recorded: RecordedSteps, provenance: str, name: str) -> Calibration:
    """Fit to the steps of the runs whose part is ``fit``, and judge on the steps of the others.

    Runs and kinds of step weigh alike, however many steps they have. Raises CalibrationError when there is
    nothing to fit to or to judge by, or no scalar can be told.
    """
    fitted = [(run.overrides, timed_steps(run)) for run in recorded.runs if not run.judged]
    judged = [(run.overrides, timed_steps(run)) for run in recorded.runs if run.judged]
    if not fitted or not judged:
        problem = Problem(
            "needs runs to fit to and others to judge by",
            path="runs.csv",
            got=f"{len(fitted)} and {len(judged)}",
            next_step="give the column part: fit or judge",
        )
        raise CalibrationError(problem)
    settings = {run.overrides: run for run in recorded.runs}
    served = {overrides: prepare(run.load_scenario()) for overrides, run in settings.items()}
    deployment = Deployment(served[recorded.runs[0].overrides])
    names = [name for name in SCALARS if name in deployment.names and name != "num_gpu_blocks"]

    def errors(values: dict[str, float], runs: Sequence[Timed]) -> dict[str, Floats]:
        """Mean of ln(law / recorded) of every run that has such steps, by kind of step."""
        moved = {"step_time": deployment.moved_engine(values).step_time}
        laws = {
            overrides: build_step_time(one.model, one.gpu, one.engine.model_copy(update=moved), one.draft)
            for overrides, one in served.items()
        }
        logs = [np.log(predicted_s(run, laws[of]) / run.replay.seconds) for of, run in runs]
        marks = {kind: [run.of(kind) for _, run in runs] for kind in KINDS}
        return {
            kind: np.array([log[mark].mean() for log, mark in zip(logs, chosen, strict=True) if mark.any()])
            for kind, chosen in marks.items()
        }

    def residuals(values: dict[str, float]) -> Floats:
        return np.concatenate(list(errors(values, fitted).values()))

    fit = fit_identified(residuals, names, deployment.limits)
    deployment.refuse_if_nothing(fit)
    start = dict.fromkeys(deployment.names, 0.0)
    before, after = (
        {f"step, {kind}": float(each.mean()) for kind, each in errors(values, judged).items() if len(each)}
        for values in (start, {**start, **fit.values})
    )
    steps = sum(len(run.replay.shapes) for _, run in fitted)
    profile = deployment.profile(fit, f"{provenance}; {steps} steps of {len(fitted)} runs", name)
    return Calibration(
        profile.model_copy(update={"held_out_error": {key: round(value, 4) for key, value in after.items()}}),
        fit.standard_errors,
        f"steps of {len(judged)} other runs",
        before,
        after,
    )
