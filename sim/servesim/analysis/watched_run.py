"""A simulation that is looked at while it runs, so that every request's latency can be split afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

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


class _Life(NamedTuple):
    """An engine of a replica: the first, or the one after a failure."""

    engine: EngineConfig
    residence: Residence
    scheduler: Scheduler
    law: StepTime


def watched_run(prepared: Prepared, **options: Any) -> tuple[Run, Callable[[], Attribution]]:
    """Simulate; the second is what splits every completed request's latency, when it is asked for.

    ``options`` are those of run_prepared.
    """
    lives: dict[int, list[_Life]] = {}

    def watch(replica: int, engine: EngineConfig, scheduler: Scheduler, law: StepTime) -> StepTime:
        lives.setdefault(replica, []).append(_Life(engine, note_residence(scheduler), scheduler, law))
        return law

    def attributed() -> Attribution:
        engines = [
            _watched(run.log, replica, lives) for replica in range(max(1, len(run.log.requests.parts)))
        ]
        return attribute(run.log, engines)

    run = run_prepared(prepared, watch=watch, **options)
    return run, attributed


def _watched(log: Log, replica: int, lives: dict[int, list[_Life]]) -> Watched:
    of = lives.get(replica)
    if of is None:  # a replica that was never ordered
        other = next(iter(lives.values()))[0]
        return Watched(other.engine, Residence(), other.law)
    return Watched(of[0].engine, _residence(log, replica, of), of[0].law)


def _residence(log: Log, replica: int, lives: list[_Life]) -> Residence:
    """That of all lives of a replica."""
    if len(lives) == 1:
        return lives[0].residence
    steps = columns_by_replica(log.steps)[replica]
    done = np.concatenate(([0], np.cumsum(steps["steps"])))
    before = [0, *done[np.searchsorted(steps["start_s"], returns_s(log, replica))].tolist()]
    unfinished = [[state.request.index for state in life.scheduler.unfinished()] for life in lives]
    return residence_of_lives(
        [(life.residence, *rest) for life, *rest in zip(lives, before, unfinished, strict=True)]
    )
