"""What a scenario file may say: the schema of one simulated deployment."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, ValidationError, model_validator

from servesim.config.engine import (
    EngineConfig,
    EngineVersion,
    LinearStepTime,
    OperatorStepTime,
    keep_whole_tables,
    refuse_beside,
)
from servesim.config.expect import Expectation
from servesim.config.fleet import FleetConfig, PoolConfig
from servesim.config.record import Record, RuleError
from servesim.config.workload import WorkloadConfig

__all__ = [
    "EngineConfig",
    "EngineVersion",
    "HardwareConfig",
    "LinearStepTime",
    "OperatorStepTime",
    "Router",
    "Scenario",
    "SloConfig",
]

Router = Literal["round-robin", "random", "least-outstanding", "least-kv", "prefix-affinity"]


class HardwareConfig(Record):
    """The GPUs of the deployment."""

    gpu: str
    """Name of a file in hardware/gpus, or a path to one."""
    replicas: int = Field(default=1, ge=1, le=100_000)
    """Equal engines behind a router."""
    router: Router = "round-robin"
    """Who gets the next request (docs/planning.md). least-outstanding: the engine with the fewest requests;
    least-kv: with the least KV memory in use; prefix-affinity: the one that was sent most of the prompt
    before, unless it has far more to do than others."""
    simulated_replicas: int | None = Field(default=None, ge=1)
    """Simulate so many of the replicas and let them stand for the rest, which are statistically equal under
    round-robin and random; empty simulates all."""

    @property
    def num_simulated(self) -> int:
        """Replicas that are simulated."""
        return min(self.replicas, self.simulated_replicas or self.replicas)

    @model_validator(mode="after")
    def _samples_equals(self) -> HardwareConfig:
        if self.simulated_replicas is None or self.simulated_replicas >= self.replicas:
            return self
        if self.router not in ("round-robin", "random"):
            raise RuleError(
                f"does not go with router: {self.router} (what one replica gets depends on all others)",
                path=("simulated_replicas",),
                next_step="remove it, or choose round-robin or random",
            )
        return self


class SloConfig(Record):
    """Latency limits; a request that keeps its per-request limits counts for the goodput."""

    ttft_p99_s: float | None = Field(default=None, gt=0)
    tpot_p99_s: float | None = Field(default=None, gt=0)
    e2e_p99_s: float | None = Field(default=None, gt=0)


class Scenario(Record):
    """One deployment under one workload."""

    name: str = Field(min_length=1)
    description: str = ""
    model: str
    """Name of a file in hardware/models, or a path to one."""
    hardware: HardwareConfig
    fleet: FleetConfig | None = None
    engine: EngineConfig = EngineConfig()
    workload: WorkloadConfig
    slo: SloConfig = SloConfig()
    expect: tuple[Expectation, ...] = ()
    """Figures that `servesim run --expect` checks; exit code 1 if one is missed (docs/expectations.md)."""
    seed: int = Field(default=1, ge=0)

    @model_validator(mode="after")
    def _sequences_of_a_request_share_blocks(self) -> Scenario:
        if self.workload.forks is not None:
            keep_whole_tables(self.engine, "workload.sampling", ("engine",))
        return self

    @model_validator(mode="after")
    def _names_replicas_that_exist(self) -> Scenario:
        if self.fleet is None:
            return self
        count = self.num_replicas
        if self.fleet.pools and self.hardware.replicas != 1:
            raise RuleError(
                "does not go with fleet.pools",
                path=("hardware", "replicas"),
                next_step="set it to 1, and the numbers of replicas in fleet.pools",
            )
        scale = self.fleet.autoscaler
        if scale and not scale.min_replicas <= self.hardware.replicas <= scale.max_replicas:
            raise RuleError(
                "is not between min_replicas and max_replicas of fleet.autoscaler",
                path=("hardware", "replicas"),
                next_step=f"give {scale.min_replicas} to {scale.max_replicas}, which serve at the begin",
            )
        if self.hardware.num_simulated < self.hardware.replicas:
            raise RuleError(
                "does not go with hardware.simulated_replicas (what happens to one concerns the others)",
                path=("fleet",),
                next_step="remove one of the two",
            )
        for number, failure in enumerate(self.fleet.failures):
            if failure.replica >= count:
                last = f"the last one is {count - 1}" if count > 1 else "there is only replica 0"
                raise RuleError(
                    f"there is no replica {failure.replica}: they are counted from 0, {last}",
                    path=("fleet", "failures", number, "replica"),
                    next_step="correct it, or ask for more replicas",
                )
        return self

    @model_validator(mode="after")
    def _pools_can_serve(self) -> Scenario:
        fleet = self.fleet
        for name, pool in fleet.pools.items() if fleet else ():
            engine = self.pool_engine(pool)
            path = ("fleet", "pools", name, "engine") if pool.engine else ("engine",)
            if pool.serves != "all":
                keys = ("allocator", "batching", "speculative", "kv_eviction", "scheduling_policy")
                refuse_beside(engine, f"serves: {pool.serves}", *keys, path=path)
                if engine.preemption_mode == "swap" or self.workload.forks is not None:
                    raise RuleError(f"serves: {pool.serves} needs an engine that recomputes", path=path)
        if fleet is not None and fleet.is_disaggregated:
            engines = [self.pool_engine(pool) for pool in fleet.pools.values()]
            for key in ("kv_cache_dtype", "max_model_len"):
                if len({getattr(engine, key) for engine in engines}) > 1:
                    raise RuleError(
                        f"pools between which KV caches move need one {key}",
                        path=("fleet", "pools"),
                        next_step=f"set engine.{key} for all of them",
                    )
        return self

    @property
    def num_replicas(self) -> int:
        """Of the fleet, simulated or not; with an autoscaler the most that there can be."""
        if self.fleet and self.fleet.autoscaler:
            return self.fleet.autoscaler.max_replicas
        return self.fleet.num_replicas if self.fleet and self.fleet.pools else self.hardware.replicas

    def pool_engine(self, pool: PoolConfig) -> EngineConfig:
        """The engine's settings with those of a pool put on top; raises RuleError if they do not fit."""
        if pool.engine is None:
            return self.engine
        given = {one: getattr(self.engine, one) for one in self.engine.model_fields_set}
        given |= {one: getattr(pool.engine, one) for one in pool.engine.model_fields_set}
        try:
            return EngineConfig(**given)
        except ValidationError as error:
            rule = error.errors()[0].get("ctx", {}).get("error")
            if not isinstance(rule, RuleError):
                raise
            names = [name for name, one in self.fleet.pools.items() if one is pool] if self.fleet else []
            path = ("fleet", "pools", *names[:1], "engine")
            raise RuleError(str(rule), path, rule.next_step) from None

    @model_validator(mode="after")
    def _contiguous_has_no_blocks_to_share(self) -> Scenario:
        shares = "enable_prefix_caching" in self.engine.model_fields_set and self.engine.enable_prefix_caching
        if shares and self.engine.allocator != "paged":
            raise RuleError(
                "needs allocator: paged (contiguous memory has no blocks to share)",
                path=("engine", "enable_prefix_caching"),
                next_step="remove it, or set it to false",
            )
        return self
