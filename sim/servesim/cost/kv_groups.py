"""How vLLM divides a KV cache into groups of layers and pages, and the blocks that a request then needs."""

from __future__ import annotations

from dataclasses import dataclass

from servesim.config.kv_formats import KV_FORMATS
from servesim.config.profiles import ModelProfile
from servesim.config.scenario import EngineConfig

__all__ = ["KvLayout", "kv_layout"]

_UNEVEN = 1.5  # group size follows the larger kind of layer when the two differ by less than this


@dataclass(frozen=True, slots=True)
class KvLayout:
    """Pages of one GPU's KV cache.

    A block is one page of ``layers_per_group`` layers; a request has one table of blocks per group, all drawn
    from one pool.  ``group_windows`` holds the attention window of each group (None: full attention).
    """

    block_size: int
    page_bytes: int
    layers_per_group: int
    group_windows: tuple[int | None, ...]
    token_bytes: int
    """KV bytes per GPU of one token in all layers, windows ignored."""
    in_flight_tokens: int
    """Tokens that may be computed before a sliding window's old blocks are freed."""

    @property
    def block_bytes(self) -> int:
        """Bytes of one block of the pool."""
        return self.page_bytes * self.layers_per_group

    def blocks_per_request(self, num_tokens: int) -> int:
        """Most blocks that one request of ``num_tokens`` holds at once.

        A sliding group keeps its window and the tokens in flight, and one block more because neither need
        begin at a block's edge.
        """
        blocks = 0
        for window in self.group_windows:
            if window is None:
                blocks += -(-num_tokens // self.block_size)
            else:
                kept = min(window - 1 + self.in_flight_tokens, num_tokens)
                blocks += -(-kept // self.block_size) + 1
        return blocks

    def largest_request_tokens(self, num_blocks: int, limit: int) -> int:
        """Longest request, up to ``limit`` tokens, that ``num_blocks`` blocks can hold; 0 when none."""
        low, high = 0, limit
        while low < high:
            middle = (low + high + 1) // 2
            if self.blocks_per_request(middle) <= num_blocks:
                low = middle
            else:
                high = middle - 1
        return low


def kv_layout(model: ModelProfile, engine: EngineConfig) -> KvLayout:
    """The groups and pages of ``model`` under ``engine``, which must be resolved.

    Layers of one kind make one group.  Several kinds are cut into groups of equal size: that of the rarest
    kind, or of the commonest when the two are close; the last group of a kind may be padded.
    KV heads split down to one per GPU, an MLA latent is whole on every GPU.
    Source: vLLM 0.26, KV cache grouping and page size.
    """
    if engine.max_num_batched_tokens is None:
        raise ValueError("the engine is not resolved: call config.defaults.resolve_engine first")
    dtype_bytes = KV_FORMATS[engine.kv_cache_dtype].bytes_per_element(model.head_dim)
    split = min(engine.tensor_parallel_size, model.num_kv_heads)
    layer_bytes = int(model.kv_bytes_per_token_and_layer(dtype_bytes)) // split
    counts = {window: model.windows.count(window) for window in dict.fromkeys(model.windows)}
    least, most = min(counts.values()), max(counts.values())
    size = most if len(counts) == 1 or most < _UNEVEN * least else least
    groups = [window for window, count in counts.items() for _ in range(-(-count // size))]
    return KvLayout(
        block_size=engine.block_size,
        page_bytes=engine.block_size * layer_bytes,
        layers_per_group=size,
        group_windows=tuple(groups),
        token_bytes=layer_bytes * model.num_layers,
        in_flight_tokens=engine.max_num_batched_tokens * (2 if engine.async_scheduling else 1),
    )
