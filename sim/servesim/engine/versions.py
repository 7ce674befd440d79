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
    victim_never_hides_next: bool
    """Whoever follows a victim in the running list gets its turn; else it is passed over in that step when
    the victim's turn was over without tokens (its last one was on its way)."""
    threshold_spares_lone_request: bool
    """long_prefill_token_threshold does not bind while there is no second request."""


_V0_22 = Rules(
    blank_blocks_first=False,
    has_watermark=False,
    self_preemption_continues=False,
    victim_never_hides_next=False,
    threshold_spares_lone_request=False,
)
_V0_26 = _V0_22._replace(blank_blocks_first=True, has_watermark=True)
_V0_33 = _V0_26._replace(
    self_preemption_continues=True, victim_never_hides_next=True, threshold_spares_lone_request=True
)

RULES: dict[EngineVersion, Rules] = {"0.22": _V0_22, "0.26": _V0_26, "0.33": _V0_33}
