"""CUDA graphs: which steps are replayed from one, how they are padded, what launching the rest takes."""

from __future__ import annotations

from bisect import bisect_left

from servesim.config.profiles import GpuProfile
from servesim.config.scenario import EngineConfig

__all__ = ["GraphModes", "captured_sizes", "padded_tokens"]

_LARGEST = 512
_LARGEST_BLACKWELL = 1024  # data-centre Blackwell, vLLM 0.32 and 0.33

_LAUNCH_S = 6.5e-6  # 5 to 8 us a kernel without CUDA graphs, estimate
_EAGER_KERNELS_PER_LAYER = 11  # 10 to 12, estimate
_PIECEWISE_LAUNCHES_PER_LAYER = 3  # one graph, writing the KV cache, attention; estimate


def captured_sizes(gpu: GpuProfile, engine: EngineConfig) -> tuple[int, ...]:
    """Token counts that vLLM captures for this engine, ascending; none when it runs eagerly.

    1, 2, 4, then every 8 below 256 and every 16 above, up to the least of 2 * max_num_seqs * tokens of a
    decode (1 and its drafts), 512 (or 1,024, see above) and max_num_batched_tokens.
    Source: vLLM 0.26 and 0.33, default cudagraph capture sizes.
    """
    if engine.max_num_seqs is None or engine.max_num_batched_tokens is None:
        raise ValueError("the engine is not resolved: call config.defaults.resolve_engine first")
    if engine.enforce_eager or engine.cudagraph_mode == "none":
        return ()
    blackwell = engine.version in ("0.32", "0.33") and gpu.architecture == "blackwell"
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


class GraphModes:
    """How an engine's ``cudagraph_mode`` runs a step: from one graph, from one per layer piece, or eagerly.

    A full graph holds attention too; a piecewise one leaves it out, so that it is launched layer by layer;
    full_decode_only has no graphs for steps with prompt chunks, full_and_piecewise piecewise ones.
    Steps above the largest captured size always run eagerly.
    Source of the modes: vLLM 0.26, CUDAGraphMode.
    """

    __slots__ = ("_eager_s", "_largest", "_piecewise_s", "decode_floor_s", "mixed_floor_s", "sizes")

    def __init__(self, gpu: GpuProfile, engine: EngineConfig, num_layers: int) -> None:
        collectives = 2 if engine.tensor_parallel_size > 1 else 0
        self._eager_s = _LAUNCH_S * (_EAGER_KERNELS_PER_LAYER + collectives) * num_layers
        self._piecewise_s = _LAUNCH_S * _PIECEWISE_LAUNCHES_PER_LAYER * num_layers
        self.sizes = captured_sizes(gpu, engine)
        self._largest = self.sizes[-1] if self.sizes else 0
        mode = engine.cudagraph_mode
        self.decode_floor_s = self._piecewise_s if mode == "piecewise" else 0.0
        if mode == "full":
            self.mixed_floor_s = 0.0
        else:
            self.mixed_floor_s = self._eager_s if mode == "full_decode_only" else self._piecewise_s

    def launch_floor_s(self, num_tokens: int, is_decode: bool) -> float:
        """Seconds below which launching the kernels of a step cannot be done."""
        if num_tokens > self._largest:
            return self._eager_s
        return self.decode_floor_s if is_decode else self.mixed_floor_s

    def rows(self, num_tokens: int) -> int:
        """Rows of the step's matrix products.

        Steps of a size that was captured are charged its padding also where full_decode_only runs them
        eagerly, so that a step never gets faster by one more prompt token.
        """
        return padded_tokens(num_tokens, self.sizes)
