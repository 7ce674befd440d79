"""How many of which GPU: configurations of replicas that serve a rate within an SLO, by price.

Bounds without simulation first (plan_bounds), then a search for the smallest fleet of each configuration with
one trial for each number of replicas, begun at a guess (plan_guess), then, for the cheapest, trials enough to
say how likely a fleet keeps its SLO (plan_search). Every configuration serves the same requests under the
same seeds; a trial simulates some of the replicas (plan_trials).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from servesim.analysis.plan_fleet import MOST_REPLICAS, Candidate, PlanQuestion
from servesim.analysis.plan_guess import likely_replicas
from servesim.analysis.plan_search import DEARER, Run, State, screen, settle, side_by_side
from servesim.analysis.plan_trials import Trial, TrialTask
from servesim.config.load import LoadedScenario
from servesim.errors import Problem, ServesimError, StudyError

__all__ = ["Plan", "make_plan"]

_CONTENDERS = 3


class Plan(NamedTuple):
    """The answer: ranked configurations first, then those that lost."""

    scenario: LoadedScenario
    question: PlanQuestion
    candidates: tuple[Candidate, ...]
    simulations: int


def make_plan(
    scenario: LoadedScenario, question: PlanQuestion, candidates: Sequence[Candidate], run: Run
) -> Plan:
    """Search the candidates; ``run`` simulates trials side by side and keeps their order."""
    for one in candidates:
        _bound(one, question)
    alive = [one for one in candidates if not one.lost]
    _refuse_unpriced(alive, question)
    counter = _Counter(run)
    state = State(alive)
    # The likely cheapest first: what they find bounds the others in the same round.
    alive.sort(key=lambda one: one.likely * one.unit)
    side_by_side([screen(one, question, state) for one in alive], counter)
    found = sorted((one for one in alive if one.fleet), key=lambda one: one.weight)
    _rank(found, _settled(found, question, counter))
    return Plan(scenario, question, tuple(sorted(candidates, key=_place)), counter.count)


def _settled(found: Sequence[Candidate], question: PlanQuestion, run: Run) -> list[Candidate]:
    """Those that keep the SLO when looked at closely: a few, until none that is left is cheaper."""
    left, sure = list(found), list[Candidate]()
    while left and left[0].weight < min((one.weight for one in sure), default=math.inf):
        contenders = [one for one in left[:_CONTENDERS] if one.weight <= DEARER * left[0].weight]
        left = left[len(contenders) :]
        side_by_side([settle(one, question) for one in contenders], run)
        sure += [one for one in contenders if one.fleet]
    return sure


def _place(one: Candidate) -> tuple[bool, int, bool, bool, float]:
    """The ranked first, then what keeps the SLO, then what was tried, each by price."""
    return not one.rank, one.rank, one.fleet is None, not one.tried, one.weight


class _Counter:
    def __init__(self, run: Run) -> None:
        self._run, self.count = run, 0

    def __call__(self, tasks: Sequence[TrialTask]) -> Sequence[Trial]:
        """The longest first, so that no core waits for one at the end of a round."""
        self.count += len(tasks)
        order = sorted(
            range(len(tasks)), key=lambda number: -tasks[number].simulated / tasks[number].replicas
        )
        trials = self._run([tasks[number] for number in order]) if tasks else ()
        found = dict(zip(order, trials, strict=True))
        return [found[number] for number in range(len(tasks))]


def _bound(one: Candidate, question: PlanQuestion) -> None:
    analytic = one.analytic
    try:
        prepared = analytic.prepared
        law_alone = analytic.alone()
    except ServesimError as error:
        one.lost = error.problems[0].problem
        return
    engine = prepared.engine
    one.gpu = prepared.gpu.label
    one.gpus_per_replica = engine.tensor_parallel_size * engine.pipeline_parallel_size
    price = question.prices_usd_per_hour.get(prepared.gpu.name, prepared.gpu.price_per_hour_usd)
    if price is not None:
        one.usd_per_replica_hour = price * one.gpus_per_replica
    if law_alone:
        one.lost = law_alone
        return
    one.least = math.ceil(question.rate_per_s / analytic.most_rate_per_s())
    too_dear = one.over_budget(one.least, question)
    if one.least > MOST_REPLICAS:
        one.lost = f"needs more than {MOST_REPLICAS:,} replicas"
    elif too_dear:
        one.lost = f"{too_dear}: the mean load alone takes {one.least:,} replicas"
    else:
        one.likely = likely_replicas(one.analytic, one.least, MOST_REPLICAS, question.rate_per_s)


def _refuse_unpriced(candidates: Sequence[Candidate], question: PlanQuestion) -> None:
    """Raise StudyError where dollars would be compared with GPUs, or with no dollars at all."""
    unpriced = sorted(
        {one.analytic.prepared.gpu.name for one in candidates if one.usd_per_replica_hour is None}
    )
    some = len(unpriced) and any(one.usd_per_replica_hour is not None for one in candidates)
    if some or (unpriced and question.budget_usd_per_hour is not None):
        step = "give one: " + " ".join(f"--price {gpu}=USD" for gpu in unpriced)
        what = "the others are ranked by price" if some else "there is a budget"
        got = ", ".join(unpriced)
        raise StudyError(Problem(f"a GPU without a price, where {what}", got=got, next_step=step))


# ---- the ranking -----------------------------------------------------------------------------------


def _rank(found: Sequence[Candidate], contenders: Sequence[Candidate]) -> None:
    """By price; equal ranks where what is not decided about the numbers of replicas lets prices overlap."""
    ranked = sorted(contenders, key=lambda one: one.weight)
    for place, one in enumerate(ranked):
        above = ranked[place - 1] if place else None
        overlaps = above is not None and _cheapest(one) <= above.weight
        one.rank = above.rank if above is not None and overlaps else place + 1
    if not ranked:
        return
    for one in found:
        if one.fleet is not None and one not in contenders:
            one.lost = f"{one.weight / ranked[0].weight:.1f} times as dear as the best"


def _cheapest(one: Candidate) -> float:
    """What it may cost if the next smaller fleet, about which the trials do not decide, will do."""
    undecided = one.smaller is not None and one.smaller.verdict == "undecided"
    return one.weight - (one.unit if undecided else 0.0)
