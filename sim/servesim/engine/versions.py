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
    keeps_windows_in_flight: bool = False
    """Blocks that leave an attention window are freed once the step that passes them has been processed."""
    keeps_turns: bool = False
    """Nobody loses its turn when a victim, passed over in this step, leaves its place among the running."""
    lookahead_at_admission: bool = False
    """Speculation: lookahead slots are allocated from a request's first chunk on, not from its second."""
    pads_new_decodes: bool = False
    """Speculation: a request that starts with one token beside pure decodes is padded to their size."""
    pads_without_decodes: bool = False
    """The same when nothing else runs; and not where max_model_len leaves no room for the padding."""
    hashes_lookahead: bool = False
    """EAGLE and MTP: a block's hash covers the next token too; before, the last hit block was dropped."""
    charges_draft_rows: bool = False
    """A draft model's extra rows are charged per scheduled request, not taken from every step's budget."""
    caches_verified_at_commit: bool = False
    """Speculation: accepted tokens become hit-able when their output is processed, in sync mode too."""


RULES: dict[EngineVersion, Rules] = {
    "0.22": Rules(blank_blocks_first=False, has_watermark=False, self_preemption_continues=False),
    "0.26": Rules(
        blank_blocks_first=True,
        has_watermark=True,
        self_preemption_continues=False,
        keeps_windows_in_flight=True,
        lookahead_at_admission=True,
        pads_new_decodes=True,
    ),
    "0.33": Rules(
        blank_blocks_first=True,
        has_watermark=True,
        self_preemption_continues=True,
        keeps_turns=True,
        keeps_windows_in_flight=True,
        lookahead_at_admission=True,
        pads_new_decodes=True,
        pads_without_decodes=True,
        hashes_lookahead=True,
        charges_draft_rows=True,
        caches_verified_at_commit=True,
    ),
}
