"""What if one resource were not short: the same requests with one thing relaxed at a time.

None of these can be bought as such; they tell which resource a figure hangs on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from servesim.analysis.inputs import faster_compute, faster_links, faster_memory
from servesim.analysis.simulation import Prepared
from servesim.config.gpu_profile import GpuProfile
from servesim.config.scenario import OperatorStepTime
from servesim.config.workload import BurstArrivals, ClosedLoopArrivals
from servesim.cost.host import host_profile
from servesim.cost.step_time import AffineSteps, StepShape, StepTime
from servesim.workload.altered import AlteredWorkload
from servesim.workload.request import Request, Segment

__all__ = ["Relaxation", "gap_variation", "relaxations_of"]

_MUCH_MEMORY = 20
_MANY_SEATS = 8
_BALANCING = "least-outstanding"
_FASTEST_LINK = "nvlink-4"
_LONG_PROMPTS = 0.9  # those beyond this quantile are cut to it
_LONG = 4.0  # and only where the longest is so many times as long


@dataclass(frozen=True, slots=True)
class Relaxation:
    """One resource; ``cause`` is what is the matter when relaxing it helps (analysis/explain_cause.py)."""

    key: str
    cause: str
    label: str
    relax: Callable[[Prepared], Prepared]
    law: Callable[[StepTime], StepTime] | None = None
    metrics: tuple[str, ...] = ("ttft", "tpot", "e2e")
    """What it says something about."""


def relaxations_of(prepared: Prepared) -> list[Relaxation]:
    """Those that the scenario has."""
    return [*_engine(prepared), *_hardware(prepared), *_fleet(prepared), *_traffic(prepared)]


def gap_variation(prepared: Prepared) -> float:
    """Standard deviation of the gaps between arrivals over their mean; 1 for Poisson, NaN without gaps."""
    gaps_s = np.diff([request.arrival_s for request in prepared.workload.arrivals()])
    return float(gaps_s.std() / gaps_s.mean()) if len(gaps_s) > 1 and gaps_s.mean() > 0 else float("nan")


# ---- the engine ------------------------------------------------------------------------------------


def _engine(prepared: Prepared) -> Iterator[Relaxation]:
    engine = prepared.engine
    yield Relaxation("kv", "kv", f"{_MUCH_MEMORY} times the KV memory", _much_memory)
    yield Relaxation("slots", "slots", f"{_MANY_SEATS} times the slots (max_num_seqs)", _many_seats)
    if not engine.enable_prefix_caching and engine.allocator == "paged":
        yield Relaxation("cache", "cold_cache", "prefixes found in the cache", _warm_cache)
    yield Relaxation(
        "interference", "interference", "prompts computed elsewhere, at no time", lambda of: of,
        _NoInterference, ("tpot", "e2e"),
    )  # fmt: skip


def _much_memory(prepared: Prepared) -> Prepared:
    memory = prepared.memory
    more = replace(
        memory,
        num_gpu_blocks=memory.num_gpu_blocks * _MUCH_MEMORY,
        contiguous_tokens=memory.contiguous_tokens * _MUCH_MEMORY,
    )
    return replace(prepared, memory=more)


def _many_seats(prepared: Prepared) -> Prepared:
    engine = prepared.engine
    seats, tokens = engine.max_num_seqs, engine.max_num_batched_tokens
    assert seats is not None
    assert tokens is not None
    more = {"max_num_seqs": seats * _MANY_SEATS, "max_num_batched_tokens": max(tokens, seats * _MANY_SEATS)}
    return _with_engine(prepared, more)


def _warm_cache(prepared: Prepared) -> Prepared:
    return _with_engine(prepared, {"enable_prefix_caching": True})


def _with_engine(prepared: Prepared, update: Mapping[str, object]) -> Prepared:
    return replace(prepared, engine=prepared.engine.model_copy(update=update))


class _NoInterference:
    """A law under which a step with decodes takes the time of its decodes."""

    def __init__(self, law: StepTime) -> None:
        self._law = law
        self.decode_steps: Callable[..., AffineSteps] = law.decode_steps

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The law's."""
        return self._law.windows

    def step_s(self, shape: StepShape) -> float:
        """Seconds of a step."""
        if shape.num_decodes and shape.chunks:
            sampled = shape.num_decodes + shape.num_draft_tokens
            shape = shape._replace(chunks=(), num_sampled=sampled)
        return self._law.step_s(shape)


# ---- the machine -----------------------------------------------------------------------------------


def _hardware(prepared: Prepared) -> Iterator[Relaxation]:
    law = prepared.engine.step_time
    if not isinstance(law, OperatorStepTime):
        return
    yield Relaxation(
        "bandwidth", "bandwidth", "twice the HBM bandwidth",
        lambda of: replace(of, gpu=faster_memory(of.gpu, 2)),
    )  # fmt: skip
    yield Relaxation(
        "compute", "compute", "twice the compute rate",
        lambda of: replace(of, gpu=faster_compute(of.gpu, 2)),
    )  # fmt: skip
    if prepared.engine.tensor_parallel_size > 1:
        yield Relaxation(
            "link", "link", "links twice as fast, in bandwidth and latency",
            lambda of: replace(of, gpu=_faster_links(of.gpu)),
        )  # fmt: skip
    if host_profile(prepared.engine).fixed_s or prepared.engine.enforce_eager:
        yield Relaxation("host", "host", "no host time", _no_host)


def _faster_links(gpu: GpuProfile) -> GpuProfile:
    gpu = faster_links(gpu, 2)
    names = ("small_launch_s", "middle_launch_s", "large_launch_s")
    laws = {
        degree: law.model_copy(update={name: getattr(law, name) / 2 for name in names})
        for degree, law in gpu.efficiency.all_reduce.items()
    }
    return gpu.model_copy(update={"efficiency": gpu.efficiency.model_copy(update={"all_reduce": laws})})


def _no_host(prepared: Prepared) -> Prepared:
    law = prepared.engine.step_time.model_copy(update={"host": "none", "exposed_host_s": None})
    return _with_engine(prepared, {"step_time": law, "enforce_eager": False})


# ---- the fleet -------------------------------------------------------------------------------------


def _fleet(prepared: Prepared) -> Iterator[Relaxation]:
    scenario = prepared.loaded.scenario
    hardware, fleet = scenario.hardware, scenario.fleet
    is_whole = hardware.num_simulated == hardware.replicas
    if scenario.num_replicas > 1 and is_whole and hardware.router != _BALANCING:
        router = {"hardware": hardware.model_copy(update={"router": _BALANCING})}
        yield Relaxation(
            "router", "router", f"a router that balances ({_BALANCING})", lambda of: _with(of, router)
        )
    if fleet is not None and fleet.failures:
        healthy = {"fleet": fleet.model_copy(update={"failures": ()})}
        yield Relaxation("failure", "failure", "no replica fails", lambda of: _with(of, healthy))
    if fleet is not None and fleet.autoscaler is not None:
        most = fleet.autoscaler.max_replicas
        full = {
            "fleet": fleet.model_copy(update={"autoscaler": None}),
            "hardware": hardware.model_copy(update={"replicas": most}),
        }
        yield Relaxation(
            "autoscaler", "autoscaler", f"all {most} replicas from the begin", lambda of: _with(of, full)
        )
    if fleet is not None and fleet.kv_link not in (None, _FASTEST_LINK):
        linked = {"fleet": fleet.model_copy(update={"kv_link": _FASTEST_LINK})}
        yield Relaxation(
            "kv_link", "kv_link", f"KV caches moved over {_FASTEST_LINK}", lambda of: _with(of, linked)
        )


def _with(prepared: Prepared, update: Mapping[str, object]) -> Prepared:
    loaded = prepared.loaded
    return replace(prepared, loaded=replace(loaded, scenario=loaded.scenario.model_copy(update=update)))


# ---- the traffic -----------------------------------------------------------------------------------


def _traffic(prepared: Prepared) -> Iterator[Relaxation]:
    if not isinstance(prepared.loaded.scenario.workload.arrivals, BurstArrivals | ClosedLoopArrivals):
        yield Relaxation("smooth", "bursty", "arrivals evenly spaced", _smooth)
    prompts = np.array([request.prompt_tokens for request in prepared.workload.arrivals()])
    grows = prepared.loaded.scenario.workload.sessions is not None  # later prompts hold the earlier ones
    if not grows and len(prompts) and prompts.max() > _LONG * np.quantile(prompts, _LONG_PROMPTS):
        yield Relaxation(
            "short",
            "oversize",
            f"prompts beyond the {_LONG_PROMPTS * 100:.0f}th percentile cut to it",
            _short,
        )


def _smooth(prepared: Prepared) -> Prepared:
    requests = list(prepared.workload.arrivals())
    at_s = np.linspace(requests[0].arrival_s, requests[-1].arrival_s, len(requests)).tolist()
    times = {request.index: time_s for request, time_s in zip(requests, at_s, strict=True)}

    def change(request: Request) -> Request:
        return request._replace(arrival_s=times.get(request.index, request.arrival_s))

    return replace(prepared, workload=AlteredWorkload(prepared.workload, change))


def _short(prepared: Prepared) -> Prepared:
    lengths = [request.prompt_tokens for request in prepared.workload.arrivals()]
    most = int(np.quantile(lengths, _LONG_PROMPTS))

    def change(request: Request) -> Request:
        if request.prompt_tokens <= most:
            return request
        return request._replace(prompt_tokens=most, prompt=tuple(_beginning(request.prompt, most)))

    return replace(prepared, workload=AlteredWorkload(prepared.workload, change))


def _beginning(segments: tuple[Segment, ...], tokens: int) -> Iterator[Segment]:
    for segment in segments:
        if tokens > 0:
            yield segment._replace(num_tokens=min(segment.num_tokens, tokens))
        tokens -= segment.num_tokens
