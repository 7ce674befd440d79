"""The time of one engine step, from its shape."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from servesim.config.profiles import GpuProfile, ModelProfile
from servesim.config.scenario import EngineConfig, LinearStepTime

__all__ = ["UNLIMITED_STEPS", "AffineSteps", "StepShape", "StepTime", "build_step_time"]

UNLIMITED_STEPS = 2**62
"""num_steps of a run whose law never changes."""


class StepShape(NamedTuple):
    """What one step computes, whoever asked for it.

    ``decode_context_tokens[i]`` is the sum, over the sequences that decode, of the KV tokens each attends
    to (its new token included) under attention window ``StepTime.windows[i]``.
    ``chunks`` are the prefill pieces as (new tokens, KV tokens already cached before them).
    ``num_sampled`` is the number of tokens whose successor is sampled: rows of the LM head.
    ``num_draft_tokens`` are drafts that the decodes verify, beside one token each (speculative decoding).
    ``swapped_blocks`` are KV blocks moved before the step, between GPU and host memory, and GPU and disk.
    """

    num_decodes: int
    decode_context_tokens: tuple[int, ...]
    chunks: tuple[tuple[int, int], ...]
    num_sampled: int
    num_draft_tokens: int = 0
    swapped_blocks: tuple[int, int] = (0, 0)

    @property
    def num_tokens(self) -> int:
        """Tokens in the step: rows of the fused matrix products."""
        tokens = self.num_decodes + self.num_draft_tokens
        for new, _ in self.chunks:
            tokens += new
        return tokens


class AffineSteps(NamedTuple):
    """Durations of consecutive steps: step j of the run takes ``first_s + j * growth_s``.

    Holds for j < ``num_steps``; after that the law must be asked again.
    """

    first_s: float
    growth_s: float
    num_steps: int


class StepTime(Protocol):
    """A law of step time."""

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The distinct attention windows of the model's layers (None: full attention)."""
        ...

    def step_s(self, shape: StepShape) -> float:
        """Seconds of one step: GPU and host together, as the engine's scheduling mode overlaps them."""
        ...

    def decode_steps(
        self, num_decodes: int, context_tokens: tuple[int, ...], context_growth: tuple[int, ...]
    ) -> AffineSteps:
        """Durations of a run of pure decode steps.

        ``context_tokens`` as in StepShape at the first step; each step adds ``context_growth``.
        Equals ``step_s`` on every step of the run.
        """
        ...


def build_step_time(
    model: ModelProfile, gpu: GpuProfile, engine: EngineConfig, draft: ModelProfile | None = None
) -> StepTime:
    """The law that ``engine.step_time`` names; ``engine`` must be resolved (config.defaults.resolve_engine).

    ``draft`` is the profile of the draft model, where the engine speculates with one. The linear law counts
    drafts as tokens and knows no time of drafting.
    Raises ConfigError when the GPU lacks coefficients that the law needs.
    """
    # The laws build on the records above, so they can only be imported once those exist.
    from servesim.cost.calibrated import CalibratedLaw
    from servesim.cost.first_calls import FirstCallLaw
    from servesim.cost.linear import LinearLaw
    from servesim.cost.operators import OperatorLaw
    from servesim.cost.speculative import SpeculativeLaw
    from servesim.cost.swap import SwapLaw

    if engine.preemption_mode == "swap":
        law = build_step_time(model, gpu, engine.model_copy(update={"preemption_mode": "recompute"}), draft)
        return SwapLaw(law, model, gpu, engine)
    if isinstance(engine.step_time, LinearStepTime):
        return LinearLaw(engine.step_time)
    factored = engine.step_time.gpu_time_factor != 1.0 or engine.step_time.bandwidth_factor != 1.0
    law_type = CalibratedLaw if factored else OperatorLaw
    if engine.speculative is None:
        plain: StepTime = law_type(model, gpu, engine)
    else:
        plain = SpeculativeLaw(lambda one, under: law_type(one, gpu, under), model, gpu, engine, draft)
    return plain if gpu.efficiency.first_call is None else FirstCallLaw(plain, model, gpu, engine)
