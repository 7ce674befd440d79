"""What a plan is about: the question, fleets with their trials, configurations with what is found of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from servesim.analysis.bisection import Verdict
from servesim.analysis.intervals import Interval, student_t, t_interval
from servesim.analysis.plan_bounds import Analytic, Traffic
from servesim.analysis.plan_trials import Trial
from servesim.config.scenario import Router

__all__ = ["CHANCE", "LOOKS", "MOST_REPLICAS", "Candidate", "Fleet", "PlanQuestion"]

CHANCE = 0.9
"""Chance with which a fleet that is said to keep its SLO does so under a fresh seed."""
LOOKS = (4, 8)
"""Trials after which a fleet, or a rate, is looked at; the first look is enough where it decides."""
MOST_REPLICAS = 4096


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
    def kept(self) -> int:
        """Trials that keep the SLO, all its limits at once."""
        return sum(one.keeps for one in self.trials)

    @property
    def attained(self) -> float:
        """The mean of the trials' worst P99 over its limit."""
        return sum(one.attained for one in self.trials) / len(self.trials)

    @property
    def verdict(self) -> Verdict:
        """kept: a fresh trial keeps the SLO with a chance of CHANCE (a one-sided bound of prediction).

        missed: that bound is beyond the limit on the other side, or a fleet with this chance would keep the
        SLO in no more of the trials in fewer than 1 - CHANCE of all cases.
        """
        count, mean = len(self.trials), self.attained
        is_stable = all(one.is_stable for one in self.trials)
        if count < 2:
            return "kept" if mean <= 1 and is_stable else "missed"
        square = sum((one.attained - mean) ** 2 for one in self.trials) / (count - 1)
        reach = student_t(2 * CHANCE - 1, count - 1) * math.sqrt(square * (1 + 1 / count))
        if is_stable and mean + reach <= 1:
            return "kept"
        so_few = sum(
            math.comb(count, kept) * CHANCE**kept * (1 - CHANCE) ** (count - kept)
            for kept in range(self.kept + 1)
        )
        return "missed" if mean - reach > 1 or so_few < 1 - CHANCE else "undecided"

    @property
    def wants_more(self) -> bool:
        """Whether more trials may decide about it."""
        looked_at = len(self.trials) >= LOOKS[0]
        return not looked_at or (self.verdict == "undecided" and len(self.trials) < LOOKS[-1])


@dataclass(eq=False)
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
    likely: int = 0
    """A first guess of the replicas that the SLO needs."""
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

    def over_budget(self, replicas: int, question: PlanQuestion) -> str:
        """That so many replicas are; empty when they are not."""
        price, budget = self.price(replicas), question.budget_usd_per_hour
        if budget is None or price is None or price <= budget:
            return ""
        return f"${price:,.0f}/h is over the budget"

    @property
    def weight(self) -> float:
        """What is ranked by: dollars, or GPUs where there are no prices."""
        replicas = self.fleet.replicas if self.fleet else self.least
        return replicas * self.unit

    @property
    def unit(self) -> float:
        """What one replica adds to it."""
        return self.gpus_per_replica if self.usd_per_replica_hour is None else self.usd_per_replica_hour
