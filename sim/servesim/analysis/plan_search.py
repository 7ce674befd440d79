"""The searches of a plan: the smallest fleet, how sure it is, its headroom; generators that ask for trials.

P99s fall with the replicas, and rise with the load, about as a power. The next number or load to try is where
the line through the nearest trials reaches the limit, in logarithms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence

from servesim.analysis.plan_constraint import first_constraint
from servesim.analysis.plan_fleet import CHANCE, LOOKS, MOST_REPLICAS, Candidate, Fleet, PlanQuestion
from servesim.analysis.plan_trials import Trial, TrialTask, simulated_replicas

__all__ = ["DEARER", "Run", "State", "screen", "settle", "side_by_side"]

DEARER = 1.5
"""How much dearer than the best so far a fleet may be to be looked at further."""
_LEADING = 1.2  # how much dearer than the best guess a guess may be to be tried in the first round
_STEEPNESS = 2.0  # power with which P99s fall with the replicas, until two trials tell
_BRACKET = 1.05  # of the rate at which the SLO breaks
_MOST_ROUNDS = 8  # to find it

Run = Callable[[Sequence[TrialTask]], Sequence[Trial]]
Search = Generator[list[TrialTask], Sequence[Trial], None]


class State:
    """What the searches of a plan know of one another."""

    def __init__(self, candidates: Iterable[Candidate]) -> None:
        self.likely = min((one.likely * one.unit for one in candidates), default=math.inf)
        self.cheapest = math.inf

    def leads(self, one: Candidate) -> bool:
        """Whether it may well be the cheapest; the others wait until that is known."""
        return one.likely * one.unit <= _LEADING * self.likely


def side_by_side(searches: Iterable[Search], run: Run) -> None:
    """Let every search go on by a step at a time, the trials of all of them simulated together.

    So each knows of the others what the rounds before found, however many cores there are.
    """
    asking = [(search, next(search, None)) for search in searches]
    while still := [(search, tasks) for search, tasks in asking if tasks is not None]:
        found = iter(run([task for _, tasks in still for task in tasks]))
        asking = [(search, _send(search, [next(found) for _ in tasks])) for search, tasks in still]


def _send(search: Search, found: list[Trial]) -> list[TrialTask] | None:
    try:
        return search.send(found)
    except StopIteration:
        return None


def _tasks(
    one: Candidate, question: PlanQuestion, replicas: int, seeds: range, load: float = 1.0
) -> list[TrialTask]:
    simulated = simulated_replicas(replicas, question.traffic.num_requests, question.router)
    loaded, first = one.analytic.loaded, one.analytic.loaded.scenario.seed
    return [
        TrialTask(loaded, question.factor * load, replicas, simulated, question.router, first + seed)
        for seed in seeds
    ]


def _breaking_point(attained: Mapping[float, float]) -> float:
    """The load at which what is attained, by load, reaches 1: between two trials, or beyond the nearest."""
    kept = max((load for load, of in attained.items() if of <= 1), default=0.0)
    missed = min((load for load, of in attained.items() if of > 1 and load > kept), default=math.inf)
    ends = [load for load in (kept, missed) if 0 < load < math.inf]
    near = ends if len(ends) == 2 else sorted(attained, key=lambda load: abs(math.log(attained[load])))[:2]
    steepness = _STEEPNESS
    if len(near) == 2:
        rise = math.log(attained[near[1]] / attained[near[0]]) / math.log(near[1] / near[0])
        steepness = min(8.0, max(1.0, rise))
    factor = math.exp(-math.log(attained[near[0]]) / steepness)
    return near[0] * min(4.0, max(0.25, factor))


# ---- the smallest fleet ----------------------------------------------------------------------------


def screen(one: Candidate, question: PlanQuestion, state: State) -> Search:
    """The smallest fleet that keeps the SLO in one trial; ``lost`` where others are far cheaper."""
    low, high = one.least - 1, MOST_REPLICAS + 1
    asked = [one.likely]
    if state.leads(one):
        asked = [one.likely, one.likely + 1]
    else:
        yield []
    while high - low > 1:
        most = _most(one, question, state)
        if one.fleet is None and low >= most:
            one.lost = _why_dear(one, low, question)
            return
        bound = most if one.fleet is None else high - 1
        asked = sorted({min(bound, max(low + 1, size)) for size in asked})
        tasks = [_tasks(one, question, size, range(1))[0] for size in asked]
        for size, trial in zip(asked, (yield tasks), strict=True):
            one.tried[size] = Fleet(size, (trial,))
        for size in asked:
            if one.tried[size].verdict == "kept":
                high, one.fleet = size, one.tried[size]
                state.cheapest = min(state.cheapest, size * one.unit)
                break
            low = size
        size = math.ceil(1 / _breaking_point({1 / size: _attained(of) for size, of in one.tried.items()}))
        # However wrong the line is: the search grows faster and faster, or leaves a quarter on either side.
        stride = 2 ** (len(one.tried) // 2)
        if one.fleet is None:
            asked = [max(size, low + stride)]
        elif low in one.tried:
            quarter = max(1, (high - low) // 4)
            asked = [min(high - quarter, max(low + quarter, size))]
        else:
            asked = [min(high - stride, size)]


def _attained(fleet: Fleet) -> float:
    """Above 1 also where the queue grows to the end."""
    return fleet.attained if fleet.verdict == "kept" else max(1.05, fleet.attained)


def _most(one: Candidate, question: PlanQuestion, state: State) -> int:
    """Replicas that the budget, and what is known of the others, allow."""
    most = MOST_REPLICAS
    if state.cheapest < math.inf:
        most = min(most, math.floor(DEARER * state.cheapest / one.unit + 1e-9))
    if question.budget_usd_per_hour is not None and one.usd_per_replica_hour:
        most = min(most, math.floor(question.budget_usd_per_hour / one.usd_per_replica_hour + 1e-9))
    return most


def _why_dear(one: Candidate, missed: int, question: PlanQuestion) -> str:
    fleet = one.tried.get(missed)
    miss = _miss(fleet) if fleet else f": the mean load alone takes {one.least:,} replicas"
    if one.over_budget(missed + 1, question):
        return f"over the budget{miss}"
    if missed >= MOST_REPLICAS:
        return f"needs more than {MOST_REPLICAS:,} replicas{miss}"
    return f"more than {DEARER:g} times as dear as the best{miss}"


def _miss(fleet: Fleet) -> str:
    trial = fleet.trials[0]
    if not trial.is_stable:
        return f"; with {fleet.replicas:,} replicas the queue grows without end"
    return f"; {fleet.replicas:,} replicas reach {trial.attained:.0%} of the {trial.worst.upper()} limit"


# ---- how sure it is --------------------------------------------------------------------------------


def settle(one: Candidate, question: PlanQuestion) -> Search:
    """The smallest fleet that keeps the SLO with the asked chance, then the rate at which it breaks."""
    yield from _confirm(one, question)
    if one.fleet is not None:
        yield from _headroom(one, question)


def _confirm(one: Candidate, question: PlanQuestion) -> Search:
    """Trials of a fleet and of its smaller neighbour until both are decided.

    The trial that chose the fleet's size is none of them: it was chosen for being kept.
    """
    assert one.fleet is not None
    start, fleets = one.fleet.replicas, dict[int, Fleet]()
    one.fleet = None
    asked = [start, start - 1] if start > one.least else [start]
    for stride in (1, 1, 2, 4, 8, 16, 32, 64):
        fleets |= {size: Fleet(size, ()) for size in asked}
        while asked := [size for size in asked if fleets[size].wants_more]:
            tasks = {size: _tasks(one, question, size, _next_look(fleets[size])) for size in asked}
            found = iter((yield [task for of in tasks.values() for task in of]))
            for size, of in tasks.items():
                fleets[size] = Fleet(size, (*fleets[size].trials, *(next(found) for _ in of)))
        high = min((size for size, of in fleets.items() if of.verdict == "kept"), default=None)
        low = max((size for size in fleets if high is None or size < high), default=one.least - 1)
        if high is not None and high - low == 1:
            one.fleet, one.smaller = fleets[high], fleets.get(low)
            break
        if high is None:
            asked = [low + stride]
        elif low in fleets:
            asked = [(low + high) // 2]
        else:
            asked = [max(one.least, high - stride)]
    if one.fleet is None:
        one.lost = f"no fleet near {start:,} replicas keeps the SLO with a chance of {CHANCE:.0%}"
    elif dear := one.over_budget(one.fleet.replicas, question):
        one.lost, one.fleet = dear, None


def _next_look(fleet: Fleet) -> range:
    """The seeds of the trials to come, after the one that chose the size."""
    done = len(fleet.trials)
    return range(1 + done, 1 + next(look for look in LOOKS if look > done))


# ---- headroom --------------------------------------------------------------------------------------


def _headroom(one: Candidate, question: PlanQuestion) -> Search:
    """At which rate the fleet's SLO breaks, in the mean of two trials, and on what."""
    assert one.fleet is not None
    replicas = one.fleet.replicas
    # One replica fewer is what a higher load on as many is.
    fleets = [Fleet(of.replicas, of.trials[:2]) for of in (one.fleet, one.smaller) if of]
    near = {replicas / of.replicas: of.attained for of in fleets}
    attained = {1.0: near[1.0]}
    low, high, breach, reach = 1.0, math.inf, None, 0.25
    for _ in range(_MOST_ROUNDS):
        middle = _breaking_point(attained if len(attained) > 1 else near)
        if math.isinf(high):
            middle, reach = max(middle, low * _BRACKET**reach), 2 * reach
        else:
            quarter = (high / low) ** 0.25
            middle = min(high / quarter, max(low * quarter, middle))
        loads = [
            load for load in (middle / _BRACKET**0.5, middle * _BRACKET**0.5) if low * 1.001 < load < high
        ]
        tasks = [task for load in loads for task in _tasks(one, question, replicas, range(1, 3), load)]
        found = iter((yield tasks))
        for load in loads:
            trials = (next(found), next(found))
            if load > high:
                break  # the lower of the two missed: what the upper does is luck
            attained[load] = sum(trial.attained for trial in trials) / 2
            if attained[load] <= 1 and all(trial.is_stable for trial in trials):
                low = load
            else:
                attained[load] = max(1.01, attained[load])
                high, breach = load, max(trials, key=lambda trial: trial.attained)
        if high / low < _BRACKET * 1.001:
            break
    one.breaks_at_per_s = (low * question.rate_per_s, high * question.rate_per_s)
    if breach is not None:
        one.constraint = first_constraint(one.analytic, breach)
