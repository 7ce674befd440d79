"""What a scenario may say about requests that are answered by several sequences."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from servesim.config.record import Record, RuleError

__all__ = ["SamplingConfig"]


class SamplingConfig(Record):
    """Several sequences from one prompt."""

    method: Literal["parallel", "beam"]
    """parallel: n samples, which never meet again; beam: the n best continuations of all sequences go on."""
    n: int = Field(ge=1, le=64)
    """Sequences of a request (best_of, beam width). All of them have the request's output length."""
    sharing: Literal["forks", "prefix-cache"] = "forks"
    """forks: the sequences are scheduled as one and share blocks by reference, copied on the first write
    (vLLM up to its V0 engine). prefix-cache, for method parallel: each is a request, and finds the full
    blocks of the prompt in the prefix cache (vLLM V1)."""
    concentration: float | None = Field(default=None, gt=0, le=100)
    """For method beam: how undecided the model is about its next token, on average over requests; empty:
    0.4, an estimate (docs/sharing.md). A higher one brings beams together sooner, so that they share more."""

    @model_validator(mode="after")
    def _is_of_its_method(self) -> SamplingConfig:
        if self.concentration is not None and self.method != "beam":
            raise RuleError("is for method: beam", path=("concentration",), next_step="remove it")
        if self.method == "beam" and self.sharing != "forks":
            raise RuleError("needs method: parallel (beams fork)", path=("sharing",), next_step="remove it")
        return self
