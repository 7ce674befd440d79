"""What a scenario may say about requests that are answered by several sequences."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from servesim.config.record import Record, RuleError

__all__ = ["SamplingConfig"]


class SamplingConfig(Record):
    """Several sequences from one prompt, decoded together over shared blocks (vLLM up to its V0 engine).

    Blocks are shared by reference and copied on the first write; prompts are not shared between requests.
    """

    method: Literal["parallel", "beam"]
    """parallel: n samples, which never meet again; beam: the n best continuations of all sequences go on."""
    n: int = Field(ge=1, le=64)
    """Sequences of a request (best_of, beam width). All of them have the request's output length."""
    concentration: float | None = Field(default=None, gt=0, le=100)
    """For method beam: how undecided the model is about its next token, on average over requests; empty:
    0.4, an estimate (docs/sharing.md). A higher one brings beams together sooner, so that they share more."""

    @model_validator(mode="after")
    def _concentration_needs_beams(self) -> SamplingConfig:
        if self.concentration is not None and self.method != "beam":
            raise RuleError("is for method: beam", path=("concentration",), next_step="remove it")
        return self
