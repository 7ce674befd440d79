"""From what a server was measured to do to the scalars by which it differs from the simulation."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from servesim.analysis.figures import figures_of, request_figures
from servesim.analysis.fit import fit_identified
from servesim.analysis.measured import Latencies, MeasuredRequests, MeasuredWorkload, simulated_latencies
from servesim.analysis.metrics import summarise
from servesim.analysis.recorded import ENGINE_PROFILE, RecordedFolder
from servesim.analysis.scalars import Deployment
from servesim.analysis.simulation import prepare
from servesim.config.engine_profile import EngineProfile
from servesim.config.load import LoadedScenario
from servesim.errors import CalibrationError, Problem

__all__ = ["Calibration", "MeasuredRow", "calibrate_folder", "calibrate_requests", "calibrate_rows"]

Floats = NDArray[np.float64]

_FEWEST_REQUESTS = 40
_GROUPS = 8  # of requests alike, whose mean latencies are compared


@dataclass(frozen=True, slots=True)
class Calibration:
    """What was fitted, and how wrong the simulation is without and with it on what was kept out."""

    profile: EngineProfile
    standard_errors: dict[str, float]
    """Of each fitted scalar, relative (of exposed_host_s: as a share of the mean step)."""
    judged_on: str
    before: dict[str, float]
    """ln(simulated / real) by figure, on the part that was kept out of the fit."""
    after: dict[str, float]


@dataclass(frozen=True, slots=True)
class MeasuredRow:
    """One run that is known by its figures only."""

    name: str
    loaded: LoadedScenario
    measured: dict[str, float]
    judged: bool


def calibrate_requests(
    loaded: LoadedScenario, measured: MeasuredRequests, provenance: str, name: str
) -> Calibration:
    """Fit to the first half of the requests, in the order of arrival, and judge on the second.

    All of them are sent; only the latencies of the first half are looked at. Raises CalibrationError when
    there are too few, or when no scalar can be told.
    """
    real, workload = measured.latencies, MeasuredWorkload(measured)
    if len(real) < _FEWEST_REQUESTS:
        problem = Problem(
            f"needs at least {_FEWEST_REQUESTS} requests: half of them are kept out to judge the result",
            got=str(len(real)),
            next_step="record a longer run",
        )
        raise CalibrationError(problem)
    half = len(real) // 2
    first, second = slice(0, half), slice(half, None)
    deployment = Deployment(prepare(loaded, workload))
    start = dict.fromkeys(deployment.names, 0.0)
    groups = _groups(simulated_latencies(deployment.run(start)).part(first))
    target = _grouped(real.part(first), groups)
    weights = _weights(real.part(first), simulated_latencies(deployment.run(start)).part(first), groups)

    def residuals(values: dict[str, float]) -> Floats:
        found = _grouped(simulated_latencies(deployment.run(values)).part(first), groups)
        return np.asarray((found - target) * weights)

    fit = fit_identified(residuals, deployment.names, deployment.limits)
    deployment.refuse_if_nothing(fit)
    kept = request_figures(real.part(second))

    def errors(values: dict[str, float]) -> dict[str, float]:
        found = request_figures(simulated_latencies(deployment.run(values)).part(second))
        return {key: math.log(found[key] / value) for key, value in kept.items()}

    profile = deployment.profile(fit, f"{provenance}; first {half} of {len(real)} requests", name)
    after = errors(fit.values)
    return Calibration(
        profile.model_copy(update={"held_out_error": _rounded(after)}),
        fit.standard_errors,
        f"requests {half + 1} to {len(real)}",
        errors(start),
        after,
    )


_DEPLOYMENT = ("model", "gpu", "tensor_parallel_size")


def _figures(judged: bool) -> tuple[str, ...]:
    """What a row is judged by, or fitted to: how fast the engine steps.

    The throughput of a burst holds client and API server time as well.
    """
    return ("total_token_throughput", "mean_tpot_ms") if judged else ("mean_tpot_ms", "median_itl_ms")


def calibrate_rows(rows: Sequence[MeasuredRow], provenance: str, name: str) -> Calibration:
    """Fit to the TPOT and ITL of the rows that are not judged, to those of them that a row has.

    The profile names the model, the GPU and the degree that all rows share: what they do not share it is
    meant to carry over.  Raises CalibrationError as calibrate_requests does.
    """
    rows = [row for row in rows if row.measured.keys() & _figures(row.judged)]
    fitted = [row for row in rows if not row.judged]
    if len(fitted) < 2 or len(fitted) == len(rows):
        speed, result = (" or ".join(_figures(judged)) for judged in (False, True))
        problem = Problem(
            f"needs two rows to fit to, with {speed}, and one to judge, with {result}",
            got=f"{len(fitted)} and {len(rows) - len(fitted)}",
        )
        raise CalibrationError(problem)
    deployments = [Deployment(prepare(row.loaded)) for row in rows]

    def errors(values: dict[str, float], *, judged: bool) -> Iterator[tuple[str, float]]:
        """ln(simulated / real) of every figure that the rows of one part have."""
        for deployment, row in zip(deployments, rows, strict=True):
            if row.judged is judged:
                figures = figures_of(summarise(deployment.run(values)))
                for key in _figures(judged):
                    if key in row.measured:
                        yield key, math.log(figures[key] / row.measured[key])

    def residuals(values: dict[str, float]) -> Floats:
        return np.array([error for _, error in errors(values, judged=False)])

    one = deployments[0]
    fit = fit_identified(residuals, one.names, one.limits)
    one.refuse_if_nothing(fit)

    def judged(values: dict[str, float]) -> dict[str, float]:
        found = defaultdict(list)
        for key, error in errors(values, judged=True):
            found[key].append(error)
        return {f"median {key}": float(np.median(found[key])) for key in found}

    listed = ", ".join(row.name for row in fitted)
    profiles = [each.profile(fit, f"{provenance}; rows {listed}", name) for each in deployments]
    apart: dict[str, Any] = {
        key: None for key in _DEPLOYMENT if len({getattr(each, key) for each in profiles}) > 1
    }
    profile, after = profiles[0], judged(fit.values)
    shared = set.intersection(*(set(each.fitted_under.items()) for each in profiles))
    apart["fitted_under"] = {
        key: value for key, value in profile.fitted_under.items() if (key, value) in shared
    }
    return Calibration(
        profile.model_copy(update={**apart, "held_out_error": _rounded(after)}),
        fit.standard_errors,
        f"{len(rows) - len(fitted)} other rows",
        judged(dict.fromkeys(one.names, 0.0)),
        after,
    )


def calibrate_folder(folder: RecordedFolder) -> dict[str, Calibration]:
    """The calibrations that a folder of recorded runs asks for, by the name of their file in it.

    One for a single run; one for every ``profile`` that rows of results name. A profile that cannot be told
    is left out; raises CalibrationError when none can, or none is asked for.
    """
    provenance = f"{folder.name}: {folder.meta.title}, {folder.meta.engine} ({folder.meta.source})"
    if folder.run is not None:
        run = folder.run
        return {ENGINE_PROFILE: calibrate_requests(run.loaded, run.requests, provenance, folder.name)}
    if folder.stepwise is not None:
        from servesim.analysis.calibrate_steps import calibrate_steps  # builds on this module

        return {ENGINE_PROFILE: calibrate_steps(folder.stepwise, provenance, folder.name)}
    groups: dict[str, list[MeasuredRow]] = {}
    for row in folder.rows:
        if row.profile is not None:
            one = MeasuredRow(row.name, row.load(), row.measured, row.judged)
            groups.setdefault(row.profile.name, []).append(one)
    found, problems = {}, []
    for file, rows in groups.items():
        try:
            found[file] = calibrate_rows(rows, provenance, file.removesuffix(".yaml"))
        except CalibrationError as error:
            problems += [replace(problem, file=file) for problem in error.problems]
    if not found:
        nothing = Problem(f"{folder.name} names no profile in its rows", next_step="add a profile column")
        raise CalibrationError(problems or nothing)
    return found


Groups = list[list[NDArray[np.int64]]]


def _samples(latencies: Latencies) -> tuple[Floats, ...]:
    return latencies.ttft_s, latencies.tpot_s, latencies.e2e_s


def _groups(simulated: Latencies) -> Groups:
    """For TTFT, TPOT and E2E latency, requests alike (few neighbours or many, short prompts or long).

    Such groups differ in what their time goes to; groups of neighbours in time would not.  Requests of one
    token have no TPOT and are in no group of it; a metric that fewer than five have has none.
    """
    groups = []
    for sample in _samples(simulated):
        order = np.argsort(sample, kind="stable")[: np.isfinite(sample).sum()]  # NaNs come last
        count = min(_GROUPS, len(order) // 5)
        groups.append(np.array_split(order, count) if count else [])
    return groups


def _grouped(latencies: Latencies, groups: Groups) -> Floats:
    """ln of the mean latency of every group."""
    means: Floats = np.array(
        [
            float(sample[group].mean())
            for sample, of_metric in zip(_samples(latencies), groups, strict=True)
            for group in of_metric
        ]
    )
    return np.asarray(np.log(means), dtype=np.float64)


def _weights(real: Latencies, simulated: Latencies, groups: Groups) -> Floats:
    """How much each group's mean is worth: one over its error from request to request, the best one 1.

    A request that just misses a step waits for another one; where TTFT is a few steps that says little.
    The error is counted after both means are made equal: what all requests share is what is to be fitted.
    """
    errors = []
    for found, true, of_metric in zip(_samples(simulated), _samples(real), groups, strict=True):
        for group in of_metric:
            ratios = found[group] / found[group].mean() - true[group] / true[group].mean()
            errors.append(float(ratios.std()) / math.sqrt(len(group)))
    worth = 1.0 / np.maximum(np.array(errors), 0.01)
    return np.asarray(worth / worth.max())


def _rounded(errors: dict[str, float]) -> dict[str, float]:
    return {key: round(error, 4) for key, error in errors.items()}
