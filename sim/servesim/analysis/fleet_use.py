"""What happened to the replicas of a fleet, in figures."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from servesim.analysis.run import Run
from servesim.analysis.summary import FleetUse
from servesim.engine.events import FleetLog, Log

__all__ = ["aborts_of", "fleet_use"]


def fleet_use(run: Run, begin_s: float, end_s: float) -> FleetUse | None:
    """The figures of a fleet between two instants; None when nothing was to happen to it."""
    log, replicas = run.log.fleet, run.scenario.hardware.replicas
    if log is None:
        return None
    aborts, requests = log.aborts.columns, run.log.requests.columns
    lost = requests["index"][requests["status"] == Log.STATUSES.index("lost")]
    retried = np.setdiff1d(aborts["index"], lost)
    failures, time_s = log.failures.columns, replicas * (end_s - begin_s)
    back_s = np.where(np.isnan(failures["back_s"]), end_s, failures["back_s"])
    down_s = np.clip(back_s, begin_s, end_s) - np.clip(failures["failed_s"], begin_s, end_s)
    return FleetUse(
        replicas=replicas,
        failures=len(log.failures),
        up_share=1 - float(down_s.sum()) / time_s if time_s > 0 else 1.0,
        aborts=len(log.aborts),
        retried=len(retried),
        lost=len(lost),
        wasted_tokens=int(aborts["generated_tokens"].sum()),
    )


def aborts_of(log: FleetLog, index: NDArray[np.int64]) -> NDArray[np.int64]:
    """How often each request was in flight on a replica that failed."""
    counts = np.bincount(log.aborts.columns["index"], minlength=int(index.max(initial=0)) + 1)
    return np.asarray(counts[index], dtype=np.int64)
