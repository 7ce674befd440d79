"""The highest rate at which a deployment keeps its SLO, by bisection over the rate on the same requests."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from servesim.analysis.bisection import Verdict, turning_rate
from servesim.analysis.metrics import summarise
from servesim.analysis.run import Run
from servesim.analysis.simulation import prepare, run_prepared
from servesim.analysis.timeline import timeline
from servesim.config.load import LoadedScenario, load_scenario
from servesim.config.workload import BurstArrivals, ClosedLoopArrivals, LengthsTrace
from servesim.errors import ConfigError, Problem

__all__ = ["Capacity", "find_capacity", "rate_setting"]

_TRIALS = 10
_WIDTH = 0.05
_BACKLOG = 0.02  # share of the requests that may wait in the last tenth of the arrivals


@dataclass(frozen=True, slots=True)
class Capacity:
    """A bracket of request rates: the SLO holds at ``kept``, and at ``missed`` it does not."""

    kept: float
    """Requests per second; 0 when the SLO was missed at every rate tried."""
    missed: float
    """inf when the SLO was kept at every rate tried."""
    trials: int
    reason: str
    """What failed first at ``missed``."""


def find_capacity(
    source: str, overrides: Sequence[str], on_trial: Callable[[], None] = lambda: None
) -> Capacity:
    """Double or halve the rate until the SLO turns, then halve the bracket to 5 % or ten simulations.

    The requests and their lengths stay the same; only the times between them are stretched. A rate at which
    a backlog is left when arrivals end counts as missed, whatever the latencies of those that were served.
    """
    loaded = load_scenario(source, overrides)
    path, base = rate_setting(loaded)
    reasons: dict[float, str] = {}
    offered = math.nan

    def verdict(factor: float) -> Verdict:
        nonlocal offered
        run = run_prepared(prepare(load_scenario(source, [*overrides, f"{path}={base * factor!r}"])))
        on_trial()
        if math.isnan(offered):
            offered = summarise(run).offered_rate / factor
        reasons[factor] = _trouble(run)
        return "missed" if reasons[factor] else "kept"

    kept, missed = turning_rate(verdict, 1.0, _WIDTH, most=_TRIALS)
    return Capacity(kept * offered, missed * offered, len(reasons), reasons.get(missed, ""))


def rate_setting(loaded: LoadedScenario) -> tuple[str, float]:
    """The setting that scales the arrivals, and its value; ConfigError where there is no capacity to find."""
    scenario = loaded.scenario
    if not any((scenario.slo.ttft_p99_s, scenario.slo.tpot_p99_s, scenario.slo.e2e_p99_s)):
        problem = Problem(
            "a capacity needs limits to keep",
            file=str(loaded.file),
            path="slo",
            next_step="set one, as in --set slo.ttft_p99_s=1",
        )
        raise ConfigError(problem)
    trace, arrivals = scenario.workload.trace, scenario.workload.arrivals
    if trace is not None and not isinstance(trace, LengthsTrace):
        return "workload.trace.rate_scale", trace.rate_scale
    if arrivals is None or isinstance(arrivals, BurstArrivals | ClosedLoopArrivals):
        problem = Problem(
            "arrivals without a rate have no capacity in requests per second",
            file=str(loaded.file),
            path="workload.arrivals",
            next_step="choose the process poisson, gamma or constant",
        )
        raise ConfigError(problem)
    return "workload.arrivals.rate_per_s", arrivals.rate_per_s


def _trouble(run: Run) -> str:
    """What is wrong at this rate, in a few words; empty when all limits are kept."""
    summary = summarise(run)
    if summary.failed:
        return f"{summary.failed} requests refused"
    missed = [check.metric.upper() for check in summary.slo if not check.met]
    if missed:
        return f"P99 {' and '.join(missed)}"
    arrival_s = np.array(run.log.requests.columns["arrival_s"])
    first_s, last_s = float(arrival_s.min()), float(arrival_s.max())
    if last_s > first_s:
        line = timeline(run.log.steps, first_s)
        edges_s = np.array([last_s - (last_s - first_s) / 10, last_s])
        waiting = float(line.bin_means(edges_s, line.columns["waiting"], line.columns["waiting"])[0])
        if waiting > max(1.0, _BACKLOG * len(arrival_s)):
            return "a growing queue"
    return ""
