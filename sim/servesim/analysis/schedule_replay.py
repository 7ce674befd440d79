"""A recorded schedule taken step by step: the simulator's scheduler beside what vLLM decided.

Requests come before the very call of the scheduler before which they came, and outputs are processed where
they were, so that time plays no part: every step must be the same. Which drafts came and how many were
accepted is the drafter's and the model's affair, and taken from the recording.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from servesim.analysis.simulation import Prepared
from servesim.analysis.stepwise import RecordedStep, StepwiseRun
from servesim.cost.step_time import StepShape, build_step_time
from servesim.engine.build import build_scheduler
from servesim.engine.state import Plan
from servesim.engine.step_trace import StepRecorder

__all__ = ["ScheduleReplay", "replay_schedule", "step_seconds"]


@dataclass(frozen=True, slots=True)
class ScheduleReplay:
    """What came of a replay."""

    steps: int
    """Steps that were recorded."""
    difference: str
    """The first difference in words, empty when there is none; what follows it is not looked at."""
    shapes: tuple[StepShape, ...]
    """What every step computes, up to a difference."""
    seconds: NDArray[np.float64]
    """How long each of them took, from when the engine was free until its output had been handed out."""


def replay_schedule(run: StepwiseRun, prepared: Prepared) -> ScheduleReplay:
    """Go through a run; ``prepared`` is its scenario."""
    windows = build_step_time(prepared.model, prepared.gpu, prepared.engine, prepared.draft).windows
    drafts = run.drafts
    scheduler = build_scheduler(
        prepared.engine, prepared.memory, windows, one_by_one=True, accept=drafts, propose=drafts.propose
    )
    recorder = StepRecorder(scheduler)
    todo = deque(sorted(enumerate(run.requests), key=lambda one: one[1].arrival_step))
    flying: deque[tuple[RecordedStep, Plan, dict[str, Any]]] = deque()
    shapes: list[StepShape] = []

    def result(difference: str = "") -> ScheduleReplay:
        seconds = step_seconds(run)[: len(shapes)]
        return ScheduleReplay(len(run.steps), difference, tuple(shapes), seconds)

    def process() -> str:
        step, plan, record = flying.popleft()
        before = recorder.outputs(plan)
        scheduler.commit(plan, step.output_s)
        recorder.processed(record, plan, before, step.output_s)
        return _differs(step, record, _AFTER)

    for step in run.steps:
        while flying and flying[0][0].output_s <= step.start_s:
            if difference := process():
                return result(difference)
        while todo and todo[0][1].arrival_step <= step.call:
            index, request = todo.popleft()
            asked = request.request(index)
            scheduler.add(asked)
            recorder.arrived(asked, asked.arrival_s)
        plan = scheduler.plan()
        if plan is None:
            return result(f"step {step.call}: servesim has nothing to do")
        record = recorder.scheduled(plan)
        if difference := _differs(step, record, _SCHEDULED):
            return result(difference)
        shapes.append(plan.shape)
        flying.append((step, plan, record))
    while flying:
        if difference := process():
            return result(difference)
    return result()


_SCHEDULED = ("scheduled", "preempted", "running", "waiting", "free_blocks", "evicted")
_AFTER = ("finished", "free_after")


def _differs(step: RecordedStep, record: dict[str, Any], keys: tuple[str, ...]) -> str:
    """The first of ``keys`` in which the simulator's record is another than vLLM's, in words."""
    ours = {**record, "scheduled": tuple((int(name), *part) for name, part in record["sched"].items())}
    for key in keys:
        mine, real = ours[key], getattr(step, key)
        if isinstance(mine, list):
            mine = tuple(int(name) for name in mine)
        if mine != real:
            return f"step {step.call}: {key}: servesim {mine}, vLLM {real}"
    return ""


def step_seconds(run: StepwiseRun) -> NDArray[np.float64]:
    """How long every step took: it begins where the one before ended, unless the engine had nothing to do."""
    seconds, free_s, busy = [], 0.0, False
    for step in run.steps:
        begin_s = free_s if busy else step.start_s
        seconds.append(step.end_s - begin_s)
        free_s, busy = step.end_s, bool(step.waiting or step.running > len(step.finished))
    return np.array(seconds)
