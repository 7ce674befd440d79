"""How oneDNN cuts a product into blocks that fit the caches of one core with AMX.

Rules of oneDNN 3.12, src/cpu/x64/matmul/amx_blocking_heuristics.cpp, for bf16, one thread, prepared weights,
L1 of 48 KiB, L2 of 2 MiB with 16 ways and 2,048 sets; docs/model.md, "Products on a CPU".  Sizes are numbers,
or numpy arrays of equal shape where the signature says Any.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

__all__ = ["code", "inner_block", "is_turned", "is_uneven"]

_TILE_ROWS, _TILE_INNER, _STRIP = 16, 32, 32  # a tile of AMX; rows or columns that are worked on together
_INNER_TILES = 15  # of a strip, that L1 has room for beside two results
_L2_BYTES = 3 * 2**20 / 2  # what may be used of it
_L2_WAY_BYTES, _L2_WAYS, _PAGE_BYTES = 2**17, 12, 4096  # one way of all sets; ways that may be used


def inner_block(k: Any) -> Any:
    """The longest part that the inner dimension is cut into: as even parts as L1 has room for."""
    tiles = -(-k // _TILE_INNER)
    return -(-tiles // -(-tiles // _INNER_TILES)) * _TILE_INNER


def is_uneven(k: Any) -> Any:
    """Whether the last part is shorter, so that all code is generated twice."""
    return k % inner_block(k) > 0


def is_turned(num_rows: Any, n: Any, k: Any) -> Any:
    """Whether it goes along the rows, since they do not stay in L2 while it goes along the columns.

    They take too many bytes, with two strips of the weights and the results, or results of rows that are a
    power of two apart take too many ways of the same sets.
    """
    num_rows = num_rows + (num_rows < 1)
    tiles = -(-num_rows // _TILE_ROWS)
    strip = 2 * -(-num_rows // tiles)
    held_rows = -(-num_rows // strip) * strip
    kept_bytes = held_rows * (2 * k + 12 * _STRIP) + 2 * _STRIP * 2 * k
    apart_bytes = (2 * n - 1) % _PAGE_BYTES + 1
    ways = -(-num_rows * apart_bytes // _L2_WAY_BYTES)
    return (kept_bytes > _L2_BYTES) | ((_L2_WAY_BYTES % apart_bytes == 0) & (ways >= _L2_WAYS))


@lru_cache(maxsize=100_000)
def code(num_rows: int, n: int, k: int) -> tuple[float, int]:
    """How many rows, or columns where it is turned, code is unrolled over, and over how much of k.

    Counted again for every further version, of a shorter last block.  A block of the whole inner dimension
    counts half: no code has to add to results that are there.
    """
    if not is_turned(num_rows, n, k):
        return num_rows * (1 + is_uneven(k)), inner_block(k)
    columns, inner = _turned_block(num_rows, n, k)
    tile = -(-num_rows // -(-num_rows // _TILE_ROWS))
    last_tiles = -(-(num_rows % (2 * tile)) // tile)
    versions = (1 + (k % inner > 0)) * (1 + last_tiles / 2) * (1 + n % columns / columns)
    return min(columns, n) * versions * (0.5 if inner == k else 1.0), inner


def _turned_block(num_rows: int, n: int, k: int) -> tuple[int, int]:
    """Columns and inner dimension of the weights that stay in L2: of those that fit, most work per byte."""
    best = (0.0, _STRIP, inner_block(k))
    for columns in _parts(n):
        for inner in _parts(k):
            held = inner * (4 * _STRIP + 2 * columns) + 12 * _STRIP * columns
            if inner < inner_block(k) or held > _L2_BYTES:
                continue
            inner = min(inner, k)
            results_stay = inner == k or 4 * (num_rows * (inner + columns) + columns * inner) < _L2_BYTES
            moved = 2 * inner * (_STRIP + columns) + (0 if results_stay else 4 * _STRIP * columns)
            best = max(best, (_STRIP * inner * columns / moved, columns, inner))
    return best[1], best[2]


def _parts(size: int) -> list[int]:
    """Lengths of even parts of a dimension, in whole strips."""
    strips = -(-size // _STRIP)
    return sorted({-(-strips // count) * _STRIP for count in range(1, strips + 1)}, reverse=True)
