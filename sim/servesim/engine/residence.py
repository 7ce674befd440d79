"""Which steps a request spends how: noted beside a scheduler for those who ask, at no cost to the others."""

from __future__ import annotations

from array import array
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from servesim.cost.step_time import StepShape
from servesim.engine.scheduler import Scheduler
from servesim.engine.state import Plan, RequestState
from servesim.workload.request import Request

__all__ = ["Residence", "note_residence"]

Table: TypeAlias = NDArray[np.int64]


class _Notes:
    """Rows of integers."""

    def __init__(self, width: int) -> None:
        self._width = width
        self._numbers = array("q")
        self.add = self._numbers.extend

    @property
    def table(self) -> Table:
        """Rows by columns."""
        return np.array(self._numbers, dtype=np.int64).reshape(-1, self._width)


class Residence:
    """What the log does not say of a request: all that does not follow from "it decodes in every step".

    Steps are numbered as the scheduler plans them; the rows of StepLog hold them in that order. A request is
    Request.index.
    """

    def __init__(self) -> None:
        self.shapes: dict[int, StepShape] = {}
        """By step, where somebody is treated alone; all other steps are of the decode group."""
        self._arrivals, self._admissions = _Notes(2), _Notes(2)
        self._prefills, self._chunks = _Notes(2), _Notes(5)
        self._preemptions, self._absences = _Notes(2), _Notes(3)

    @property
    def arrivals(self) -> Table:
        """(request, first step that can consider it)."""
        return self._arrivals.table

    @property
    def admissions(self) -> Table:
        """(request, step), the first of a request only."""
        return self._admissions.table

    @property
    def prefills(self) -> Table:
        """(request, step that computes the last token it lacks), also after preemptions."""
        return self._prefills.table

    @property
    def chunks(self) -> Table:
        """(request, step, tokens, computed before, yields a token), of prefills that follow no preemption."""
        return self._chunks.table

    @property
    def preemptions(self) -> Table:
        """(request, first step without it)."""
        return self._preemptions.table

    @property
    def absences(self) -> Table:
        """(request, step, decodes already): running, left out by a step, and not recomputing."""
        return self._absences.table


def note_residence(scheduler: Scheduler) -> Residence:
    """Let a scheduler note it from now on."""
    notes, prefilling = Residence(), set[RequestState]()
    add, make_plan, make_plan_beside_group = scheduler.add, scheduler.plan, scheduler.plan_beside_group

    def noted_add(request: Request) -> RequestState:
        notes._arrivals.add((request.index, scheduler.step))
        return add(request)

    def noted(plan: Plan | None) -> Plan | None:
        if plan is not None:
            if plan.scheduled:
                notes.shapes[plan.step] = plan.shape
            _note(notes, plan, prefilling)
            left_out = plan.running - plan.num_draining - plan.group_size - len(plan.scheduled)
            if left_out > 0:
                _note_absent(notes, plan, scheduler, prefilling)
        return plan

    def noted_plan() -> Plan | None:
        return noted(make_plan())

    def noted_plan_beside_group(draining: int, pending: bool) -> Plan | None:
        return noted(make_plan_beside_group(draining, pending))

    hooks = {
        "add": noted_add,
        "plan": noted_plan,
        "newcomer": lambda: None,  # is let in by a plan, to be noted
        "plan_beside_group": noted_plan_beside_group,
    }
    for name, hook in hooks.items():
        setattr(scheduler, name, hook)
    return notes


def _note(notes: Residence, plan: Plan, prefilling: set[RequestState]) -> None:
    step = plan.step
    for request in plan.preempted:
        notes._preemptions.add((request.request.index, step))
        prefilling.discard(request)
    for request in plan.admitted:
        if not request.num_preemptions:
            notes._admissions.add((request.request.index, step))
        prefilling.add(request)
    if not prefilling:
        return
    yielding = set(plan.yielding)
    for request, tokens, before in plan.scheduled:
        if request in prefilling:
            index, ends = request.request.index, request in yielding
            if not request.num_preemptions:
                notes._chunks.add((index, step, tokens, before, ends))
            if ends:
                notes._prefills.add((index, step))
                prefilling.remove(request)


def _note_absent(notes: Residence, plan: Plan, scheduler: Scheduler, prefilling: set[RequestState]) -> None:
    present = {request for request, _, _ in plan.scheduled}
    present.update(plan.finishing)
    for request in scheduler.running:
        if request.grouped or request in present:
            continue
        computing = request in prefilling
        if not (computing and request.num_preemptions):
            notes._absences.add((request.request.index, plan.step, not computing))
