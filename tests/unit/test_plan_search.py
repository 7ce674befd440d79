"""The searches of a plan, on trials that are made up."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import replace

from servesim.analysis.plan import _rank, _settled
from servesim.analysis.plan_bounds import Analytic
from servesim.analysis.plan_fleet import Candidate, Fleet, PlanQuestion
from servesim.analysis.plan_search import _headroom, settle
from servesim.analysis.plan_setup import traffic_in
from servesim.analysis.plan_trials import Trial, TrialTask
from servesim.config.load import load_scenario
from servesim.cost.step_time import StepShape

LOADED = load_scenario("poisson-chat", ["workload.sessions=null", "workload.num_requests=100"])
TRAFFIC = traffic_in(LOADED)
QUESTION = PlanQuestion(TRAFFIC.rate_per_s, "round-robin", None, {}, TRAFFIC)
"""Of which a load of 1 is the scenario's own."""


def trial(attained: float, is_stable: bool = True) -> Trial:
    shape = StepShape(1, (100,), (), 1)
    return Trial({"ttft": 0.1, "tpot": 0.01, "e2e": 1.0}, attained, "tpot", is_stable, 2000, 0.0, 0.0, shape)


def candidate(usd: float = 1.0, name: str = "") -> Candidate:
    loaded = replace(LOADED, scenario=LOADED.scenario.model_copy(update={"name": name}))
    one = Candidate({"hardware.gpu": name}, Analytic(loaded, TRAFFIC, loaded.scenario.slo))
    one.usd_per_replica_hour, one.gpus_per_replica, one.least = usd, 1, 1
    return one


Search = Generator[list[TrialTask], Sequence[Trial], None]


def drive(search: Search, attained: Callable[[TrialTask], float]) -> list[TrialTask]:
    """Run a search to its end; returns the trials that it asked for."""
    asked, tasks = list[TrialTask](), next(search)
    while True:
        asked += tasks
        try:
            tasks = search.send([trial(attained(task)) for task in tasks])
        except StopIteration:
            return asked


def test_a_load_that_is_kept_by_luck_beyond_a_missed_one_does_not_turn_the_bracket_round() -> None:
    one = candidate()
    one.fleet = Fleet(4, (trial(0.8),) * 4)
    drive(_headroom(one, QUESTION), lambda task: 1.1 if 1.05 < task.factor < 1.11 else 0.9)
    assert one.breaks_at_per_s is not None
    low, high = one.breaks_at_per_s
    assert low < high


def test_the_trial_that_chose_the_size_does_not_speak_for_it() -> None:
    one = candidate()
    one.tried = {size: Fleet(size, (trial(0.5),)) for size in (3, 4)}
    one.fleet = one.tried[4]
    asked = drive(settle(one, QUESTION), lambda task: task.factor * 3.5 / task.replicas)
    assert {task.seed - LOADED.scenario.seed for task in asked} == {1, 2, 3, 4}
    assert one.fleet is not None
    assert (one.fleet.replicas, one.fleet.kept, len(one.fleet.trials)) == (4, 4, 4)
    assert one.smaller is not None
    assert one.smaller.kept == 0


def test_others_are_looked_at_while_those_that_looked_cheapest_fail() -> None:
    def settled() -> list[Candidate]:
        found = [candidate(usd, name) for usd, name in zip((1.0, 1.1, 1.2, 1.3, 9.0), "abcde", strict=True)]
        for one in found:
            one.tried[4] = one.fleet = Fleet(4, (trial(0.9),))
        _rank(found, _settled(found, QUESTION, lambda tasks: [trial(attained(task)) for task in tasks]))
        return found

    def attained(task: TrialTask) -> float:
        return 1.5 if task.loaded.scenario.name in failing else task.factor * 3.5 / task.replicas

    failing = ""
    assert [one.rank for one in settled()] == [1, 2, 3, 0, 0]
    failing = "abc"
    found = settled()
    assert [one.rank for one in found] == [0, 0, 0, 1, 0]
    assert all(one.rank or one.lost for one in found)
    failing = "abcde"
    assert all("no fleet near 4 replicas" in one.lost for one in settled())


def test_a_fleet_that_must_grow_is_compared_with_those_not_yet_looked_at() -> None:
    found = [candidate(usd, name) for usd, name in zip((1.0, 1.0, 1.0, 1.1), "abcd", strict=True)]
    for one in found:
        one.tried[4] = one.fleet = Fleet(4, (trial(0.9),))

    def attained(task: TrialTask) -> float:
        needed = 3.5 if task.loaded.scenario.name == "d" else 7.5
        return task.factor * needed / task.replicas

    _rank(found, _settled(found, QUESTION, lambda tasks: [trial(attained(task)) for task in tasks]))
    assert [one.rank for one in found] == [2, 2, 2, 1]
