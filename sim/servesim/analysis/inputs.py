"""What a sensitivity study moves: the inputs of a scenario that are known only to some percent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from servesim.analysis.capacity import at_load
from servesim.analysis.simulation import Prepared, prepare
from servesim.config.gpu_profile import GpuProfile
from servesim.config.load import LoadedScenario
from servesim.config.record import Record
from servesim.config.scenario import LinearStepTime, OperatorStepTime
from servesim.config.speculative import DepthAcceptance, IidAcceptance
from servesim.config.workload import (
    BurstArrivals,
    ClosedLoopArrivals,
    ConstantArrivals,
    FixedTokens,
    GeometricTokens,
    LognormalTokens,
    TokensConfig,
    UniformTokens,
    WorkloadConfig,
)
from servesim.cost.host import host_profile
from servesim.workload.altered import AlteredWorkload, burstier, private_share, scaled_lengths

__all__ = ["Input", "faster_compute", "faster_links", "faster_memory", "inputs_of"]

R = TypeVar("R", bound=Record)
Move = Callable[[LoadedScenario, float], Prepared]


@dataclass(frozen=True, slots=True)
class Input:
    """One input; ``move(scenario, factor)`` prepares the scenario with it multiplied by ``factor``."""

    key: str
    label: str
    move: Move
    down_only: bool = False
    """It can be lowered only: there is nothing to raise it by."""


def inputs_of(loaded: LoadedScenario, hits: bool) -> list[Input]:
    """The inputs that the scenario has; ``hits``: its requests find something in the prefix cache."""
    return [*_hardware(loaded), *_traffic(loaded), *_shared(loaded, hits), *_acceptance(loaded)]


# ---- the machine -----------------------------------------------------------------------------------


def _hardware(loaded: LoadedScenario) -> Iterator[Input]:
    law = loaded.scenario.engine.step_time
    if isinstance(law, LinearStepTime):
        for name, label in (
            ("base_s", "Step time: constant"),
            ("per_token_s", "Step time per token"),
            ("per_context_token_s", "Step time per token of context"),
        ):
            if getattr(law, name):
                yield Input(name, label, _of_step_time(name))
        return
    yield Input("memory_rate", "Memory bandwidth reached", _of_gpu(faster_memory))
    yield Input("compute_rate", "Compute rate reached", _of_gpu(faster_compute))
    yield Input("launch", "Launch times of kernels", _of_gpu(_longer_launches))
    if loaded.scenario.engine.tensor_parallel_size > 1:
        yield Input("link_rate", "Link bandwidth reached", _of_gpu(faster_links))
    prepared = prepare(loaded)
    host = host_profile(prepared.engine)
    if host.residual_s if host.hidden else host.fixed_s:
        yield Input("host_time", "Host time that steps wait for", _host_time)


def _of_step_time(name: str) -> Move:
    def move(loaded: LoadedScenario, factor: float) -> Prepared:
        prepared = prepare(loaded)
        law = prepared.engine.step_time
        return _with_law(prepared, law.model_copy(update={name: getattr(law, name) * factor}))

    return move


def _host_time(loaded: LoadedScenario, factor: float) -> Prepared:
    prepared = prepare(loaded)
    host, law = host_profile(prepared.engine), prepared.engine.step_time
    exposed_s = host.residual_s if host.hidden else host.fixed_s
    return _with_law(prepared, law.model_copy(update={"exposed_host_s": exposed_s * factor}))


def _with_law(prepared: Prepared, law: OperatorStepTime | LinearStepTime) -> Prepared:
    return replace(prepared, engine=prepared.engine.model_copy(update={"step_time": law}))


def _of_gpu(change: Callable[[GpuProfile, float], GpuProfile]) -> Move:
    def move(loaded: LoadedScenario, factor: float) -> Prepared:
        prepared = prepare(loaded)
        return replace(prepared, gpu=change(prepared.gpu, factor))

    return move


def faster_memory(gpu: GpuProfile, factor: float) -> GpuProfile:
    """The GPU with ``factor`` times the HBM bandwidth."""
    # What a kernel reaches is a share of the nominal rate: raising the one by a tenth raises the other.
    return gpu.model_copy(update={"hbm_bandwidth_bytes_per_s": gpu.hbm_bandwidth_bytes_per_s * factor})


def faster_compute(gpu: GpuProfile, factor: float) -> GpuProfile:
    """The GPU with ``factor`` times the peak rates."""
    rates = {kind: rate * factor for kind, rate in gpu.peak_flops_per_s.items()}
    return gpu.model_copy(update={"peak_flops_per_s": rates})


def _longer_launches(gpu: GpuProfile, factor: float) -> GpuProfile:
    return gpu.model_copy(update={"efficiency": _scaled(gpu.efficiency, "launch_s", factor)})


def faster_links(gpu: GpuProfile, factor: float) -> GpuProfile:
    """The GPU with ``factor`` times the bandwidth between GPUs."""
    laws = {n: _scaled(law, "bytes_per_s", factor) for n, law in gpu.efficiency.all_reduce.items()}
    return gpu.model_copy(update={"efficiency": gpu.efficiency.model_copy(update={"all_reduce": laws})})


def _scaled(record: R, ending: str, factor: float) -> R:
    """The record with every number below it whose name ends so multiplied."""

    def scaled(name: str, value: Any) -> Any:
        if isinstance(value, Record):
            return _scaled(value, ending, factor)
        if isinstance(value, dict):
            return {key: scaled(name, item) for key, item in value.items()}
        return value * factor if name.endswith(ending) and isinstance(value, float) else value

    return record.model_copy(update={name: scaled(name, value) for name, value in record})


# ---- the traffic -----------------------------------------------------------------------------------


def _traffic(loaded: LoadedScenario) -> Iterator[Input]:
    workload = loaded.scenario.workload
    if not isinstance(workload.arrivals, BurstArrivals | ClosedLoopArrivals):
        yield Input("rate", "Arrival rate", lambda of, factor: prepare(at_load(of, factor)))
    if not isinstance(workload.arrivals, BurstArrivals | ClosedLoopArrivals | ConstantArrivals):
        yield Input("burstiness", "Burstiness (CV of the gaps)", _burstiness)
    for part, label in (("prompt_tokens", "Prompt length"), ("output_tokens", "Output length")):
        move = _length(workload, part)
        if move is not None:
            yield Input(part, label, move)


def _burstiness(loaded: LoadedScenario, factor: float) -> Prepared:
    prepared = prepare(loaded)
    change = burstier(prepared.workload.arrivals(), factor)
    return replace(prepared, workload=AlteredWorkload(prepared.workload, change))


def _length(workload: WorkloadConfig, part: str) -> Move | None:
    """How to move a length: by its law, or request by request where it is recorded; None: it cannot be."""
    if workload.trace is None:
        law: TokensConfig | None = getattr(workload, part)
        if law is None or _longer(law, 1.1) is None:
            return None

        def by_law(loaded: LoadedScenario, factor: float) -> Prepared:
            own = loaded.scenario.workload
            return prepare(
                loaded.with_workload(own.model_copy(update={part: _longer(getattr(own, part), factor)}))
            )

        return by_law
    is_prompt = part == "prompt_tokens"
    if is_prompt and (workload.trace.format == "mooncake" or workload.shared_prefixes is not None):
        return None  # the blocks of shared prompts are recorded

    def one_by_one(loaded: LoadedScenario, factor: float) -> Prepared:
        prepared = prepare(loaded)
        change = scaled_lengths(*((factor, 1.0) if is_prompt else (1.0, factor)))
        return replace(prepared, workload=AlteredWorkload(prepared.workload, change))

    return one_by_one


def _longer(law: TokensConfig, factor: float) -> TokensConfig | None:
    """The law with its mean multiplied; None for a recorded column."""
    match law:
        case FixedTokens():
            return law.model_copy(update={"tokens": max(1, round(law.tokens * factor))})
        case UniformTokens():
            return law.model_copy(update={"mean_tokens": max(1, round(law.mean_tokens * factor))})
        case GeometricTokens():
            return law.model_copy(update={"mean_tokens": max(1.0, law.mean_tokens * factor)})
        case LognormalTokens():
            most = law.max_tokens
            return law.model_copy(
                update={
                    "median_tokens": max(1.0, law.median_tokens * factor),
                    "max_tokens": None if most is None else max(law.min_tokens, round(most * factor)),
                }
            )
        case _:
            return None


def _shared(loaded: LoadedScenario, hits: bool) -> Iterator[Input]:
    if not hits:
        return

    def move(loaded: LoadedScenario, factor: float) -> Prepared:
        prepared = prepare(loaded)
        change = private_share(1 - factor, loaded.scenario.seed)
        return replace(prepared, workload=AlteredWorkload(prepared.workload, change))

    yield Input("hit_rate", "Prefix cache hits", move, down_only=True)


def _acceptance(loaded: LoadedScenario) -> Iterator[Input]:
    speculative = loaded.scenario.engine.speculative
    if speculative is None or not isinstance(speculative.acceptance, IidAcceptance | DepthAcceptance):
        return

    def move(loaded: LoadedScenario, factor: float) -> Prepared:
        engine = loaded.scenario.engine
        assert engine.speculative is not None
        law = engine.speculative.acceptance
        assert isinstance(law, IidAcceptance | DepthAcceptance)
        update: dict[str, Any] = (
            {"rate": min(1.0, law.rate * factor)}
            if isinstance(law, IidAcceptance)
            else {"rates": tuple(min(1.0, rate * factor) for rate in law.rates)}
        )
        own = engine.speculative.model_copy(update={"acceptance": law.model_copy(update=update)})
        changed = engine.model_copy(update={"speculative": own})
        return prepare(replace(loaded, scenario=loaded.scenario.model_copy(update={"engine": changed})))

    yield Input("acceptance", "Acceptance of drafts", move)
