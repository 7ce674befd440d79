"""The replicas of a fleet that differ, and what may happen to them."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

from pydantic import Field, model_validator

from servesim.config.engine import EngineConfig
from servesim.config.record import Record, RuleError

__all__ = ["AutoscalerConfig", "FailureConfig", "FleetConfig", "PoolConfig"]


class PoolConfig(Record):
    """Equal replicas of a fleet."""

    replicas: int = Field(default=1, ge=1, le=10_000)
    serves: Literal["all", "prefill", "decode"] = "all"
    """prefill: computes prompts; decode: pulls their KV cache over fleet.kv_link, generates outputs."""
    gpu: str | None = None
    """Name of a file in hardware/gpus, or a path to one; empty takes hardware.gpu."""
    engine: EngineConfig | None = None
    """Settings that differ from those of the scenario's engine."""
    weight: float = Field(default=1.0, gt=0, le=1e6)
    """How much each of these replicas is meant for, beside one of weight 1: round-robin and random send it
    that many times as many requests, the others let it have that many times as much."""


class FailureConfig(Record):
    """One replica fails; what it had in memory is gone."""

    replica: int = Field(ge=0)
    """Which one, counted from 0."""
    at_s: float = Field(ge=0)
    """When, in simulated seconds. The step that runs then, and the one behind it, are completed."""
    down_s: float | None = Field(default=None, gt=0)
    """How long until it serves again, with an empty cache; empty: never."""


class AutoscalerConfig(Record):
    """A number of replicas that follows the load; hardware.replicas serve at the begin."""

    min_replicas: int = Field(default=1, ge=1)
    max_replicas: int = Field(ge=1, le=10_000)
    metric: Literal["outstanding", "kv_usage"] = "outstanding"
    """What is counted of every replica: its requests, running or waiting, or the share of its KV pool that is
    allocated to them."""
    target: float = Field(gt=0)
    """How much of it a replica should have."""
    interval_s: float = Field(default=15.0, gt=0)
    """Time between two looks."""
    startup_s: float = Field(default=120.0, ge=0)
    """From the order for a replica until it serves; its GPUs are paid for from the order on."""
    cooldown_s: float = Field(default=300.0, ge=0)
    """Least time between a change of the number and a reduction."""

    @model_validator(mode="after")
    def _has_a_range(self) -> AutoscalerConfig:
        if self.min_replicas > self.max_replicas:
            raise RuleError("is above max_replicas", ("min_replicas",), "give the smaller number")
        if self.metric == "kv_usage" and self.target > 1:
            raise RuleError("a share of the KV pool is at most 1", ("target",), "write 0.8 for 80 %")
        return self


class FleetConfig(Record):
    """Pools of replicas that differ, and what happens to replicas while they serve (docs/fleets.md)."""

    pools: dict[str, PoolConfig] = Field(default_factory=dict)
    """By name, instead of hardware.replicas equal ones."""
    kv_link: str | None = None
    """Name of a file in hardware/links, or a path to one: over it the KV cache of a prompt goes from the
    replica that computed it to one that serves decode."""
    autoscaler: AutoscalerConfig | None = None
    failures: tuple[FailureConfig, ...] = ()
    in_flight: Literal["retry", "lose"] = "retry"
    """What becomes of the requests of a replica that fails. retry: the router sends them to another one,
    which begins with their prompts; latencies count from the first arrival. lose: they end in an error."""

    @property
    def num_replicas(self) -> int:
        """Of all pools."""
        return sum(pool.replicas for pool in self.pools.values())

    @property
    def is_disaggregated(self) -> bool:
        """Prompts and outputs are computed by different replicas."""
        return any(pool.serves != "all" for pool in self.pools.values())

    @model_validator(mode="after")
    def _disaggregates_whole(self) -> FleetConfig:
        if not self.is_disaggregated:
            if self.kv_link is not None:
                raise RuleError(
                    "needs pools that serve prefill and decode",
                    path=("kv_link",),
                    next_step="remove it, or say serves: prefill and serves: decode in fleet.pools",
                )
            return self
        have = {pool.serves for pool in self.pools.values()}
        if have != {"prefill", "decode"}:
            missing = " and ".join(sorted({"prefill", "decode"} - have))
            raise RuleError(
                f"pools that serve prefill or decode need both kinds and no other; missing: {missing}"
                if have < {"prefill", "decode"}
                else "pools that serve all do not go with pools that serve prefill or decode",
                path=("pools",),
                next_step="give every pool serves: prefill or serves: decode",
            )
        if self.kv_link is None:
            raise RuleError(
                "is missing: the KV cache of every prompt is pulled over it",
                path=("kv_link",),
                next_step="see `servesim list links`, or give the path of a file",
            )
        if self.failures:
            raise RuleError(
                "do not go with pools that serve prefill and decode",
                path=("failures",),
                next_step="remove them, or let the pools serve all",
            )
        return self

    @model_validator(mode="after")
    def _scales_equal_replicas(self) -> FleetConfig:
        for key in ("pools", "failures"):
            if self.autoscaler is not None and getattr(self, key):
                raise RuleError(f"does not go with fleet.{key}", ("autoscaler",), "remove one of the two")
        return self

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
