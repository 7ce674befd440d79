"""CUDA graphs: which batch sizes are captured, and how a step is padded to them."""

from __future__ import annotations

from bisect import bisect_left

from servesim.config.profiles import GpuProfile
from servesim.config.scenario import EngineConfig

__all__ = ["captured_sizes", "padded_tokens"]

_LARGEST = 512
_LARGEST_BLACKWELL = 1024  # data-centre Blackwell, vLLM 0.33


def captured_sizes(gpu: GpuProfile, engine: EngineConfig) -> tuple[int, ...]:
    """Token counts that vLLM captures for this engine, ascending; none when it runs eagerly.

    1, 2, 4, then every 8 below 256 and every 16 above, up to the least of 2 * max_num_seqs * tokens of a
    decode (1 and its drafts), 512 and max_num_batched_tokens.
    Source: vLLM 0.26 and 0.33, default cudagraph capture sizes.
    """
    if engine.max_num_seqs is None or engine.max_num_batched_tokens is None:
        raise ValueError("the engine is not resolved: call config.defaults.resolve_engine first")
    if engine.enforce_eager:
        return ()
    blackwell = engine.version == "0.33" and gpu.architecture == "blackwell"
    decode_tokens = 1 + (engine.speculative.num_speculative_tokens if engine.speculative else 0)
    largest = min(
        2 * engine.max_num_seqs * decode_tokens,
        _LARGEST_BLACKWELL if blackwell else _LARGEST,
        engine.max_num_batched_tokens,
    )
    sizes = {size for size in (1, 2, 4, *range(8, 256, 8), *range(256, largest + 1, 16)) if size <= largest}
    if largest == engine.max_num_batched_tokens:
        sizes.add(largest)
    return tuple(sorted(sizes))


def padded_tokens(num_tokens: int, sizes: tuple[int, ...]) -> int:
    """Tokens that really run: the next captured size, or ``num_tokens`` itself above the largest."""
    index = bisect_left(sizes, num_tokens)
    return sizes[index] if index < len(sizes) else num_tokens
