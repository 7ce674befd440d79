"""Laws of attention: decode, and prompt chunks, with the kernel that a scenario chooses."""

from __future__ import annotations

from typing import Literal, NamedTuple

from servesim.config.kv_formats import KV_FORMATS, KvFormat
from servesim.config.profiles import GpuProfile
from servesim.cost.attention_io import FlashIo, standard_bytes, tile_rows
from servesim.cost.ops import larger
from servesim.errors import ConfigError, Problem

__all__ = [
    "AttentionKernel",
    "AttentionShape",
    "CacheDtype",
    "DecodeAttention",
    "LatentKernels",
    "PrefillAttention",
    "causal_pairs",
]

CacheDtype = Literal["bf16", "fp8"]
CACHE_BYTES: dict[CacheDtype, float] = {"bf16": 2.0, "fp8": 1.0}
_PLAIN: dict[CacheDtype, KvFormat] = {"bf16": KV_FORMATS["auto"], "fp8": KV_FORMATS["fp8"]}

_EXPONENTIALS_PER_SM_AND_CLOCK = 16
_STANDARD_LAUNCHES = 3  # scores, softmax, values

# GPUs on which vLLM runs FlashAttention 2: version 3 is for Hopper, Blackwell's data-centre GPUs have others.
_FLASH_ATTENTION_2 = ("ampere", "ada", "blackwell-rtx")
# Query rows of its tile. Decodes alone pack the query heads of a KV head into one; a call that also holds a
# prompt chunk does not, and computes a whole tile for each head's one query (vllm-project/vllm PR 58013).
_FLASH_2_TILE = 64
# FlashAttention 2 knows no attention sinks; vLLM then runs its Triton kernel, whose tile has 16 rows. Per SM
# and clock of an H100: causal attention over 10,000 tokens of Llama-3.1-8B in 0.43 s of the 0.66 s that
# vllm-project/vllm PR 20690 measures, the rest being what the laws say of the other operations.
_TRITON_FLOPS_PER_SM_AND_CLOCK = 233.0

# Share of a pair's time, at a head size of 128, that goes to its score and not to its products, so that
# smaller heads gain less: heads of 64 take 0.66 (FlashAttention 3) and 0.85 (B200's kernel) of the time of
# heads of 128 (aiconfigurator-core, 32 heads, 8 KV heads, median of prompts of 2,048 tokens and more).
_SCORE_SHARE = {"hopper": 0.32, "blackwell": 0.70}
_MEASURED_HEAD_DIM = 128.0

# FlashMLA on one H100 (vLLM 0.14, 128 heads, 16k context, batch 64 to 128, measured tables of
# aiconfigurator-core): 2.4 to 2.5 TB/s and 578 to 610 TFLOP/s at the same time.
_MLA_DECODE_MEMORY = 0.75
_MLA_DECODE_COMPUTE = 0.60


# On Hopper a layer of latent attention also norms, rotates, caches, and copies into what its kernels take: a
# launch, and bytes per token and per token and head. Fitted to vLLM 0.24's whole attention module
# (aiconfigurator-core: H100 and H200, 16 to 128 heads, block-scaled fp8, prompts of up to 1,024 tokens), less
# the laws of products, attention and rotation: within 5 %; without this term the module takes 1.7 times as
# long as they say. On B200, where vLLM runs another kernel, little is missing and nothing is charged.
_LATENT_LAUNCH_S = 56e-6
_LATENT_TOKEN_BYTES, _LATENT_HEAD_BYTES = 94.4e3, 7.66e3


class AttentionShape(NamedTuple):
    """One layer's attention on one GPU."""

    num_heads: int
    num_kv_heads: int
    kv_elements: int
    """Cached elements of one token."""
    decode_flops_per_context_token: float
    prefill_flops_per_pair: float
    latent: bool = False
    """Multi-head latent attention: all heads read one compressed vector per token."""
    sinks: bool = False
    """One learned logit per head."""

    @property
    def head_dim(self) -> float:
        """Mean of a key's and a value's elements, as prefill computes with them."""
        return self.prefill_flops_per_pair / (4.0 * self.num_heads)


class AttentionKernel(NamedTuple):
    """Which kernel computes attention; only ``flash`` with the GPU's own shared memory is measured."""

    name: Literal["flash", "standard"] = "flash"
    shared_memory_per_sm_bytes: int | None = None
    """None: the GPU's own."""


_MEASURED = AttentionKernel()


def _token_bytes(shape: AttentionShape, stored: KvFormat) -> float:
    """Bytes that one cached token takes in a layer on one GPU."""
    vectors = 1 if shape.latent else 2 * shape.num_kv_heads  # each with a scale of its own
    return shape.kv_elements * stored.bytes_per_element(shape.kv_elements // vectors)


def causal_pairs(num_tokens: float, num_cached: float, window: int | None) -> float:
    """Query-key pairs of ``num_tokens`` new tokens behind ``num_cached`` cached ones, diagonal halved."""
    end = num_cached + num_tokens
    if window is None or end <= window:
        return num_tokens * (num_cached + 0.5 * num_tokens)
    start = min(num_cached, window)
    growing = (window - start) * 0.5 * (window + start)
    return growing + window * (end - max(num_cached, window))


class LatentKernels:
    """What a layer of latent attention computes beside products and attention: 0 without a latent cache."""

    __slots__ = ("_launch_s", "_per_token_s")

    def __init__(self, gpu: GpuProfile, shape: AttentionShape) -> None:
        is_charged = shape.latent and gpu.architecture == "hopper"
        token_bytes = _LATENT_TOKEN_BYTES + _LATENT_HEAD_BYTES * shape.num_heads
        self._launch_s = _LATENT_LAUNCH_S if is_charged else 0.0
        self._per_token_s = token_bytes / gpu.hbm_bandwidth_bytes_per_s if is_charged else 0.0

    def seconds(self, num_tokens: float) -> float:
        """Time of one layer."""
        return self._launch_s + self._per_token_s * num_tokens


class DecodeAttention:
    """Attention of one layer for sequences that each add one token: launch, a share per sequence, KV bytes.

    Time is base_s(num_sequences) + context_tokens * per_context_token_s, so that it grows linearly over a run
    of decode steps.  A latent (MLA) cache is read once for all heads, and with many heads computing on it
    takes longer than reading it.  The standard kernel also writes and reads a score and a probability per
    head and key.  Shared memory does not matter: every key is read once, whatever the tile.
    Beside a prompt chunk FlashAttention 2 computes a tile of queries for every head, which takes longer than
    reading: ``mixed_per_context_token_s``.
    Raises ConfigError when the GPU has no coefficients for the KV type.
    """

    __slots__ = ("_launch_s", "_per_sequence_s", "mixed_per_context_token_s", "per_context_token_s")

    def __init__(
        self,
        gpu: GpuProfile,
        dtype: CacheDtype,
        shape: AttentionShape,
        kernel: AttentionKernel = _MEASURED,
        stored: KvFormat | None = None,
    ) -> None:
        """``dtype`` names the measured kernel, ``stored`` what the cache holds, if that is something else."""
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
        bandwidth = gpu.hbm_bandwidth_bytes_per_s
        stored = stored or _PLAIN[dtype]
        memory = min(efficiency.memory, _MLA_DECODE_MEMORY) if shape.latent else efficiency.memory
        memory *= stored.memory_share
        compute = _MLA_DECODE_COMPUTE if shape.latent else gpu.efficiency.prefill_attention[dtype].compute
        self._launch_s = efficiency.launch_s
        self._per_sequence_s = efficiency.per_seq_kv_head_s * shape.num_kv_heads
        self.per_context_token_s = larger(
            _token_bytes(shape, stored) / (bandwidth * memory),
            shape.decode_flops_per_context_token / (gpu.peak_flops_per_s["bf16"] * compute),
        )
        if kernel.name == "standard":
            self._launch_s *= _STANDARD_LAUNCHES
            score_bytes = standard_bytes(1, 1, 0) * shape.num_heads
            self.per_context_token_s += score_bytes / (bandwidth * gpu.efficiency.gemm["bf16"].memory)
        self.mixed_per_context_token_s = self.per_context_token_s
        if gpu.architecture in _FLASH_ATTENTION_2 and not (
            shape.latent or shape.sinks or kernel.name == "standard"
        ):
            tile_flops = _FLASH_2_TILE * shape.prefill_flops_per_pair
            tile_s = tile_flops / (gpu.peak_flops_per_s["bf16"] * compute)
            self.mixed_per_context_token_s = larger(self.per_context_token_s, tile_s)

    def base_s(self, num_sequences: float) -> float:
        """The part of the time that does not depend on the context."""
        return self._launch_s + self._per_sequence_s * num_sequences


class PrefillAttention:
    """Attention of one layer for the prompt chunks of a step: one launch, then the chunks one after another.

    Short sequences run below the asymptotic rate by 1 + short_tokens / (cached + new tokens), and the longest
    one's last tile walks over all its keys alone.  That one call serves all chunks is what the measured
    batches of 1 to 8 show.  A small chunk on a long prefix cannot be faster than reading the prefix, and
    no chunk faster than the SMs' units for exponentials (16 a clock, NVIDIA).
    """

    __slots__ = (
        "_io",
        "_keys_per_s",
        "_launch_s",
        "_per_key_s",
        "_per_pair_s",
        "_scores_bytes_per_s",
        "_shape",
        "_short_tokens",
    )

    def __init__(
        self,
        gpu: GpuProfile,
        dtype: CacheDtype,
        shape: AttentionShape,
        kernel: AttentionKernel = _MEASURED,
        stored: KvFormat | None = None,
    ) -> None:
        """``dtype`` names the measured kernel, ``stored`` what the cache holds, if that is something else."""
        efficiency = gpu.efficiency.prefill_attention[dtype]
        decode = gpu.efficiency.decode_attention[dtype]
        self._shape = shape
        self._launch_s = efficiency.launch_s
        self._per_key_s = efficiency.per_key_s
        self._short_tokens = efficiency.short_tokens
        exponentials_per_s = _EXPONENTIALS_PER_SM_AND_CLOCK * gpu.sm_count * gpu.boost_clock_hz
        score_share = _SCORE_SHARE.get(gpu.architecture, 0.0)
        smaller_heads = larger(1.0, 1.0 - score_share + score_share * _MEASURED_HEAD_DIM / shape.head_dim)
        self._per_pair_s = larger(
            smaller_heads
            * shape.prefill_flops_per_pair
            / (gpu.peak_flops_per_s["bf16"] * efficiency.compute),
            shape.num_heads / exponentials_per_s,
        )
        if shape.sinks and gpu.architecture in _FLASH_ATTENTION_2:
            triton_flops_per_s = _TRITON_FLOPS_PER_SM_AND_CLOCK * gpu.sm_count * gpu.boost_clock_hz
            self._per_pair_s = larger(self._per_pair_s, shape.prefill_flops_per_pair / triton_flops_per_s)
        bandwidth = gpu.hbm_bandwidth_bytes_per_s
        stored = stored or _PLAIN[dtype]
        self._keys_per_s = bandwidth * decode.memory * stored.memory_share / _token_bytes(shape, stored)
        self._io: FlashIo | None = None
        self._scores_bytes_per_s: float | None = None
        if kernel.name == "standard":
            self._launch_s *= _STANDARD_LAUNCHES
            self._scores_bytes_per_s = bandwidth * gpu.efficiency.gemm["bf16"].memory / shape.num_heads
        elif kernel.shared_memory_per_sm_bytes is not None:
            size = kernel.shared_memory_per_sm_bytes
            _check_tile(gpu, size, shape)
            self._io = FlashIo(gpu, size, shape.num_heads, shape.head_dim, bandwidth * decode.memory)

    def base_s(self, num_keys: float) -> float:
        """Launch, and the walk over the keys of the longest sequence of the step."""
        return self._launch_s + self._per_key_s * num_keys

    def chunk_s(self, num_tokens: int, num_cached: int, window: int | None) -> float:
        """Time of one chunk, its base not included."""
        span = read = end = num_cached + num_tokens
        if window is not None:
            span, read = min(end, window), min(end, window + num_tokens)
        pairs = causal_pairs(num_tokens, num_cached, window)
        seconds = pairs * self._per_pair_s * (1.0 + self._short_tokens / span)
        if self._io is not None:
            seconds = max(seconds, self._io.seconds(num_tokens, pairs, span))
        elif self._scores_bytes_per_s is not None:
            # No tile is skipped: neither the upper triangle nor what lies outside a window.
            moved = standard_bytes(num_tokens, end, self._shape.head_dim) / self._scores_bytes_per_s
            every_pair_s = num_tokens * end * self._per_pair_s * (1.0 + self._short_tokens / span)
            seconds = max(every_pair_s, moved)
        return larger(seconds, read / self._keys_per_s)


def _check_tile(gpu: GpuProfile, shared_memory_bytes: int, shape: AttentionShape) -> None:
    if tile_rows(shared_memory_bytes, shape.head_dim, register_file_bytes=gpu.register_file_per_sm_bytes):
        return
    raise ConfigError(
        Problem(
            "no tile of flash attention fits into this shared memory",
            path="engine.step_time.shared_memory_per_sm_kib",
            got=f"{shared_memory_bytes / 1024:g}",
            next_step=f"raise it (the GPU has {gpu.shared_memory_per_sm_bytes // 1024}), "
            "or set engine.step_time.attention_kernel: standard",
        )
    )
