"""Where the scheduling rules of vLLM versions differ, and nowhere else."""

from __future__ import annotations

from typing import NamedTuple

from servesim.config.scenario import EngineVersion

__all__ = ["RULES", "Rules"]


class Rules(NamedTuple):
    """What changed between versions of vLLM's V1 scheduler that a schedule can show."""

    blank_blocks_first: bool
    """Freed blocks without a hash go to the front of the free queue, not to its back."""
    has_watermark: bool
    """The watermark option exists."""
    self_preemption_continues: bool
    """Under the priority policy a request that preempts itself does not end the step's scheduling."""


_OLDEST = Rules(blank_blocks_first=False, has_watermark=False, self_preemption_continues=False)

RULES: dict[EngineVersion, Rules] = {
    "0.6": _OLDEST,  # the oldest rules that are verified stand in for these three
    "0.11": _OLDEST,
    "0.19": _OLDEST,
    "0.22": _OLDEST,
    "0.26": Rules(blank_blocks_first=True, has_watermark=True, self_preemption_continues=False),
    "0.33": Rules(blank_blocks_first=True, has_watermark=True, self_preemption_continues=True),
}
