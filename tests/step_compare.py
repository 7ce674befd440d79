"""Where two step traces part: what vLLM did and what servesim does."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import Any

__all__ = ["BLOCK_KEYS", "KEYS", "first_difference"]

Step = dict[str, Any]

KEYS = (
    "sched", "total_tokens", "new", "resumed", "preempted", "draft", "running", "waiting", "used_blocks",
    "free_blocks", "evicted", "accepted", "emitted", "finished", "free_after", "stuck", "endless",
)  # fmt: skip
BLOCK_KEYS = ("tables", "evicted_ids")
"""The very blocks; compared when both traces have them."""


def first_difference(
    ours: Iterable[Step], theirs: Iterable[Step], keys: Sequence[str] = (*KEYS, *BLOCK_KEYS)
) -> str | None:
    """The first step and key in which two traces differ, in words; None when they agree in all.

    An absent key and an empty value are the same, except for block keys, which one side may leave out.
    """
    for index, (our, their) in enumerate(zip_longest(ours, theirs)):
        if our is None or their is None:
            longer = "vLLM" if our is None else "servesim"
            return f"step {index}: only {longer} goes on, with {our or their}"
        for key in keys:
            if key in BLOCK_KEYS and not (key in our and key in their):
                continue
            a, b = our.get(key), their.get(key)
            if (a or None) != (b or None):
                return f"step {index}: {key}: servesim {a}, vLLM {b}"
            if key == "sched" and list(a or ()) != list(b or ()):
                return f"step {index}: order of requests: servesim {list(a or ())}, vLLM {list(b or ())}"
    return None
