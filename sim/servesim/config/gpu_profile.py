"""A GPU in SI units, and how one without measurements borrows the efficiency of one that has them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from servesim.config.record import Record
from servesim.config.weight_formats import PEAK_OF_PRODUCT

__all__ = [
    "PEAK_OF_EXPERTS",
    "AllReduceEfficiency",
    "DecodeAttentionEfficiency",
    "Efficiency",
    "ElementwiseEfficiency",
    "ElementwiseKind",
    "ExpertEfficiency",
    "ExpertFormat",
    "FirstCallEfficiency",
    "GemmEfficiency",
    "GpuProfile",
    "KernelError",
    "PrefillAttentionEfficiency",
    "derive_all_reduce",
    "derive_decode_attention",
    "derive_experts",
    "derive_gemm",
    "derive_prefill_attention",
]

DataType = Literal["fp32", "tf32", "bf16", "fp8", "int8", "fp4"]
CacheType = Literal["bf16", "fp8"]
MeasuredProduct = Literal["bf16", "fp8", "fp8_block", "nvfp4"]
ExpertFormat = Literal["bf16", "fp8", "fp8_block", "w4a16", "mxfp4", "nvfp4"]
PEAK_OF_EXPERTS: dict[ExpertFormat, DataType] = {
    "bf16": "bf16",
    "fp8": "fp8",
    "fp8_block": "fp8",
    "w4a16": "bf16",
    "mxfp4": "bf16",
    "nvfp4": "fp4",
}
"""The data type whose peak the products of an expert format run at."""
ElementwiseKind = Literal["norm", "head_norm", "rotation", "activation", "choice", "sampling", "layer"]
"""Norms of the hidden state, of queries and keys by head; rotation; activation; choice of experts; sampling;
what a layer does between all of these, products and attention: cutting tensors apart, handing them on."""
Share = Annotated[float, Field(gt=0, le=1)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Degree = Annotated[int, Field(ge=2)]


class GemmEfficiency(Record):
    """Matrix products: launch_s + (compute_time^knee + memory_time^knee)^(1/knee) + input conversion."""

    compute: Share
    """Share of the type's peak rate that large products reach."""
    memory: Share
    """Share of the HBM bandwidth that weight streaming reaches."""
    launch_s: Seconds
    knee: Annotated[float, Field(ge=1, le=1000)]
    """Exponent of the sum: large when compute and memory overlap fully, 1 when they add up."""
    wave: Annotated[float, Field(ge=0, le=1)]
    """Share of the time that SMs idle in the last wave of tiles which a product pays for."""
    narrow_columns: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Columns that a matrix streams as if it had more: a narrow one cannot keep all SMs asking for bytes."""
    convert_bytes: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Bytes moved per element of the input to bring it into the product's type, in a kernel of its own."""
    turned: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Of a CPU: share by which computing takes longer where the rows do not stay in L2 (cost.blocking)."""


class ExpertEfficiency(Record):
    """A layer's routed experts, as one operation: products, activation, sorting and summing.

    launch_s + per_expert_s * experts reached + (compute_time^knee + memory_time^knee)^(1/knee) + the rows'
    way there and back.
    """

    compute: Share
    """Share of the product type's peak rate."""
    memory: Share
    launch_s: Seconds
    per_expert_s: Seconds
    row_bytes: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Bytes moved per hidden element of a routed row to sort, convert and sum it, in kernels of their own."""
    knee: Annotated[float, Field(ge=1, le=1000)]


class DecodeAttentionEfficiency(Record):
    """Decode attention: launch_s + per_seq_kv_head_s * sequences * heads + bytes / (bandwidth * memory)."""

    launch_s: Seconds
    per_seq_kv_head_s: Seconds
    memory: Share


class PrefillAttentionEfficiency(Record):
    """Prefill attention: launch_s + per_key_s * keys + operations / (peak * compute) * (1 + short / keys)."""

    launch_s: Seconds
    per_key_s: Seconds = 0.0
    """Of the longest sequence: its last tile of queries walks over all keys one after another."""
    compute: Share
    short_tokens: Annotated[float, Field(ge=0, allow_inf_nan=False)]


class AllReduceEfficiency(Record):
    """Sum over the GPUs of one model, by the fastest of three algorithms.

    One-shot (everybody reads everybody's message) for small messages, two-shot (reduce, then gather) for
    middle ones, ring or in-switch reduction for large ones; the bus bandwidths are as NCCL counts them.
    """

    small_launch_s: Seconds
    small_bytes_per_s: Positive
    middle_launch_s: Seconds
    middle_bus_bytes_per_s: Positive
    large_launch_s: Seconds
    large_bus_bytes_per_s: Positive


class ElementwiseEfficiency(Record):
    """A kernel that only moves data, on a device where its launch does not hide the bytes."""

    launch_s: Seconds
    bytes_per_s: Positive


class KernelError(Record):
    """How well a law meets the kernel times that it was fitted to: percent of |ln(law / measured)|."""

    mean_percent: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    p90_percent: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    rows: Annotated[int, Field(ge=1)]
    """Measured times that the fit used."""
    dropped: Annotated[int, Field(ge=0)] = 0
    """Measured times that a rule of docs/model.md set aside."""
    mean_with_dropped_percent: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """The mean over all rows, those set aside included; empty when none was."""


class FirstCallEfficiency(Record):
    """What the first product with a count of rows takes more: oneDNN generates code for it."""

    launch_s: float
    per_row_s: float
    per_row_k_s: float
    """Per row and inner dimension of a block (cost.blocking)."""
    turned: float
    """The same code takes so many times as long where the rows do not stay in L2."""


class Efficiency(Record):
    """How much of its peaks a GPU's serving kernels reach; laws and symbols: docs/model.md."""

    provenance: str
    gemm: dict[MeasuredProduct, GemmEfficiency]
    experts: dict[ExpertFormat, ExpertEfficiency] = Field(default_factory=dict)
    """Keyed by the format of the experts' weights; empty where nobody measured any."""
    decode_attention: dict[CacheType, DecodeAttentionEfficiency]
    """Keyed by the type of the KV cache."""
    prefill_attention: dict[CacheType, PrefillAttentionEfficiency]
    """Keyed by the type of the KV cache."""
    all_reduce: dict[Degree, AllReduceEfficiency]
    """Keyed by tensor_parallel_size."""
    elementwise_launch_s: Seconds
    """Time of one elementwise kernel; a layer has four."""
    elementwise: dict[ElementwiseKind, ElementwiseEfficiency] = Field(default_factory=dict)
    """By kind, where they were measured: on a CPU; a kind that is absent there is a part of others."""
    first_call: FirstCallEfficiency | None = None
    """Empty where products need no preparation, as on a GPU."""
    errors: dict[str, KernelError] = Field(default_factory=dict)
    """By operation, as ``gemm.bf16`` or ``all_reduce.8``; empty where coefficients are derived."""


class GpuProfile(Record):
    """One GPU."""

    name: str
    label: str
    vendor: str
    architecture: str
    marketed_memory: str
    memory_bytes: int
    """As the driver's tool (nvidia-smi) reports it."""
    cuda_memory_bytes: int
    """What a process sees as the total: the driver keeps the rest for itself."""
    hbm_bandwidth_bytes_per_s: float
    sm_count: int
    row_tile: int
    """Rows of a product that its matrix units compute at once, even when fewer are asked for."""
    boost_clock_hz: float
    shared_memory_per_sm_bytes: int
    register_file_per_sm_bytes: int
    l2_bytes: int
    on_chip_bandwidth_bytes_per_s: float
    """Shared memory of all SMs together at boost clock."""
    peak_flops_per_s: dict[DataType, float]
    """Dense; a type that the GPU lacks is absent."""
    best_gemm_flops_per_s: dict[DataType, float]
    """The fastest matrix product that somebody measured; absent where nobody did."""
    link_bandwidth_bytes_per_s: float
    """Per direction; 0 when GPUs speak over PCIe only."""
    link_max_gpus: int
    """GPUs that one link domain joins; 1 without a link."""
    link_per_peer_bytes_per_s: float | None
    """Per direction to one peer, where links are point to point and not through a switch."""
    pcie_bandwidth_bytes_per_s: float
    """Per direction."""
    tdp_w: float
    price_per_hour_usd: float | None
    price_as_of: str | None
    efficiency: Efficiency
    sources: dict[str, str]
    """Source of every field, or "unverified"."""

    def peer_bandwidth_bytes_per_s(self, num_gpus: int) -> float:
        """Per direction, what one of ``num_gpus`` cooperating GPUs can send to the others."""
        if num_gpus > self.link_max_gpus:
            return self.pcie_bandwidth_bytes_per_s
        if self.link_per_peer_bytes_per_s is not None:
            return min(self.link_bandwidth_bytes_per_s, (num_gpus - 1) * self.link_per_peer_bytes_per_s)
        return self.link_bandwidth_bytes_per_s


_MMA_ONLY = ("ampere", "ada", "blackwell-rtx")
"""Architectures whose products all run through the instruction that Marlin uses on every GPU."""


def _compute_factor(own: GpuProfile, base: GpuProfile) -> float:
    """By how much the own GPU's share of its peak differs from the base's."""
    best, peak = own.best_gemm_flops_per_s.get("bf16"), own.peak_flops_per_s.get("bf16")
    return 1.0 if best is None or peak is None else best / peak / base.efficiency.gemm["bf16"].compute


def derive_gemm(own: GpuProfile, base: GpuProfile) -> dict[MeasuredProduct, GemmEfficiency]:
    """Rule for matrix products: the base GPU's coefficients, for the types that the own GPU has.

    Where the own GPU's best bf16 product is known, its share of the peak replaces the base's `compute`
    (on the four measured GPUs the two agree within 9 %), and `compute` of the other types moves by the same
    factor.  `narrow_columns` goes with the SMs that have to be kept busy.
    """
    factor = _compute_factor(own, base)
    return {
        kind: law.model_copy(
            update={
                "compute": min(1.0, law.compute * factor),
                "narrow_columns": law.narrow_columns * own.sm_count / base.sm_count,
            }
        )
        for kind, law in base.efficiency.gemm.items()
        if PEAK_OF_PRODUCT[kind] in own.peak_flops_per_s
    }


def derive_experts(
    own: GpuProfile, base: GpuProfile, mma_base: GpuProfile
) -> dict[ExpertFormat, ExpertEfficiency]:
    """Rule for experts: the base GPU's coefficients, `compute` as for matrix products.

    Marlin (w4a16) reaches half of the peak of the older matrix instruction: the whole peak of Ampere, Ada
    and workstation Blackwell, which take its coefficients from ``mma_base``, but not of Hopper.
    """
    laws = {kind: (law, base) for kind, law in base.efficiency.experts.items()}
    if own.architecture in _MMA_ONLY and "w4a16" in mma_base.efficiency.experts:
        laws["w4a16"] = mma_base.efficiency.experts["w4a16"], mma_base
    return {
        kind: law.model_copy(update={"compute": min(1.0, law.compute * _compute_factor(own, source))})
        for kind, (law, source) in laws.items()
        if PEAK_OF_EXPERTS[kind] in own.peak_flops_per_s
    }


def derive_decode_attention(
    own: GpuProfile, base: GpuProfile, fp8_base: GpuProfile
) -> dict[CacheType, DecodeAttentionEfficiency]:
    """Rule for decode attention: the base GPU's coefficients; the time per sequence and KV head by 1 / SMs.

    That time is work spread over the SMs.  An fp8 cache that the base lacks is taken from ``fp8_base``; on a
    GPU without fp8 it stays absent.
    """
    laws = {kind: (law, base) for kind, law in base.efficiency.decode_attention.items()}
    if "fp8" in fp8_base.efficiency.decode_attention:
        laws.setdefault("fp8", (fp8_base.efficiency.decode_attention["fp8"], fp8_base))
    if "fp8" not in own.peak_flops_per_s:
        laws.pop("fp8", None)
    return {
        kind: law.model_copy(
            update={"per_seq_kv_head_s": law.per_seq_kv_head_s * source.sm_count / own.sm_count}
        )
        for kind, (law, source) in laws.items()
    }


def derive_prefill_attention(
    own: GpuProfile, base: GpuProfile, gemm_base: GpuProfile
) -> dict[CacheType, PrefillAttentionEfficiency]:
    """Rule for prefill attention: the base GPU's coefficients; an fp8 cache that it lacks as its bf16 one.

    Of one architecture with the GPU whose products are borrowed, `compute` moves as theirs: what holds one
    back (power, as a rule) holds back the other.
    """
    factor = _compute_factor(own, gemm_base) if base.name == gemm_base.name else 1.0
    laws = {
        kind: law.model_copy(update={"compute": min(1.0, law.compute * factor)})
        for kind, law in base.efficiency.prefill_attention.items()
    }
    if "fp8" in own.peak_flops_per_s:
        laws.setdefault("fp8", laws["bf16"])
    else:
        laws.pop("fp8", None)
    return laws


def derive_all_reduce(own: GpuProfile, base: GpuProfile) -> dict[int, AllReduceEfficiency]:
    """Rule for all-reduce: the base's bandwidths by the ratio of what a GPU can send to its peers.

    A group that no link joins goes over PCIe, where vLLM's own kernels are off: small and middle messages
    then pay the launch of the large-message law.
    """
    laws: dict[int, AllReduceEfficiency] = {}
    for degree, law in base.efficiency.all_reduce.items():
        ratio = own.peer_bandwidth_bytes_per_s(degree) / base.peer_bandwidth_bytes_per_s(degree)
        linked = degree <= own.link_max_gpus
        laws[degree] = AllReduceEfficiency(
            small_launch_s=law.small_launch_s if linked else law.large_launch_s,
            small_bytes_per_s=law.small_bytes_per_s * ratio,
            middle_launch_s=law.middle_launch_s if linked else law.large_launch_s,
            middle_bus_bytes_per_s=law.middle_bus_bytes_per_s * ratio,
            large_launch_s=law.large_launch_s,
            large_bus_bytes_per_s=law.large_bus_bytes_per_s * ratio,
        )
    return laws
