"""Step time as a linear function of what a step computes: the law that scheduler traces are checked with."""

from __future__ import annotations

from servesim.config.scenario import LinearStepTime
from servesim.cost.step_time import UNLIMITED_STEPS, AffineSteps, StepShape

__all__ = ["LinearLaw"]


class LinearLaw:
    """base_s + per_token_s * scheduled tokens + per_context_token_s * (computed before + scheduled) tokens.

    The last sum runs over the requests of the step and ignores attention windows.
    """

    windows: tuple[int | None, ...] = (None,)

    def __init__(self, config: LinearStepTime) -> None:
        self._base_s = config.base_s
        self._per_token_s = config.per_token_s
        self._per_context_token_s = config.per_context_token_s

    def step_s(self, shape: StepShape) -> float:
        """Seconds of one step."""
        context = shape.decode_context_tokens[0] + sum(new + cached for new, cached in shape.chunks)
        return self._base_s + self._per_token_s * shape.num_tokens + self._per_context_token_s * context

    def decode_steps(
        self, num_decodes: int, context_tokens: tuple[int, ...], context_growth: tuple[int, ...]
    ) -> AffineSteps:
        """Durations of a run of pure decode steps."""
        first_s = self.step_s(StepShape(num_decodes, context_tokens, (), num_decodes))
        return AffineSteps(first_s, self._per_context_token_s * context_growth[0], UNLIMITED_STEPS)

    def breakdown(self, shape: StepShape) -> dict[str, float]:
        """Seconds of one step by term of the law."""
        tokens_s = self._per_token_s * shape.num_tokens
        return {
            "base": self._base_s,
            "tokens": tokens_s,
            "context": self.step_s(shape) - self._base_s - tokens_s,
        }
