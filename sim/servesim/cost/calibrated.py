"""The law of operators with the scalars that a calibration has fitted."""

from __future__ import annotations

from servesim.config.profiles import GpuProfile, ModelProfile
from servesim.config.scenario import EngineConfig, OperatorStepTime
from servesim.cost.host import host_profile, with_host
from servesim.cost.operators import OperatorLaw
from servesim.cost.step_time import AffineSteps, StepShape

__all__ = ["CalibratedLaw", "with_bandwidth_factor"]


class CalibratedLaw:
    """gpu_time_factor times the GPU time of OperatorLaw at another achieved bandwidth, then the host.

    ``engine`` must be resolved and its step_time be the law of operators.
    """

    def __init__(self, model: ModelProfile, gpu: GpuProfile, engine: EngineConfig) -> None:
        law = engine.step_time
        assert isinstance(law, OperatorStepTime)
        plain = {"host": "none", "gpu_time_factor": 1.0, "bandwidth_factor": 1.0, "exposed_host_s": None}
        gpu_only = engine.model_copy(update={"step_time": law.model_copy(update=plain)})
        self._gpu = OperatorLaw(model, with_bandwidth_factor(gpu, law.bandwidth_factor), gpu_only)
        self._factor = law.gpu_time_factor
        self._host = host_profile(engine)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The distinct attention windows of the model's layers (None: full attention)."""
        return self._gpu.windows

    @property
    def context_slopes_s(self) -> tuple[float, ...]:
        """GPU seconds per KV token that a decode attends to, by window."""
        return tuple(self._factor * slope_s for slope_s in self._gpu.context_slopes_s)

    def step_s(self, shape: StepShape) -> float:
        """Seconds of one step, host time included."""
        one = AffineSteps(self.gpu_s(shape), 0.0, 1)
        return with_host(one, self._host, shape.num_decodes + len(shape.chunks)).first_s

    def gpu_s(self, shape: StepShape) -> float:
        """Seconds that the GPU works on one step."""
        return self._factor * self._gpu.gpu_s(shape)

    def decode_steps(
        self, num_decodes: int, context_tokens: tuple[int, ...], context_growth: tuple[int, ...]
    ) -> AffineSteps:
        """Durations of a run of pure decode steps."""
        first_s, growth_s, steps = self._gpu.decode_steps(num_decodes, context_tokens, context_growth)
        scaled = AffineSteps(self._factor * first_s, self._factor * growth_s, steps)
        return with_host(scaled, self._host, num_decodes)

    def breakdown(self, shape: StepShape) -> dict[str, float]:
        """GPU seconds of one step by kind of operation; they add up to ``gpu_s``."""
        return {name: self._factor * part for name, part in self._gpu.breakdown(shape).items()}


def with_bandwidth_factor(gpu: GpuProfile, factor: float) -> GpuProfile:
    """``gpu`` whose kernels reach ``factor`` times the share of the bandwidth, at most all of it."""
    if factor == 1.0:
        return gpu
    efficiency = gpu.efficiency

    def scaled(share: float) -> dict[str, float]:
        return {"memory": min(1.0, share * factor)}

    gemm = {kind: law.model_copy(update=scaled(law.memory)) for kind, law in efficiency.gemm.items()}
    decode = {
        kind: law.model_copy(update=scaled(law.memory)) for kind, law in efficiency.decode_attention.items()
    }
    experts = {kind: law.model_copy(update=scaled(law.memory)) for kind, law in efficiency.experts.items()}
    changed = efficiency.model_copy(update={"gemm": gemm, "experts": experts, "decode_attention": decode})
    return gpu.model_copy(update={"efficiency": changed})
