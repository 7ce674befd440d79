"""Sections of the accuracy page on recordings that hold every step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from servesim.analysis.figures import METRICS
from servesim.analysis.step_times import StepErrors
from servesim.analysis.validate import Finding, Validation
from servesim.analysis.validate_steps import StepwiseFindings
from servesim.report.sections import Table
from servesim.report.shown import figure_value, noise_size, signed_error, size_of_error

__all__ = ["RUNS", "SCHEDULES", "STEPS", "runs_table", "schedules_table", "steps_table"]

SCHEDULES = (
    "Every recorded step was scheduled again, with the requests handed in before the very step before which "
    "vLLM got them. Compared: order, tokens, preemptions, running, waiting, free blocks, evictions, finished "
    "requests. Time plays no part in it."
)
STEPS = (
    "The law of step time, asked about every recorded step: batch composition in, seconds out. Bias is the "
    "mean of ln(law / recorded), median and p90 are of its size; plain is the law without calibration. Noise "
    "is the same median between real repeats of one step, where there are any."
)
RUNS = (
    "Error is that of the calibrated simulation, plain that of the one without calibration. Real values are "
    "geometric means over repeats of the same requests, noise is the standard deviation of ln(real) from "
    "repeat to repeat. KV use is the share of blocks held by live requests; a figure is left out where both "
    "sides say next to nothing of it."
)


def schedules_table(validations: Sequence[Validation]) -> Table:
    """Steps compared and steps that differ, by recording and load."""
    rows = tuple(
        (
            check.source,
            check.load,
            "; ".join(check.differences) or "none",
            f"{check.runs:,}",
            f"{check.steps:,}",
            f"{check.preemptions:,}",
        )
        for one in _stepwise(validations)
        for check in one.schedules
    )
    return Table("Schedules", ("Recording", "Load", "Differences", "Runs", "Steps", "Preemptions"), rows)


def steps_table(validations: Sequence[Validation]) -> Table:
    """Errors of step times, calibrated and plain beside one another."""
    head = (
        "Recording",
        "Load",
        "Steps",
        "Judged on",
        "Count",
        "Mean",
        "Bias",
        "Median",
        "p90",
        "Plain median",
        "Noise",
    )
    rows = tuple(
        _step_row(error, plain) for one in _stepwise(validations) for error, plain in _pairs(one.steps)
    )
    return Table("Step times", head, rows)


def runs_table(one: Validation) -> Table:
    """What clients and operators see, run by run of one recording."""
    head = ("Run", "Load", "Figure", "Judged on", "Real", "Simulated", "Error", "Plain", "Noise", "Repeats")
    plain = {(each.row, each.metric): each for each in one.findings if not each.calibrated}
    calibrated = {(each.row, each.metric): each for each in one.findings if each.calibrated}
    rows = tuple(_run_row(calibrated.get(key, each), each) for key, each in plain.items())
    return Table(one.folder.name, head, rows)


def _stepwise(validations: Sequence[Validation]) -> Iterator[StepwiseFindings]:
    return (one.stepwise for one in validations if one.stepwise is not None)


def _pairs(steps: Sequence[StepErrors]) -> Iterator[tuple[StepErrors, StepErrors]]:
    """Every kind of step by load and what it is judged on: calibrated where that was done, and plain."""
    plain = {(each.load, each.kind, each.judged_on): each for each in steps if not each.calibrated}
    calibrated = {(each.load, each.kind, each.judged_on): each for each in steps if each.calibrated}
    return ((calibrated.get(key, each), each) for key, each in plain.items())


def _step_row(error: StepErrors, plain: StepErrors) -> tuple[str, ...]:
    return (
        error.source,
        error.load,
        error.kind,
        error.judged_on,
        f"{error.steps:,}",
        f"{1e3 * error.mean_s:,.1f} ms",
        signed_error(error.bias),
        size_of_error(error.median),
        size_of_error(error.p90),
        size_of_error(plain.median),
        noise_size(error.noise),
    )


def _run_row(finding: Finding, plain: Finding) -> tuple[str, ...]:
    return (
        finding.row,
        finding.load,
        METRICS[finding.metric].label,
        finding.judged_on,
        figure_value(finding.metric, finding.real),
        figure_value(finding.metric, finding.simulated),
        signed_error(finding.error),
        signed_error(plain.error),
        noise_size(finding.noise),
        str(finding.repeats),
    )
