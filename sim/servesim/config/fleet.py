"""What may happen to the replicas of a fleet."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

from pydantic import Field, model_validator

from servesim.config.record import Record, RuleError

__all__ = ["FailureConfig", "FleetConfig"]


class FailureConfig(Record):
    """One replica fails; what it had in memory is gone."""

    replica: int = Field(ge=0)
    """Which one, counted from 0."""
    at_s: float = Field(ge=0)
    """When, in simulated seconds. The step that runs then, and the one behind it, are completed."""
    down_s: float | None = Field(default=None, gt=0)
    """How long until it serves again, with an empty cache; empty: never."""


class FleetConfig(Record):
    """What happens to replicas while they serve (docs/fleets.md)."""

    failures: tuple[FailureConfig, ...] = ()
    in_flight: Literal["retry", "lose"] = "retry"
    """What becomes of the requests of a replica that fails. retry: the router sends them to another one,
    which begins with their prompts; latencies count from the first arrival. lose: they end in an error."""

    @model_validator(mode="after")
    def _fails_once_at_a_time(self) -> FleetConfig:
        numbered = sorted(enumerate(self.failures), key=lambda one: (one[1].replica, one[1].at_s))
        for (_, one), (number, after) in pairwise(numbered):
            if one.replica == after.replica and (one.down_s is None or after.at_s < one.at_s + one.down_s):
                when = "for ever" if one.down_s is None else f"until {one.at_s + one.down_s:g} s"
                raise RuleError(
                    f"replica {one.replica} is down already: it fails at {one.at_s:g} s, {when}",
                    path=("failures", number, "at_s"),
                    next_step="remove one of the two failures, or change at_s or down_s",
                )
        return self
