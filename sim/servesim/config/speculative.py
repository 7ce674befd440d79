"""What a scenario may say about speculative decoding, and what vLLM allows of it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from servesim.config.record import Record, RuleError

__all__ = [
    "AcceptanceConfig",
    "DepthAcceptance",
    "IidAcceptance",
    "Rate",
    "RecordedAcceptance",
    "SpeculativeConfig",
    "SpeculativeMethod",
]

SpeculativeMethod = Literal["ngram", "draft", "eagle", "mtp", "medusa"]

_ASYNC_METHODS: dict[SpeculativeMethod, bool] = {
    "ngram": False,
    "medusa": False,
    "draft": True,
    "eagle": True,
    "mtp": True,
}
"""Methods that vLLM can schedule asynchronously (source: its checks of async_scheduling in 0.22 to 0.33)."""

Rate = Annotated[float, Field(ge=0, le=1)]


class IidAcceptance(Record):
    """Every draft is accepted with the same probability, once all drafts before it are."""

    law: Literal["iid"]
    rate: Rate


class DepthAcceptance(Record):
    """A draft is accepted with a probability that depends on its depth, once all drafts before it are."""

    law: Literal["by_depth"]
    rates: Annotated[tuple[Rate, ...], Field(min_length=1)]
    """Of the first draft, the second, ...; as many as num_speculative_tokens. vLLM's acceptance rate at a
    position is the product up to there."""


class RecordedAcceptance(Record):
    """Recorded verification steps, one after another; every request starts at a row drawn at random."""

    law: Literal["recorded"]
    file: str = Field(min_length=1)
    """CSV (gzip or plain): beside the scenario, in ./scenarios, or a shipped one."""
    column: str = Field(default="tokens", min_length=1)
    """Tokens that a step yielded for a request: its accepted drafts and one more."""


def _law(acceptance: Any) -> Any:
    return acceptance.get("law") if isinstance(acceptance, dict) else getattr(acceptance, "law", None)


AcceptanceConfig = Annotated[
    Annotated[IidAcceptance, Tag("iid")]
    | Annotated[DepthAcceptance, Tag("by_depth")]
    | Annotated[RecordedAcceptance, Tag("recorded")],
    Discriminator(_law),
]


class SpeculativeConfig(Record):
    """Speculative decoding: who proposes tokens, how many, and how many of them the model accepts."""

    method: SpeculativeMethod
    """ngram repeats what followed the same words before; draft runs a smaller model; eagle and mtp run one
    layer behind the model's own; medusa has one head per token."""
    num_speculative_tokens: int = Field(ge=1, le=64)
    """Drafts per request and step."""
    acceptance: AcceptanceConfig
    draft_model: str | None = None
    """For method draft: name of a file in hardware/models, or a path to one."""
    tree_tokens: int | None = Field(default=None, ge=1, le=1024)
    """For exploration, medusa only: candidates that a step verifies per request, all branches of the tree
    counted. Empty: one chain, as vLLM verifies it. The other branches cost time, and no KV slots."""
    draft_host_s: float | None = Field(default=None, ge=0, le=1)
    """Host time per request to look its drafts up; empty: 10 us for ngram, an estimate, and 0 otherwise."""

    @model_validator(mode="after")
    def _is_consistent(self) -> SpeculativeConfig:
        if (self.method == "draft") != (self.draft_model is not None):
            raise RuleError(
                "comes with method: draft, and not otherwise",
                path=("draft_model",),
                next_step="name the draft model, or choose another method",
            )
        rates = self.acceptance.rates if isinstance(self.acceptance, DepthAcceptance) else None
        if rates is not None and len(rates) != self.num_speculative_tokens:
            raise RuleError(
                f"needs one rate for each of the {self.num_speculative_tokens} drafts",
                path=("acceptance", "rates"),
                next_step="change the list, or num_speculative_tokens",
            )
        if self.tree_tokens is not None and self.method != "medusa":
            raise RuleError("is for method: medusa", path=("tree_tokens",), next_step="remove it")
        if self.tree_tokens is not None and self.tree_tokens < self.num_speculative_tokens:
            raise RuleError("is smaller than the chain of num_speculative_tokens", path=("tree_tokens",))
        return self

    @property
    def can_be_async(self) -> bool:
        """vLLM schedules ahead only when the drafter's tokens need not come back to the host."""
        return _ASYNC_METHODS[self.method]

    def async_by_default(self, version: str) -> bool:
        """Whether vLLM of ``version`` schedules asynchronously unless told not to.

        With a draft model it can since 0.22 when asked to, and does so by itself from 0.32 on.
        """
        return self.can_be_async and (self.method != "draft" or version in ("0.32", "0.33"))

    @property
    def keeps_kv(self) -> bool:
        """The drafter has layers of attention, whose KV lives in the pool's blocks."""
        return self.method in ("draft", "eagle", "mtp")

    @property
    def reads_hidden_states(self) -> bool:
        """The drafter's input at a token is the model's hidden state and the token behind it."""
        return self.method in ("eagle", "mtp")

    @property
    def draft_rows(self) -> int:
        """Tokens that drafting adds to the first pass for every request: a draft model re-reads one."""
        return 1 if self.method == "draft" else 0
