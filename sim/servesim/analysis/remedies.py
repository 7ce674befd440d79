"""What an operator can do about a latency: flags of the engine, and purchases."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from servesim.analysis.simulation import Prepared
from servesim.config.fleet import AutoscalerConfig, FleetConfig
from servesim.config.load import LoadedScenario, parse
from servesim.config.scenario import OperatorStepTime, Scenario
from servesim.cost.host import host_profile

__all__ = ["Remedy", "applied", "remedies_of"]

_MEMORY_UTILIZATION = 0.95
_LATEST = "0.33"
_FAST_LINK = "infiniband-ndr"
_BETTER_GPUS = ("h100-sxm", "h200-sxm", "b200")
_FEWEST_TOKENS = 256
_LARGE_FLEET = 8  # where one replica more changes little
_LARGER = 1.25
_OFTENER, _SOONER = 3, 1.5  # an autoscaler


@dataclass(frozen=True, slots=True)
class Remedy:
    """Settings by path."""

    settings: Mapping[str, Any]
    kind: Literal["setting", "purchase"] = "setting"
    has_price: bool = True
    """Whether the GPUs' prices tell what it costs."""

    @property
    def text(self) -> str:
        """As --set takes it."""
        return " ".join(f"{path}={_written(value)}" for path, value in self.settings.items())


def applied(loaded: LoadedScenario, remedy: Remedy) -> LoadedScenario:
    """The scenario under a remedy; raises ConfigError when the two do not go together."""
    tree = loaded.scenario.model_dump(mode="json", exclude_unset=True)
    for path, value in remedy.settings.items():
        *sections, last = path.split(".")
        at = tree
        for section in sections:
            at = at.setdefault(section, {})
        at[last] = value
    return replace(loaded, scenario=parse(Scenario, tree, loaded.file))


def remedies_of(prepared: Prepared) -> list[Remedy]:
    """Everything worth a try on this scenario."""
    return [
        *_memory(prepared),
        *_batching(prepared),
        *_host(prepared),
        *_routing(prepared),
        *_purchases(prepared),
    ]


def _memory(prepared: Prepared) -> Iterator[Remedy]:
    engine = prepared.engine
    if engine.gpu_memory_utilization < _MEMORY_UTILIZATION and not prepared.memory.overridden:
        yield Remedy({"engine.gpu_memory_utilization": _MEMORY_UTILIZATION})
    if engine.kv_cache_dtype == "auto":
        yield Remedy({"engine.kv_cache_dtype": "fp8"})
    if engine.quantization == "none":
        yield Remedy({"engine.quantization": "fp8"})
    if engine.allocator != "paged":
        if engine.batching != "static":
            yield Remedy(_paged(prepared))
    elif not engine.enable_prefix_caching:
        yield Remedy({"engine.enable_prefix_caching": True})


def _paged(prepared: Prepared) -> dict[str, Any]:
    """What brings the paged allocator."""
    if prepared.engine.allocator == "paged":
        return {}
    fit = {} if prepared.engine.contiguous_fit == "first" else {"engine.contiguous_fit": "first"}
    return {"engine.allocator": "paged", **fit}


def _batching(prepared: Prepared) -> Iterator[Remedy]:
    engine = prepared.engine
    seats, tokens = engine.max_num_seqs, engine.max_num_batched_tokens
    assert seats is not None
    assert tokens is not None
    if engine.batching != "continuous":
        yield Remedy({"engine.batching": "continuous", **_paged(prepared)})
        return
    for factor in (2, 4):
        more = seats * factor
        settings: dict[str, Any] = {"engine.max_num_seqs": more}
        if more > tokens:
            settings["engine.max_num_batched_tokens"] = more
        yield Remedy(settings)
    for share in (2, 4):
        if seats >= 2 * share:
            yield Remedy({"engine.max_num_seqs": seats // share})
    yield Remedy({"engine.max_num_batched_tokens": tokens * 2})
    if engine.enable_chunked_prefill:
        for share in (2, 4, 8, 16):
            fewer = tokens // share
            if fewer >= _FEWEST_TOKENS:
                settings = {"engine.max_num_batched_tokens": fewer}
                if fewer < seats:
                    settings["engine.max_num_seqs"] = fewer
                yield Remedy(settings)
        if not engine.long_prefill_token_threshold:
            for share in (2, 8):
                threshold = max(tokens // share, _FEWEST_TOKENS // 2)
                yield Remedy({"engine.long_prefill_token_threshold": threshold})


def _host(prepared: Prepared) -> Iterator[Remedy]:
    engine = prepared.engine
    if engine.enforce_eager:
        yield Remedy({"engine.enforce_eager": False})
    if engine.batching == "continuous" and not engine.async_scheduling:
        speculative = engine.speculative
        named = isinstance(engine.step_time, OperatorStepTime) and engine.step_time.host != "auto"
        settings: dict[str, Any] = {"engine.async_scheduling": True}
        if named:
            settings["engine.step_time.host"] = "auto"
        if host_profile(engine).fixed_s and engine.version in ("0.6", "0.11"):
            settings["engine.version"] = _LATEST
        if speculative is None or speculative.can_be_async:
            yield Remedy(settings)


def _routing(prepared: Prepared) -> Iterator[Remedy]:
    """Another router, and the same GPUs in other replicas."""
    scenario, degree = prepared.loaded.scenario, prepared.engine.tensor_parallel_size
    hardware, count = scenario.hardware, scenario.num_replicas
    if count > 1:
        routers = ["least-outstanding"]
        if prepared.engine.enable_prefix_caching:
            routers.append("prefix-affinity")
        for router in routers:
            if hardware.router != router:
                yield Remedy({"hardware.router": router})
    if scenario.fleet is not None and (scenario.fleet.pools or scenario.fleet.autoscaler):
        yield from _regrouped(scenario.fleet)
        return
    if degree % 2 == 0:
        yield Remedy({"engine.tensor_parallel_size": degree // 2, "hardware.replicas": count * 2})
    if count % 2 == 0:
        yield Remedy({"engine.tensor_parallel_size": degree * 2, "hardware.replicas": count // 2})


def _regrouped(fleet: FleetConfig) -> Iterator[Remedy]:
    """Replicas moved between prefill and decode, and replicas that do both."""
    if not fleet.is_disaggregated:
        return
    for source, giving in fleet.pools.items():
        for target, taking in fleet.pools.items():
            if giving.serves != taking.serves and giving.replicas > 1:
                yield Remedy(
                    {
                        f"fleet.pools.{source}.replicas": giving.replicas - 1,
                        f"fleet.pools.{target}.replicas": taking.replicas + 1,
                    }
                )
    if all(pool.gpu is None and pool.engine is None for pool in fleet.pools.values()):
        yield Remedy({"fleet": None, "hardware.replicas": fleet.num_replicas})


def _purchases(prepared: Prepared) -> Iterator[Remedy]:
    engine, gpu, scenario = prepared.engine, prepared.gpu, prepared.loaded.scenario
    degree, count, fleet = engine.tensor_parallel_size, scenario.hardware.replicas, scenario.fleet
    if fleet is not None and fleet.autoscaler is not None:
        yield from _scaled(fleet.autoscaler, count)
    elif fleet is not None and fleet.pools:
        for name, pool in fleet.pools.items():
            yield Remedy({f"fleet.pools.{name}.replicas": pool.replicas + 1}, "purchase")
        if fleet.kv_link is not None and _is_faster(prepared, _FAST_LINK, fleet.kv_link):
            yield Remedy({"fleet.kv_link": _FAST_LINK}, "purchase", has_price=False)
    else:
        yield Remedy({"hardware.replicas": count + 1}, "purchase")
        if count >= _LARGE_FLEET:
            yield Remedy({"hardware.replicas": math.ceil(count * _LARGER)}, "purchase")
    yield Remedy({"engine.tensor_parallel_size": degree * 2}, "purchase")
    for share in (2, 4):
        if degree >= share:
            yield Remedy({"engine.tensor_parallel_size": degree // share})
    for name in _BETTER_GPUS:
        better = _bandwidth_of(prepared, name) > gpu.hbm_bandwidth_bytes_per_s
        if better and name != gpu.name:
            yield Remedy({"hardware.gpu": name}, "purchase")


def _scaled(scaler: AutoscalerConfig, count: int) -> Iterator[Remedy]:
    """More replicas, or sooner."""
    at = "fleet.autoscaler"
    yield Remedy({f"{at}.interval_s": scaler.interval_s / _OFTENER})
    yield Remedy({f"{at}.target": scaler.target / _SOONER}, "purchase")
    yield Remedy({f"{at}.max_replicas": scaler.max_replicas + 1}, "purchase")
    least = scaler.min_replicas + 1
    if least <= scaler.max_replicas:
        at_begin = {} if count >= least else {"hardware.replicas": least}
        yield Remedy({f"{at}.min_replicas": least, **at_begin}, "purchase")


def _bandwidth_of(prepared: Prepared, name: str) -> float:
    from servesim.config.profiles import load_gpu

    return load_gpu(prepared.loaded.find("gpus", name)).hbm_bandwidth_bytes_per_s


def _is_faster(prepared: Prepared, link: str, other: str) -> bool:
    from servesim.config.link import load_link

    rates = (
        load_link(prepared.loaded.find("links", name)).replica_bytes_per_s(
            prepared.engine.tensor_parallel_size * prepared.engine.pipeline_parallel_size
        )
        for name in (link, other)
    )
    return next(rates) > next(rates)


def _written(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
