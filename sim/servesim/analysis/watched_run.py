"""A simulation that is looked at while it runs, so that every request's latency can be split afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from servesim.analysis.attribution import Attribution, Watched, attribute
from servesim.analysis.run import Run
from servesim.analysis.simulation import Prepared, run_prepared
from servesim.cost.step_time import StepTime
from servesim.engine.residence import note_residence
from servesim.engine.scheduler import Scheduler

__all__ = ["watched_run"]


def watched_run(prepared: Prepared, **options: Any) -> tuple[Run, Callable[[], Attribution]]:
    """Simulate; the second is what splits every completed request's latency, when it is asked for.

    ``options`` are those of run_prepared.
    """
    watched: list[Watched] = []

    def watch(scheduler: Scheduler, law: StepTime) -> StepTime:
        watched.append(Watched(prepared.engine, note_residence(scheduler), law))
        return law

    run = run_prepared(prepared, watch=watch, **options)
    return run, lambda: attribute(run.log, watched)
