"""Where blocks lie in the pool: their ids as runs of consecutive slots."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["spans_of"]


def spans_of(ids: Sequence[int], block_size: int) -> list[tuple[int, int]]:
    """(first slot, slots) of each run of blocks with consecutive ids, in their order.

    Block 1 begins at slot 0: vLLM's null block, id 0, holds nothing and stands for blocks given back (-1).
    """
    spans: list[tuple[int, int]] = []
    begin = before = -2
    count = 0
    for block in (*ids, -2):
        if count and block == before + (begin > 0):
            count += 1
        else:
            if count:
                spans.append((-1 if begin == 0 else (begin - 1) * block_size, count * block_size))
            begin, count = block, 1
        before = block
    return spans
