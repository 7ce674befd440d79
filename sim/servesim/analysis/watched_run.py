"""A simulation that is looked at while it runs, so that every request's latency can be split afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from servesim.analysis.attribution import Attribution, Watched, attribute, columns_by_replica
from servesim.analysis.comebacks import returns_s
from servesim.analysis.run import Run
from servesim.analysis.simulation import Prepared, run_prepared
from servesim.config.scenario import EngineConfig
from servesim.cost.step_time import StepTime
from servesim.engine.events import Log
from servesim.engine.residence import Residence, note_residence, residence_of_lives
from servesim.engine.scheduler import Scheduler

__all__ = ["watched_run"]


def watched_run(prepared: Prepared, **options: Any) -> tuple[Run, Callable[[], Attribution]]:
    """Simulate; the second is what splits every completed request's latency, when it is asked for.

    ``options`` are those of run_prepared.
    """
    lives: dict[int, list[Watched]] = {}  # of a replica: the first, and those after failures

    def watch(replica: int, engine: EngineConfig, scheduler: Scheduler, law: StepTime) -> StepTime:
        lives.setdefault(replica, []).append(Watched(engine, note_residence(scheduler), law))
        return law

    def attributed() -> Attribution:
        engines = [
            _watched(run.log, replica, lives) for replica in range(max(1, len(run.log.requests.parts)))
        ]
        return attribute(run.log, engines)

    run = run_prepared(prepared, watch=watch, **options)
    return run, attributed


def _watched(log: Log, replica: int, lives: dict[int, list[Watched]]) -> Watched:
    of = lives.get(replica)
    if of is None:  # a replica that was never ordered
        other = next(iter(lives.values()))[0]
        return other._replace(residence=Residence())
    return of[0]._replace(residence=_residence(log, replica, [life.residence for life in of]))


def _residence(log: Log, replica: int, lives: list[Residence]) -> Residence:
    """That of all lives of a replica."""
    if len(lives) == 1:
        return lives[0]
    assert log.fleet is not None
    begins_s, aborts = returns_s(log, replica), log.fleet.aborts.columns
    steps = columns_by_replica(log.steps)[replica]
    done = np.concatenate(([0], np.cumsum(steps["steps"])))
    before = [0, *done[np.searchsorted(steps["start_s"], begins_s)].tolist()]
    life = np.where(aborts["replica"] == replica, np.searchsorted(begins_s, aborts["at_s"]), -1)
    unfinished = [aborts["index"][life == number].tolist() for number in range(len(lives))]
    return residence_of_lives(list(zip(lives, before, unfinished, strict=True)))
