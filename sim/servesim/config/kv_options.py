"""What an engine may do with KV that it has no room for: swap it out, or drop it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from servesim.config.record import Record, RuleError

__all__ = ["KvEvictionConfig", "SwapConfig"]


class SwapConfig(Record):
    """How fast blocks move between the GPU and the swap space, and the disk behind host memory."""

    copy_launch_us: float = Field(default=6.0, ge=0, le=1000)
    """Time of one copy besides its bytes; a block takes one for keys and one for values in every layer.
    5 to 7 us were measured for cudaMemcpyAsync (arXiv 2602.21548, section 5.2)."""
    pcie_efficiency: float = Field(default=0.78, gt=0, le=1)
    """Share of the GPU's nominal PCIe bandwidth that large copies reach: 25 of 32 GB/s on A100 (NVIDIA's
    nvbandwidth, as reported in its issue 42)."""
    disk_gib: float = Field(default=0.0, ge=0, le=1e6)
    """Swap space on disk, per GPU, for what host memory has no room for."""
    disk_gb_per_s: float = Field(default=3.0, gt=0, le=1000)
    """Per GPU and direction; an estimate for one NVMe drive."""


class KvEvictionConfig(Record):
    """A budget of KV tokens per request: older ones are dropped. Memory and time only: what the model answers
    without them is not modelled."""

    policy: Literal["sliding-sink", "heavy-hitters"]
    """sliding-sink keeps the first and the newest tokens (StreamingLLM); heavy-hitters any tokens, after the
    whole prompt has been computed (H2O): what is kept moves into leading blocks, and each new token takes the
    slot of a dropped one."""
    sink_tokens: int = Field(default=4, ge=0)
    """First tokens that sliding-sink never drops; part of the budget."""
    budget_tokens: int | None = Field(default=None, ge=1)
    """Most KV tokens of a request."""
    budget_fraction: float | None = Field(default=None, gt=0, le=1)
    """The same as a share of max_model_len."""

    @model_validator(mode="after")
    def _has_one_budget(self) -> KvEvictionConfig:
        if (self.budget_tokens is None) == (self.budget_fraction is None):
            raise RuleError("needs exactly one of budget_tokens and budget_fraction")
        if self.budget_tokens is not None and self.sink_tokens >= self.budget_tokens:
            raise RuleError("leaves no token of the budget to the newest ones", path=("sink_tokens",))
        return self
