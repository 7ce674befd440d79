"""Laws of single GPU operations: seconds from sizes and a GPU's measured efficiency.

Every law is a launch time plus work over an achieved rate, and never falls when the work grows.  Work is
per GPU: the caller has divided by the tensor-parallel degree.  Coefficients come from the GPU's file
(Efficiency); the forms are those of docs/model.md, "Time of one step".
"""

from __future__ import annotations

import math
from typing import Literal

from servesim.config.profiles import GpuProfile
from servesim.errors import ConfigError, Problem, did_you_mean

__all__ = [
    "ALL_REDUCE_BYTES",
    "AllReduce",
    "DecodeAttention",
    "Dtype",
    "Elementwise",
    "Gemm",
    "PrefillAttention",
    "causal_pairs",
    "expected_distinct_experts",
]

Dtype = Literal["bf16", "fp8"]

DTYPE_BYTES: dict[Dtype, float] = {"bf16": 2.0, "fp8": 1.0}

ALL_REDUCE_BYTES = 2.0
"""Bytes of an activation that is summed between GPUs."""

_ROW_TILE = 64  # rows a tensor-core tile computes even when fewer are asked for
_WAVE_TILE = 128  # rows and columns of the tile that one SM works on
_MAX_WAVE_LOSS = 4.0

# FlashMLA on one H100 (vLLM 0.14, 128 heads, 16k context, batch 64 to 128, measured tables of
# aiconfigurator-core): 2.4 to 2.5 TB/s and 578 to 610 TFLOP/s at the same time.
_MLA_DECODE_MEMORY = 0.75
_MLA_DECODE_COMPUTE = 0.60


def expected_distinct_experts(num_experts: int, experts_per_token: int, num_tokens: int) -> float:
    """Experts that at least one of ``num_tokens`` tokens is routed to, when all are equally popular.

    Uneven popularity touches fewer, so this is the upper bound of the weights read.
    """
    return num_experts * (1.0 - (1.0 - experts_per_token / num_experts) ** num_tokens)


def causal_pairs(num_tokens: int, num_cached: int, window: int | None) -> float:
    """Query-key pairs of ``num_tokens`` new tokens behind ``num_cached`` cached ones, diagonal halved."""
    end = num_cached + num_tokens
    if window is None or end <= window:
        return num_tokens * (num_cached + 0.5 * num_tokens)
    start = min(num_cached, window)
    growing = (window - start) * 0.5 * (window + start)
    return growing + window * (end - max(num_cached, window))


class Gemm:
    """Matrix product of a step's tokens with one weight matrix.

    launch + (compute^knee + memory^knee)^(1/knee): a large knee is the plain roofline, a small one lets
    compute and memory time add up near the ridge.  Compute rounds rows up to the tile and pays for the last,
    partly filled wave of tiles over the SMs.
    Raises ConfigError when the GPU has no tensor cores or no coefficients for ``dtype``.
    """

    __slots__ = (
        "_flops_per_s",
        "_knee",
        "_memory_bytes_per_s",
        "_sm_count",
        "_wave",
        "dtype_bytes",
        "launch_s",
    )

    def __init__(self, gpu: GpuProfile, dtype: Dtype) -> None:
        efficiency = gpu.efficiency.gemm.get(dtype)
        if efficiency is None or dtype not in gpu.peak_flops_per_s:
            raise ConfigError(
                Problem(
                    f"{gpu.name} has no {dtype} matrix products",
                    path="engine.quantization" if dtype == "fp8" else "hardware.gpu",
                    got=dtype,
                    hint=f"it has: {', '.join(sorted(gpu.efficiency.gemm))}",
                    next_step="set engine.quantization: none, or choose a GPU with fp8 coefficients",
                )
            )
        self.dtype_bytes = DTYPE_BYTES[dtype]
        self.launch_s = efficiency.launch_s
        self._knee = efficiency.knee
        self._wave = efficiency.wave
        self._sm_count = gpu.sm_count
        self._flops_per_s = gpu.peak_flops_per_s[dtype] * efficiency.compute
        self._memory_bytes_per_s = gpu.hbm_bandwidth_bytes_per_s * efficiency.memory

    def seconds(self, num_rows: int, n: int, k: int) -> float:
        """Time of (num_rows x k) times (k x n)."""
        compute_s = self._compute_s(num_rows, n, k)
        full_rows = num_rows // _WAVE_TILE * _WAVE_TILE
        if 0 < full_rows < num_rows:
            # One more row of tiles can fill the last wave better than the law's penalty charged before;
            # a larger product still never takes less time than a smaller one.
            compute_s = max(compute_s, self._compute_s(full_rows, n, k))
        moved_bytes = self.dtype_bytes * (n * k + num_rows * k) + 2.0 * num_rows * n
        return self.launch_s + self._join(compute_s, moved_bytes / self._memory_bytes_per_s)

    def grouped_seconds(
        self, rows: float, groups: float, n: int, k: int, bytes_per_weight: float | None = None
    ) -> float:
        """Time of ``rows`` rows in all, spread evenly over ``groups`` experts' matrices of k x n.

        Each expert's share is rounded up to the tile.  ``bytes_per_weight`` differs from the type of the
        product when weights are expanded inside the kernel.
        """
        tile_rows = groups * math.ceil(rows / groups / _ROW_TILE) * _ROW_TILE
        weight_bytes = groups * n * k * (self.dtype_bytes if bytes_per_weight is None else bytes_per_weight)
        moved_bytes = weight_bytes + self.dtype_bytes * rows * k + 2.0 * rows * n
        compute_s = 2.0 * tile_rows * n * k / self._flops_per_s
        return self.launch_s + self._join(compute_s, moved_bytes / self._memory_bytes_per_s)

    def _compute_s(self, num_rows: int, n: int, k: int) -> float:
        tiles = -(-num_rows // _WAVE_TILE) * -(-n // _WAVE_TILE)
        loss = -(-tiles // self._sm_count) * self._sm_count / tiles
        waves = 1.0 + self._wave * (min(loss, _MAX_WAVE_LOSS) - 1.0)
        return 2.0 * (-(-num_rows // _ROW_TILE) * _ROW_TILE) * n * k / self._flops_per_s * waves

    def _join(self, compute_s: float, memory_s: float) -> float:
        low, high = (compute_s, memory_s) if compute_s < memory_s else (memory_s, compute_s)
        joined: float = high * (1.0 + (low / high) ** self._knee) ** (1.0 / self._knee)
        return joined


class DecodeAttention:
    """Attention of one layer for sequences that each add one token: launch, a share per sequence, KV bytes.

    Time is base_s(num_sequences) + context_tokens * per_context_token_s, so that it grows linearly over a run
    of decode steps.  A latent (MLA) cache is read once for
    all heads, and with many heads computing on it takes longer than reading it.
    Raises ConfigError when the GPU has no coefficients for the KV type.
    """

    __slots__ = ("_launch_s", "_per_sequence_s", "per_context_token_s")

    def __init__(
        self,
        gpu: GpuProfile,
        dtype: Dtype,
        *,
        num_kv_heads: int,
        kv_elements: int,
        flops_per_context_token: float,
        latent: bool,
    ) -> None:
        efficiency = gpu.efficiency.decode_attention.get(dtype)
        if efficiency is None:
            raise ConfigError(
                Problem(
                    f"{gpu.name} has no coefficients for attention on an {dtype} KV cache",
                    path="engine.kv_cache_dtype" if dtype == "fp8" else "hardware.gpu",
                    got=dtype,
                    hint=f"it has: {', '.join(sorted(gpu.efficiency.decode_attention))}",
                    next_step="set engine.kv_cache_dtype: auto, or choose a GPU with fp8 coefficients",
                )
            )
        memory = min(efficiency.memory, _MLA_DECODE_MEMORY) if latent else efficiency.memory
        compute = _MLA_DECODE_COMPUTE if latent else gpu.efficiency.prefill_attention.compute
        self._launch_s = efficiency.launch_s
        self._per_sequence_s = efficiency.per_seq_kv_head_s * num_kv_heads
        self.per_context_token_s = max(
            kv_elements * DTYPE_BYTES[dtype] / (gpu.hbm_bandwidth_bytes_per_s * memory),
            flops_per_context_token / (gpu.peak_flops_per_s["bf16"] * compute),
        )

    def base_s(self, num_sequences: int) -> float:
        """The part of the time that does not depend on the context."""
        return self._launch_s + self._per_sequence_s * num_sequences


class PrefillAttention:
    """Attention of one layer for the prompt chunks of a step: one launch, then the chunks one after another.

    Short sequences run below the asymptotic rate by 1 + short_tokens / (cached + new tokens).  That one call
    serves all chunks is what the measured batches of 1 to 8 show (mean |ln error| 7 % on H100; a launch per
    chunk: 26 %).  A small chunk on a long prefix cannot be faster than reading the prefix.
    """

    __slots__ = ("_kv_bytes_per_s", "_per_pair_s", "_short_tokens", "launch_s")

    def __init__(self, gpu: GpuProfile, dtype: Dtype, *, kv_elements: int, flops_per_pair: float) -> None:
        efficiency = gpu.efficiency.prefill_attention
        decode = gpu.efficiency.decode_attention[dtype]
        self.launch_s = efficiency.launch_s
        self._short_tokens = efficiency.short_tokens
        self._per_pair_s = flops_per_pair / (gpu.peak_flops_per_s["bf16"] * efficiency.compute)
        kv_bytes = kv_elements * DTYPE_BYTES[dtype]
        self._kv_bytes_per_s = gpu.hbm_bandwidth_bytes_per_s * decode.memory / kv_bytes

    def chunk_s(self, num_tokens: int, num_cached: int, window: int | None) -> float:
        """Time of one chunk, launch not included."""
        end = num_cached + num_tokens
        span = end if window is None else min(end, window)
        compute_s = causal_pairs(num_tokens, num_cached, window) * self._per_pair_s
        read = end if window is None else min(end, window + num_tokens)
        return max(compute_s * (1.0 + self._short_tokens / span), read / self._kv_bytes_per_s)


class AllReduce:
    """Sum of an activation over the tensor-parallel GPUs, by the faster of two algorithms.

    One-shot for small messages, ring (or in-switch) for large ones.  Degree 1 costs nothing.
    Raises ConfigError when the GPU has no coefficients for the degree.
    """

    __slots__ = ("_large_launch_s", "_large_s_per_byte", "_small_launch_s", "_small_s_per_byte")

    def __init__(self, gpu: GpuProfile, degree: int) -> None:
        if degree == 1:
            self._small_launch_s = self._small_s_per_byte = 0.0
            self._large_launch_s = self._large_s_per_byte = 0.0
            return
        efficiency = gpu.efficiency.all_reduce.get(degree)
        if efficiency is None:
            known = sorted(gpu.efficiency.all_reduce)
            raise ConfigError(
                Problem(
                    f"{gpu.name} has no all-reduce coefficients for this many GPUs",
                    path="engine.tensor_parallel_size",
                    got=str(degree),
                    hint=did_you_mean(str(degree), ["1", *map(str, known)]),
                    next_step="choose one of these, or add the degree to the GPU's file",
                )
            )
        self._small_launch_s = efficiency.small_launch_s
        self._small_s_per_byte = 1.0 / efficiency.small_bytes_per_s
        self._large_launch_s = efficiency.large_launch_s
        self._large_s_per_byte = 2.0 * (degree - 1) / degree / efficiency.large_bus_bytes_per_s

    def seconds(self, num_bytes: float) -> float:
        """Time to sum ``num_bytes`` held by every GPU."""
        return min(
            self._small_launch_s + num_bytes * self._small_s_per_byte,
            self._large_launch_s + num_bytes * self._large_s_per_byte,
        )

    def gather_seconds(self, num_bytes: float) -> float:
        """Time to give every GPU all ``num_bytes``, of which each holds a part: half an all-reduce."""
        return self.seconds(0.5 * num_bytes)


class Elementwise:
    """A kernel that only moves data: never below its launch, never faster than its bytes."""

    __slots__ = ("_bytes_per_s", "_launch_s")

    def __init__(self, gpu: GpuProfile) -> None:
        self._launch_s = gpu.efficiency.elementwise_launch_s
        self._bytes_per_s = gpu.hbm_bandwidth_bytes_per_s * gpu.efficiency.gemm["bf16"].memory

    def seconds(self, num_bytes: float) -> float:
        """Time to move ``num_bytes``, read and written."""
        return max(self._launch_s, num_bytes / self._bytes_per_s)
