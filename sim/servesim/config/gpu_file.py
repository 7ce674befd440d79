"""What a GPU's file says: numbers in the units people read, each with its source."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import Field, model_validator

from servesim.config.gpu_profile import (
    AllReduceEfficiency,
    CacheType,
    DataType,
    DecodeAttentionEfficiency,
    Degree,
    Efficiency,
    ElementwiseEfficiency,
    ElementwiseKind,
    ExpertEfficiency,
    ExpertFormat,
    FirstCallEfficiency,
    GemmEfficiency,
    GpuProfile,
    KernelError,
    MeasuredProduct,
    PrefillAttentionEfficiency,
    Share,
    derive_all_reduce,
    derive_decode_attention,
    derive_experts,
    derive_gemm,
    derive_prefill_attention,
)
from servesim.config.record import Record, RuleError
from servesim.units import GB, KIB, MIB

__all__ = ["GpuFile", "MeasuredEfficiency"]

ON_CHIP_BYTES_PER_CLOCK = 128  # of one SM or CU: 32 banks of 4 bytes
DRIVER_MIB = 480  # nvidia-smi less what CUDA sees: 483 on RTX 4090, about 440 on H100, 519 on A100 40 GB

Number = Annotated[float, Field(gt=0, le=1e9)]
Time = Annotated[float, Field(ge=0, le=1e9)]


class Sourced(Record):
    """A number and where it comes from."""

    value: Number
    source: str = Field(min_length=1)
    """Where the number was read, how it was measured or computed; ``unverified`` if none of these."""

    @model_validator(mode="before")
    @classmethod
    def _needs_a_source(cls, data: Any) -> Any:
        if isinstance(data, (int, float, str)):
            raise RuleError(
                "a number needs its source",
                next_step=f"write {{value: {data}, source: ...}} (source: unverified if you have none)",
            )
        return data


class SourcedCount(Sourced):
    """A whole number and where it comes from."""

    value: Annotated[int, Field(gt=0, le=10**9)]


class Price(Sourced):
    """A price, which holds for a while only."""

    as_of: str = Field(pattern=r"^(\d{4}-\d{2}(-\d{2})?|undated)$")
    """Month or day, as 2026-05 or 2026-05-31; undated when nobody said."""


class Link(Record):
    """What joins GPUs directly (NVLink, Infinity Fabric)."""

    bandwidth_gb_per_s: Sourced
    """Per direction, all links of a GPU together."""
    max_gpus: Annotated[int, Field(ge=2, le=10_000)]
    """GPUs of one link domain: 2 for a bridge, 8 for a board."""
    per_peer_gb_per_s: Sourced | None = None
    """Per direction to one peer, where links are point to point and not through a switch."""


class GemmCoefficients(Record):
    """Coefficients of matrix products."""

    compute: Share
    memory: Share
    launch_us: Time
    knee: Annotated[float, Field(ge=1, le=1000)]
    wave: Annotated[float, Field(ge=0, le=1)]
    narrow_columns: Time = 0.0
    convert_bytes: Time = 0.0
    turned: Time | None = None
    """Of a CPU only."""


class ExpertCoefficients(Record):
    """Coefficients of a layer's routed experts."""

    compute: Share
    memory: Share
    launch_us: Time
    per_expert_us: Time
    row_bytes: Time = 0.0
    knee: Annotated[float, Field(ge=1, le=1000)]


class DecodeAttentionCoefficients(Record):
    """Coefficients of decode attention."""

    launch_us: Time
    per_seq_kv_head_ns: Time
    memory: Share


class PrefillAttentionCoefficients(Record):
    """Coefficients of prefill attention."""

    launch_us: Time
    per_key_ns: Time = 0.0
    compute: Share
    short_tokens: Time


class AllReduceCoefficients(Record):
    """Coefficients of all-reduce at one tensor_parallel_size."""

    small_launch_us: Time
    small_gb_per_s: Number
    middle_launch_us: Time
    middle_bus_gb_per_s: Number
    large_launch_us: Time
    large_bus_gb_per_s: Number


class FirstCallCoefficients(Record):
    """What the first product with a new count of rows takes more than later ones."""

    launch_us: Time
    per_row_us: Time
    per_row_k_ns: Time
    turned: Time = 1.0

    def to_si(self) -> FirstCallEfficiency:
        """The same in SI units."""
        return FirstCallEfficiency(
            launch_s=self.launch_us / 1e6,
            per_row_s=self.per_row_us / 1e6,
            per_row_k_s=self.per_row_k_ns / 1e9,
            turned=self.turned,
        )


class ElementwiseCoefficients(Record):
    launch_us: Time
    gb_per_s: Number

    def to_si(self) -> ElementwiseEfficiency:
        """The same in SI units."""
        return ElementwiseEfficiency(launch_s=self.launch_us / 1e6, bytes_per_s=self.gb_per_s * GB)


class MeasuredEfficiency(Record):
    """Coefficients fitted to kernel times of this very GPU; `servesim fit` writes them."""

    provenance: str = Field(min_length=1)
    gemm: dict[MeasuredProduct, GemmCoefficients]
    experts: dict[ExpertFormat, ExpertCoefficients] = Field(default_factory=dict)
    decode_attention: dict[CacheType, DecodeAttentionCoefficients]
    prefill_attention: dict[CacheType, PrefillAttentionCoefficients]
    all_reduce: dict[Degree, AllReduceCoefficients] = Field(default_factory=dict)
    """Empty for a device that works alone."""
    elementwise_launch_us: Time = 0.0
    elementwise: dict[ElementwiseKind, ElementwiseCoefficients] = Field(default_factory=dict)
    """Their laws by kind, where bytes come after the launch; empty where the launch hides them."""
    first_call: FirstCallCoefficients | None = None
    """Empty where products need no preparation, as on a GPU."""
    errors: dict[str, KernelError] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _is_complete(self) -> MeasuredEfficiency:
        laws: dict[str, dict[Any, Any]] = {
            "gemm": self.gemm,
            "decode_attention": self.decode_attention,
            "prefill_attention": self.prefill_attention,
        }
        for key, types in laws.items():
            if "bf16" not in types:
                raise RuleError("gemm, decode_attention and prefill_attention need bf16", path=(key,))
        if set(self.decode_attention) != set(self.prefill_attention):
            raise RuleError("has other cache types than decode_attention", path=("prefill_attention",))
        return self

    def to_si(self) -> Efficiency:
        """The same in SI units."""
        gemm = {
            kind: GemmEfficiency(
                launch_s=law.launch_us / 1e6, **law.model_dump(exclude={"launch_us"}, exclude_none=True)
            )
            for kind, law in self.gemm.items()
        }
        decode = {
            kind: DecodeAttentionEfficiency(
                launch_s=law.launch_us / 1e6,
                per_seq_kv_head_s=law.per_seq_kv_head_ns / 1e9,
                memory=law.memory,
            )
            for kind, law in self.decode_attention.items()
        }
        prefill = {
            kind: PrefillAttentionEfficiency(
                launch_s=law.launch_us / 1e6,
                per_key_s=law.per_key_ns / 1e9,
                compute=law.compute,
                short_tokens=law.short_tokens,
            )
            for kind, law in self.prefill_attention.items()
        }
        return Efficiency(
            provenance=self.provenance,
            gemm=gemm,
            experts={
                kind: ExpertEfficiency(
                    launch_s=expert.launch_us / 1e6,
                    per_expert_s=expert.per_expert_us / 1e6,
                    **expert.model_dump(exclude={"launch_us", "per_expert_us"}),
                )
                for kind, expert in self.experts.items()
            },
            decode_attention=decode,
            prefill_attention=prefill,
            all_reduce={
                degree: AllReduceEfficiency(
                    small_launch_s=law.small_launch_us / 1e6,
                    small_bytes_per_s=law.small_gb_per_s * GB,
                    middle_launch_s=law.middle_launch_us / 1e6,
                    middle_bus_bytes_per_s=law.middle_bus_gb_per_s * GB,
                    large_launch_s=law.large_launch_us / 1e6,
                    large_bus_bytes_per_s=law.large_bus_gb_per_s * GB,
                )
                for degree, law in self.all_reduce.items()
            },
            elementwise_launch_s=self.elementwise_launch_us / 1e6,
            elementwise={kind: law.to_si() for kind, law in self.elementwise.items()},
            first_call=self.first_call and self.first_call.to_si(),
            errors=self.errors,
        )


class DerivedEfficiency(Record):
    """The measured GPUs whose coefficients stand in for this one's; the rules are in hardware/README.md."""

    gemm: str
    """Name of the GPU whose matrix products and elementwise kernels are taken."""
    attention: str
    all_reduce: str
    rule: str = Field(min_length=1)
    """Why these."""


class EfficiencyChoice(Record):
    """Exactly one of measured and derived."""

    measured: MeasuredEfficiency | None = None
    derived: DerivedEfficiency | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> EfficiencyChoice:
        if (self.measured is None) == (self.derived is None):
            raise RuleError("needs exactly one of measured and derived")
        return self


class GpuFile(Record):
    """One GPU, in the units of data sheets."""

    name: str = Field(min_length=1)
    label: str = Field(min_length=1)
    vendor: str = Field(min_length=1)
    architecture: str = Field(min_length=1)
    marketed_memory: str = Field(min_length=1)
    """The memory size as sold, in the seller's unit."""
    memory_mib: SourcedCount
    """As nvidia-smi shows it."""
    cuda_memory_mib: SourcedCount | None = None
    """As a process sees it (torch: total_memory); empty: memory_mib less 480."""
    hbm_bandwidth_gb_per_s: Sourced
    sm_count: SourcedCount
    row_tile: SourcedCount = SourcedCount(value=64, source="tensor cores of NVIDIA GPUs since 2020")
    """Rows of a product that matrix units compute at once."""
    boost_clock_mhz: Sourced
    shared_memory_per_sm_kib: SourcedCount
    register_file_per_sm_kib: SourcedCount
    l2_mib: Sourced
    peak_tflops: dict[DataType, Sourced]
    """Dense; int8 in 1e12 operations per second. Leave out what the GPU lacks."""
    best_gemm_tflops: dict[DataType, Sourced] = Field(default_factory=dict)
    """The fastest matrix product that somebody measured."""
    link: Link | None = None
    pcie_bandwidth_gb_per_s: Sourced
    """Per direction."""
    tdp_w: Sourced
    price_per_hour_usd: Price | None = None
    efficiency: EfficiencyChoice

    @model_validator(mode="after")
    def _is_consistent(self) -> GpuFile:
        if "bf16" not in self.peak_tflops:
            raise RuleError("has no bf16, the type that serving computes in", path=("peak_tflops",))
        for kind, best in self.best_gemm_tflops.items():
            if kind not in self.peak_tflops or best.value > self.peak_tflops[kind].value:
                raise RuleError(f"{kind} is above the peak of peak_tflops", path=("best_gemm_tflops",))
        if self.cuda_memory_mib and self.cuda_memory_mib.value > self.memory_mib.value:
            raise RuleError("is larger than memory_mib", path=("cuda_memory_mib",))
        if self.memory_mib.value <= DRIVER_MIB and self.cuda_memory_mib is None:
            raise RuleError(
                f"is smaller than the {DRIVER_MIB} MiB that the driver keeps", path=("memory_mib",)
            )
        return self

    def to_profile(self, load_base: Callable[[str, str], GpuProfile]) -> GpuProfile:
        """The profile in SI units; ``load_base(key, name)`` loads the GPU that a key of derived names."""
        choice = self.efficiency
        if choice.measured is not None:
            return self._profile(choice.measured.to_si())
        assert choice.derived is not None
        derived = choice.derived
        gemm = load_base("gemm", derived.gemm)
        attention = load_base("attention", derived.attention)
        links = load_base("all_reduce", derived.all_reduce)
        own = self._profile(attention.efficiency)
        return own.model_copy(
            update={
                "efficiency": Efficiency(
                    provenance=(
                        f"derived, not measured: gemm of {gemm.name}, attention of {attention.name}, "
                        f"all-reduce of {links.name} ({derived.rule})"
                    ),
                    gemm=derive_gemm(own, gemm),
                    experts=derive_experts(own, gemm, attention),
                    decode_attention=derive_decode_attention(own, attention, gemm),
                    prefill_attention=derive_prefill_attention(own, attention, gemm),
                    all_reduce=derive_all_reduce(own, links),
                    elementwise_launch_s=gemm.efficiency.elementwise_launch_s,
                )
            }
        )

    def _profile(self, efficiency: Efficiency) -> GpuProfile:
        link, price = self.link, self.price_per_hour_usd
        cuda_mib = self.cuda_memory_mib.value if self.cuda_memory_mib else self.memory_mib.value - DRIVER_MIB
        boost_hz = self.boost_clock_mhz.value * 1e6
        return GpuProfile(
            name=self.name,
            label=self.label,
            vendor=self.vendor,
            architecture=self.architecture,
            marketed_memory=self.marketed_memory,
            memory_bytes=self.memory_mib.value * MIB,
            cuda_memory_bytes=cuda_mib * MIB,
            hbm_bandwidth_bytes_per_s=self.hbm_bandwidth_gb_per_s.value * GB,
            sm_count=self.sm_count.value,
            row_tile=self.row_tile.value,
            boost_clock_hz=boost_hz,
            shared_memory_per_sm_bytes=self.shared_memory_per_sm_kib.value * KIB,
            register_file_per_sm_bytes=self.register_file_per_sm_kib.value * KIB,
            l2_bytes=round(self.l2_mib.value * MIB),
            on_chip_bandwidth_bytes_per_s=self.sm_count.value * ON_CHIP_BYTES_PER_CLOCK * boost_hz,
            peak_flops_per_s={kind: peak.value * 1e12 for kind, peak in self.peak_tflops.items()},
            best_gemm_flops_per_s={kind: best.value * 1e12 for kind, best in self.best_gemm_tflops.items()},
            link_bandwidth_bytes_per_s=link.bandwidth_gb_per_s.value * GB if link else 0.0,
            link_max_gpus=link.max_gpus if link else 1,
            link_per_peer_bytes_per_s=link.per_peer_gb_per_s.value * GB
            if link and link.per_peer_gb_per_s
            else None,
            pcie_bandwidth_bytes_per_s=self.pcie_bandwidth_gb_per_s.value * GB,
            tdp_w=self.tdp_w.value,
            price_per_hour_usd=price.value if price else None,
            price_as_of=price.as_of if price else None,
            efficiency=efficiency,
            sources=self._sources(),
        )

    def _sources(self) -> dict[str, str]:
        """Source of every SI field, keyed by the profile's field name."""
        given: dict[str, Sourced | None] = {
            "memory_bytes": self.memory_mib,
            "cuda_memory_bytes": self.cuda_memory_mib,
            "hbm_bandwidth_bytes_per_s": self.hbm_bandwidth_gb_per_s,
            "sm_count": self.sm_count,
            "row_tile": self.row_tile,
            "boost_clock_hz": self.boost_clock_mhz,
            "shared_memory_per_sm_bytes": self.shared_memory_per_sm_kib,
            "register_file_per_sm_bytes": self.register_file_per_sm_kib,
            "l2_bytes": self.l2_mib,
            "link_bandwidth_bytes_per_s": self.link.bandwidth_gb_per_s if self.link else None,
            "link_per_peer_bytes_per_s": self.link.per_peer_gb_per_s if self.link else None,
            "pcie_bandwidth_bytes_per_s": self.pcie_bandwidth_gb_per_s,
            "tdp_w": self.tdp_w,
            "price_per_hour_usd": self.price_per_hour_usd,
            **{f"peak_flops_per_s.{kind}": peak for kind, peak in self.peak_tflops.items()},
            **{f"best_gemm_flops_per_s.{kind}": best for kind, best in self.best_gemm_tflops.items()},
        }
        sources = {field: sourced.source for field, sourced in given.items() if sourced}
        sources.setdefault("cuda_memory_bytes", f"computed: memory less {DRIVER_MIB} MiB for the driver")
        sources["on_chip_bandwidth_bytes_per_s"] = "computed: SMs x 128 B per clock x boost clock"
        return sources
