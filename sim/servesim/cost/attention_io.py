"""What attention moves between HBM and the SMs' shared memory: an exploration knob, not a calibrated law.

Flash attention keeps a tile of query rows on an SM and streams all keys and values past it, so that the
traffic falls with the rows that fit; standard attention writes its scores to HBM and reads them back.
Source of the counts: T. Dao et al., FlashAttention, NeurIPS 2022, theorem 2; order of loops as in its
second version (queries outside).
"""

from __future__ import annotations

from servesim.config.profiles import GpuProfile

__all__ = ["FlashIo", "flash_bytes", "l2_hit", "standard_bytes", "tile_rows"]

_STAGES = 2  # keys and values of the next tile are loaded while this one is used
_COLUMNS = (64, 32, 16)  # keys of a tile, as wide as leaves room for queries
_RESERVED_BYTES = 1024  # of shared memory, per thread block
_REGISTER_SHARE = 0.5  # of the register file, for scores and output in fp32
_L2_HIT = 0.8  # tiles of a head that run together share keys and values; low end of 0.8 to 0.95, estimate


def tile_rows(
    shared_memory_bytes: float,
    head_dim: float,
    element_bytes: float = 2.0,
    register_file_bytes: float | None = None,
) -> int:
    """Query rows that one SM keeps while keys and values stream past in double-buffered tiles.

    A multiple of 64, or of 16 where 64 do not fit; 0 when nothing fits.  ``register_file_bytes`` also holds
    the fp32 scores and output of the rows; None leaves that limit out.  A narrower stream makes room for 64
    rows and no more, so that more shared memory never means fewer rows.
    """
    for columns in _COLUMNS:
        stream = _STAGES * 2 * columns * head_dim * element_bytes
        rows = (shared_memory_bytes - _RESERVED_BYTES - stream) / (head_dim * element_bytes)
        if register_file_bytes is not None:
            rows = min(rows, _REGISTER_SHARE * register_file_bytes / (4.0 * (head_dim + columns)))
        if rows >= 64:
            return int(rows) // 64 * 64 if columns == _COLUMNS[0] else 64
        if rows >= 16 and columns == _COLUMNS[-1]:
            return int(rows) // 16 * 16
    return 0


def flash_bytes(
    num_queries: float,
    pairs: float,
    head_dim: float,
    rows: float,
    hit: float = 0.0,
    element_bytes: float = 2.0,
) -> float:
    """HBM bytes of one head: queries and output once, keys and values once per tile of ``rows`` queries.

    ``pairs`` are the query-key pairs that are computed; ``hit`` is the share of the stream that L2 serves.
    """
    streamed = pairs / min(rows, num_queries) * (1.0 - hit)
    return 2.0 * head_dim * element_bytes * (num_queries + streamed)


def standard_bytes(num_queries: float, num_keys: float, head_dim: float, element_bytes: float = 2.0) -> float:
    """HBM bytes of one head: scores and probabilities written and read, inputs and output once."""
    scores = 4.0 * num_queries * num_keys
    return (scores + 2.0 * (num_queries + num_keys) * head_dim) * element_bytes


def l2_hit(l2_bytes: float, num_keys: float, head_dim: float, element_bytes: float = 2.0) -> float:
    """Share of the key and value stream that L2 serves: falls once those of one KV head outgrow it."""
    return _L2_HIT * min(1.0, l2_bytes / (2.0 * num_keys * head_dim * element_bytes))


class FlashIo:
    """HBM time of flash attention on a GPU with another amount of shared memory than its own.

    At its own amount, or with more, the measured efficiency stands and this law says nothing.
    """

    __slots__ = ("_bytes_per_s", "_head_dim", "_heads", "_l2_bytes", "rows")

    def __init__(
        self, gpu: GpuProfile, shared_memory_bytes: float, heads: int, head_dim: float, bytes_per_s: float
    ) -> None:
        self._bytes_per_s, self._heads, self._head_dim = bytes_per_s, heads, head_dim
        self._l2_bytes = gpu.l2_bytes
        registers = gpu.register_file_per_sm_bytes
        own, self.rows = (
            tile_rows(size, head_dim, register_file_bytes=registers)
            for size in (gpu.shared_memory_per_sm_bytes, shared_memory_bytes)
        )
        if self.rows >= own:
            self._bytes_per_s = float("inf")

    def seconds(self, num_queries: int, pairs: float, num_keys: int) -> float:
        """Time to move the bytes of all heads for one prompt chunk."""
        hit = l2_hit(self._l2_bytes, num_keys, self._head_dim)
        moved_bytes = self._heads * flash_bytes(num_queries, pairs, self._head_dim, self.rows, hit)
        return moved_bytes / self._bytes_per_s
