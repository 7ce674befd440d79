"""How many of which GPU: configurations of replicas that serve a rate within an SLO, by price.

Bounds without simulation first (plan_bounds), then a bisection on the replicas of each configuration with one
trial each, then, for the cheapest, trials enough to say how likely a fleet keeps its SLO. Every configuration
serves the same requests under the same seeds; a trial simulates some of the replicas (plan_trials).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from servesim.analysis.intervals import Interval, student_t, t_interval
from servesim.analysis.plan_bounds import Analytic, Traffic
from servesim.analysis.plan_constraint import first_constraint
from servesim.analysis.plan_trials import Trial, TrialTask
from servesim.config.load import LoadedScenario
from servesim.config.scenario import Router
from servesim.errors import ServesimError

__all__ = ["CHANCE", "Candidate", "Fleet", "Plan", "PlanQuestion", "make_plan"]

CHANCE = 0.9
"""Chance with which a fleet that is said to keep its SLO does so under a fresh seed."""
LOOKS = (4, 8)
"""Trials after which a fleet is looked at; the first look is enough where it decides."""
_COUNTED = 2500  # requests of a trial, about
_DEARER = 1.5  # how much dearer than the best so far a fleet may be to be looked at further
_CONTENDERS = 3
_MOST_REPLICAS = 4096

Run = Callable[[Sequence[TrialTask]], Sequence[Trial]]
Verdict = Literal["kept", "missed", "undecided"]
Search = Generator[list[TrialTask], Sequence[Trial], None]


class PlanQuestion(NamedTuple):
    """What is asked for."""

    rate_per_s: float
    router: Router
    budget_usd_per_hour: float | None
    prices_usd_per_hour: Mapping[str, float]
    """By GPU, instead of those in its file."""
    traffic: Traffic

    @property
    def factor(self) -> float:
        """The rate over the scenario's own."""
        return self.rate_per_s / self.traffic.rate_per_s


@dataclass(frozen=True, slots=True)
class Fleet:
    """So many replicas of a configuration, tried."""

    replicas: int
    trials: tuple[Trial, ...]

    def p99_s(self, name: str) -> Interval:
        """The mean P99 of a latency over the trials."""
        return t_interval([one.p99_s[name] for one in self.trials])

    @property
    def verdict(self) -> Verdict:
        """kept: a fresh trial keeps the SLO with a chance of CHANCE (a one-sided bound of prediction)."""
        ratios = [one.attained for one in self.trials]
        stable = [one.is_stable for one in self.trials]
        mean = sum(ratios) / len(ratios)
        if len(ratios) < 2:
            return "kept" if mean <= 1 and all(stable) else "missed"
        square = sum((one - mean) ** 2 for one in ratios) / (len(ratios) - 1)
        reach = student_t(2 * CHANCE - 1, len(ratios) - 1) * math.sqrt(square * (1 + 1 / len(ratios)))
        if all(stable) and mean + reach <= 1:
            return "kept"
        return "missed" if 2 * sum(stable) < len(stable) or mean - reach > 1 else "undecided"


@dataclass
class Candidate:
    """A configuration of one replica and what is found of it; filled in as the search goes on."""

    label: dict[str, str]
    """By what varies: hardware.gpu, engine.tensor_parallel_size, ..."""
    analytic: Analytic
    gpu: str = ""
    gpus_per_replica: int = 0
    usd_per_replica_hour: float | None = None
    lost: str = ""
    """Why it is not in the ranking; empty when it is."""
    least: int = 0
    """Replicas that the mean load needs: no fewer can do."""
    fleet: Fleet | None = None
    """The smallest that keeps the SLO, as far as is known."""
    smaller: Fleet | None = None
    """One replica fewer."""
    breaks_at_per_s: tuple[float, float] | None = None
    """Between these rates the fleet's SLO breaks."""
    constraint: str = ""
    rank: int = 0
    tried: dict[int, Fleet] = field(default_factory=dict)

    @property
    def usd_per_hour(self) -> float | None:
        """Of the fleet."""
        return None if self.fleet is None else self.price(self.fleet.replicas)

    def price(self, replicas: int) -> float | None:
        """Of so many replicas."""
        return None if self.usd_per_replica_hour is None else replicas * self.usd_per_replica_hour

    @property
    def weight(self) -> float:
        """What is ranked by: dollars, or GPUs where there are no prices."""
        replicas = self.fleet.replicas if self.fleet else self.least
        return replicas * self.unit

    @property
    def unit(self) -> float:
        """What one replica adds to it."""
        return self.gpus_per_replica if self.usd_per_replica_hour is None else self.usd_per_replica_hour


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
    counter = _Counter(run)
    state = _State()
    _side_by_side([_screen(one, question, state) for one in alive], counter)
    found = sorted((one for one in alive if one.fleet), key=lambda one: one.weight)
    if found:
        best = found[0].weight
        contenders = [one for one in found if one.weight <= _DEARER * best][:_CONTENDERS]
        _side_by_side([_confirm(one, question) for one in contenders], counter)
        contenders = [one for one in contenders if one.fleet]
        _side_by_side([_headroom(one, question) for one in contenders], counter)
        _rank(found, contenders)
    ordered = sorted(candidates, key=lambda one: (not one.rank, one.rank, one.fleet is None, one.weight))
    return Plan(scenario, question, tuple(ordered), counter.count)


class _State:
    cheapest = math.inf


class _Counter:
    def __init__(self, run: Run) -> None:
        self._run, self.count = run, 0

    def __call__(self, tasks: Sequence[TrialTask]) -> Sequence[Trial]:
        self.count += len(tasks)
        return self._run(tasks)


def _side_by_side(searches: Sequence[Search], run: Run) -> None:
    """Let every search go on by a step at a time, the trials of all of them simulated together."""
    asking: list[tuple[Search, list[TrialTask]]] = []
    for search in searches:
        tasks = next(search, None)
        if tasks is not None:
            asking.append((search, tasks))
    while asking:
        found = list(run([task for _, tasks in asking for task in tasks]))
        still: list[tuple[Search, list[TrialTask]]] = []
        for search, tasks in asking:
            mine, found = found[: len(tasks)], found[len(tasks) :]
            try:
                still.append((search, search.send(mine)))
            except StopIteration:
                continue
        asking = still


# ---- without simulation ----------------------------------------------------------------------------


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
    most = 0.0 if law_alone else analytic.most_rate_per_s()
    if not most:
        one.lost = law_alone or "not even one request runs within the TPOT limit"
        return
    one.least = math.ceil(question.rate_per_s / most)
    too_dear = _over_budget(one, one.least, question)
    if one.least > _MOST_REPLICAS:
        one.lost = f"needs more than {_MOST_REPLICAS:,} replicas"
    elif too_dear:
        one.lost = f"{too_dear}: the mean load alone takes {one.least:,} replicas"


def _over_budget(one: Candidate, replicas: int, question: PlanQuestion) -> str:
    price, budget = one.price(replicas), question.budget_usd_per_hour
    if budget is None or price is None or price <= budget:
        return ""
    return f"${price:,.0f}/h is over the budget"


# ---- the smallest fleet ----------------------------------------------------------------------------


def _tasks(
    one: Candidate, question: PlanQuestion, replicas: int, seeds: range, load: float = 1.0
) -> list[TrialTask]:
    simulated = min(replicas, math.ceil(_COUNTED * replicas / question.traffic.num_requests))
    loaded, first = one.analytic.loaded, one.analytic.loaded.scenario.seed
    return [
        TrialTask(loaded, question.factor * load, replicas, simulated, question.router, first + seed)
        for seed in seeds
    ]


def _screen(one: Candidate, question: PlanQuestion, state: _State) -> Search:
    """The smallest fleet that keeps the SLO in one trial."""
    low = one.least - 1
    likely = one.analytic.likely_rate_per_s()
    replicas = max(one.least, math.ceil(question.rate_per_s / likely)) if likely else 2 * one.least
    high: int | None = None
    while high is None or high - low > 1:
        most = _most(one, question, state)
        if high is None and low >= most:
            one.lost = _why_dear(one, low, question)
            return
        replicas = replicas if high is not None else min(replicas, most)
        trials = yield _tasks(one, question, replicas, range(1))
        fleet = one.tried[replicas] = Fleet(replicas, tuple(trials))
        if fleet.verdict == "kept":
            high, one.fleet = replicas, fleet
            state.cheapest = min(state.cheapest, replicas * one.unit)
        else:
            low = replicas
        # Far off, P99s fall faster than with the replicas.
        further = min(1.6, max(1.15, fleet.trials[0].attained ** 0.4))
        replicas = math.ceil(low * further) if high is None else (low + high) // 2


def _most(one: Candidate, question: PlanQuestion, state: _State) -> int:
    """Replicas that the budget, and what is known of the others, allow."""
    most = _MOST_REPLICAS
    if state.cheapest < math.inf:
        most = min(most, math.floor(_DEARER * state.cheapest / one.unit + 1e-9))
    if question.budget_usd_per_hour is not None and one.usd_per_replica_hour:
        most = min(most, math.floor(question.budget_usd_per_hour / one.usd_per_replica_hour + 1e-9))
    return most


def _why_dear(one: Candidate, missed: int, question: PlanQuestion) -> str:
    fleet = one.tried.get(missed)
    miss = "" if fleet is None else _miss(fleet)
    if _over_budget(one, missed + 1, question):
        return f"over the budget{miss}"
    if missed >= _MOST_REPLICAS:
        return f"needs more than {_MOST_REPLICAS:,} replicas{miss}"
    return f"more than {_DEARER:g} times as dear as the best{miss}"


def _miss(fleet: Fleet) -> str:
    trial = fleet.trials[0]
    if not trial.is_stable:
        return f"; with {fleet.replicas:,} replicas the queue grows without end"
    return f"; {fleet.replicas:,} replicas reach {trial.attained:.0%} of the {trial.worst.upper()} limit"


def _confirm(one: Candidate, question: PlanQuestion) -> Search:
    """The smallest fleet that keeps the SLO with the asked chance, by trials of it and its neighbour."""
    assert one.fleet is not None
    start, fleets = one.fleet.replicas, dict[int, Fleet]()
    one.fleet = None
    asked = [start, start - 1] if start > one.least else [start]
    for stride in (1, 1, 2, 4, 8, 16, 32, 64):
        while asked := [size for size in asked if _wants_more(fleets.get(size))]:
            tasks = {size: _tasks(one, question, size, _next_look(fleets.get(size))) for size in asked}
            found = list((yield [task for of in tasks.values() for task in of]))
            for size, of in tasks.items():
                before = fleets[size].trials if size in fleets else ()
                fleets[size] = Fleet(size, (*before, *found[: len(of)]))
                found = found[len(of) :]
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
    elif dear := _over_budget(one, one.fleet.replicas, question):
        one.lost, one.fleet = dear, None


def _wants_more(fleet: Fleet | None) -> bool:
    return fleet is None or (fleet.verdict == "undecided" and len(fleet.trials) < LOOKS[-1])


def _next_look(fleet: Fleet | None) -> range:
    """The seeds of the trials to come."""
    done = len(fleet.trials) if fleet else 0
    return range(done, next(look for look in LOOKS if look > done))


def _headroom(one: Candidate, question: PlanQuestion) -> Search:
    """At which rate the fleet's SLO breaks, and on what."""
    assert one.fleet is not None
    replicas = one.fleet.replicas
    # The mean load breaks it for sure; one replica fewer at the asked rate says where to look first.
    surely = replicas * one.analytic.most_rate_per_s() / question.rate_per_s
    low, high = 1.0, min(surely, replicas / (replicas - 1) * 1.1) if replicas > 1 else surely
    breach: Trial | None = None
    for _ in range(6):
        load = high if breach is None and replicas > 1 else (low * high) ** 0.5
        trials = yield _tasks(one, question, replicas, range(2), load)
        if all(trial.is_stable for trial in trials) and sum(x.attained for x in trials) <= len(trials):
            low, high = load, max(high, load * (1.0 if breach or replicas == 1 else 1.3))
        else:
            high, breach = load, max(trials, key=lambda trial: trial.attained)
        if breach is not None and high / low < 1.03:
            break
    reached = breach is not None
    one.breaks_at_per_s = (low * question.rate_per_s, high * question.rate_per_s if reached else math.inf)
    if breach is not None:
        one.constraint = first_constraint(one.analytic, breach)


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
