"""Time that the engine's CPU side (schedule, prepare inputs, handle outputs) adds to a step."""

from __future__ import annotations

from typing import NamedTuple

from servesim.config.scenario import EngineConfig, OperatorStepTime
from servesim.cost.step_time import AffineSteps

__all__ = ["HOST_PROFILES", "HostProfile", "host_profile", "with_host"]


class HostProfile(NamedTuple):
    """Host time of a step: fixed_s + per_sequence_s * sequences in the step.

    ``hidden``: the host prepares the next step while the GPU runs this one, so that a step takes the longer
    of the two plus ``residual_s``; otherwise the two times add up.
    """

    hidden: bool
    fixed_s: float
    per_sequence_s: float
    residual_s: float
    provenance: str

    def host_s(self, num_sequences: int) -> float:
        """Host time of a step with ``num_sequences`` sequences."""
        return self.fixed_s + self.per_sequence_s * num_sequences

    def beside_gpu(self, num_sequences: int) -> tuple[float, float]:
        """A step takes the longer of its GPU time and the first of these, plus the second."""
        host_s = self.fixed_s + self.per_sequence_s * num_sequences
        return (host_s, self.residual_s) if self.hidden else (0.0, host_s)


HOST_PROFILES: dict[str, HostProfile] = {
    "vllm-2023": HostProfile(
        False, 8e-3, 0.0, 0.0, "intercept of the step times published by DistServe for vLLM of 2023"
    ),
    "v0.6": HostProfile(
        False,
        3e-3,
        0.0,
        0.0,
        "middle of 2 to 4 ms; vLLM 0.6 reports 2.7x the throughput of 0.5 on Llama-3-8B",
    ),
    "v1-sync": HostProfile(
        False,
        1e-3,
        10e-6,
        0.0,
        "estimate, to be calibrated on a real run; V1's scheduler alone is measured "
        "at up to 20 us per running request on a slow CPU",
    ),
    "v1-async": HostProfile(
        True,
        1e-3,
        10e-6,
        0.2e-3,
        "as v1-sync but overlapped with the GPU; the residual is an estimate, "
        "batch 1 on H100 shows 0.05 ms exposed in another engine of this kind",
    ),
    "v1-cpu": HostProfile(
        False,
        1.55e-3,
        31e-6,
        0.0,
        "measured: steps of 1 to 32 decodes in vLLM 0.32's CPU build on one core, less model and sampler "
        "(rows `host` of reports/validation/hardware/cpu-core-kernels.csv)",
    ),
    "none": HostProfile(True, 0.0, 0.0, 0.0, "GPU time only"),
}
"""Engine profiles that OperatorStepTime.host may name."""


def host_profile(engine: EngineConfig) -> HostProfile:
    """The profile of ``engine``; auto is v0.6 for that version, else v1-async or v1-sync by async_scheduling.

    A calibrated ``exposed_host_s`` takes the place of what every step waits for.
    """
    if not isinstance(engine.step_time, OperatorStepTime):
        return HOST_PROFILES["none"]
    name: str = engine.step_time.host
    if name == "auto" and engine.version == "0.6":
        name = "v0.6"
    elif name == "auto":
        name = "v1-async" if engine.async_scheduling else "v1-sync"
    profile, exposed_s = HOST_PROFILES[name], engine.step_time.exposed_host_s
    if exposed_s is None:
        return profile
    return profile._replace(residual_s=exposed_s) if profile.hidden else profile._replace(fixed_s=exposed_s)


def with_host(gpu: AffineSteps, host: HostProfile, num_sequences: int) -> AffineSteps:
    """A run of steps with host time, from its GPU times; it ends where the GPU overtakes the host."""
    first_s, growth_s, num_steps = gpu
    host_s = host.host_s(num_sequences)
    if not host.hidden:
        return AffineSteps(first_s + host_s, growth_s, num_steps)
    if first_s >= host_s:
        return AffineSteps(first_s + host.residual_s, growth_s, num_steps)
    if growth_s > 0.0:
        num_steps = min(num_steps, int((host_s - first_s) / growth_s) + 1)
    return AffineSteps(host_s + host.residual_s, 0.0, num_steps)
