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
    victim_never_hides_next: bool = False
    """Whoever follows a victim in the running list gets its turn; else it is passed over in that step when
    the victim's turn was over without tokens (its last one was on its way)."""
    threshold_spares_lone_request: bool = False
    """long_prefill_token_threshold does not bind while there is no second request."""
    windows_wait_for_output: bool = True
    """Blocks that have left a sliding window are freed when the output of their step has been processed, not
    before, and admission counts the tokens of all steps in flight; matters with async scheduling only."""
    lookahead_at_admission: bool = False
    """Speculation: lookahead slots are allocated from a request's first chunk on, not from its second."""
    pads_new_decodes: bool = False
    """Speculation: a request that starts with one token beside pure decodes is padded to their size."""
    pads_without_decodes: bool = False
    """The same when nothing else runs; and not where max_model_len leaves no room for the padding."""
    threshold_stops_padding: bool = False
    """Speculation: no padding where long_prefill_token_threshold is no more than the drafts."""
    hashes_lookahead: bool = False
    """EAGLE and MTP: a block's hash covers the next token too; before, the last hit block was dropped."""
    charges_draft_rows: bool = False
    """A draft model's extra rows are charged per scheduled request, not taken from every step's budget."""
    caches_verified_at_commit: bool = False
    """Speculation: accepted tokens become hit-able when their output is processed, in sync mode too."""


_OLDEST = Rules(
    blank_blocks_first=False,
    has_watermark=False,
    self_preemption_continues=False,
    windows_wait_for_output=False,
)

RULES: dict[EngineVersion, Rules] = {
    "0.6": _OLDEST,  # the oldest rules that are verified stand in for these three
    "0.11": _OLDEST,
    "0.19": _OLDEST,
    "0.22": _OLDEST,
    "0.26": Rules(
        blank_blocks_first=True,
        has_watermark=True,
        self_preemption_continues=False,
        lookahead_at_admission=True,
        pads_new_decodes=True,
    ),
    "0.32": Rules(
        blank_blocks_first=True,
        has_watermark=True,
        self_preemption_continues=False,
        victim_never_hides_next=True,
        threshold_spares_lone_request=True,
        lookahead_at_admission=True,
        pads_new_decodes=True,
        pads_without_decodes=True,
        charges_draft_rows=True,
    ),
    "0.33": Rules(
        blank_blocks_first=True,
        has_watermark=True,
        self_preemption_continues=True,
        victim_never_hides_next=True,
        threshold_spares_lone_request=True,
        lookahead_at_admission=True,
        pads_new_decodes=True,
        pads_without_decodes=True,
        threshold_stops_padding=True,
        hashes_lookahead=True,
        charges_draft_rows=True,
        caches_verified_at_commit=True,
    ),
}
