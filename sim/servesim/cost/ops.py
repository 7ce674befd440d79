"""Laws of matrix products and of kernels that only move data: seconds from sizes and measured efficiency.

Every law is a launch time plus work over an achieved rate, and never falls when the work grows.  Work is
per GPU: the caller has divided by the tensor-parallel degree.  Coefficients come from the GPU's file
(Efficiency); the forms are those of docs/model.md, "Time of one step".  Sizes are numbers, or numpy arrays of
equal shape: `servesim fit` asks the very laws that the simulation uses, for a whole table at once.
"""

from __future__ import annotations

from typing import NamedTuple

from servesim.config.profiles import GemmEfficiency, GpuProfile
from servesim.config.weight_formats import PEAK_OF_PRODUCT, ProductType, WeightFormat
from servesim.errors import ConfigError, Problem

__all__ = ["Elementwise", "ExpertRows", "Gemm", "larger", "smaller"]

_ROW_TILE = 64  # rows a tensor-core tile computes even when fewer are asked for
_ROW_TILE_EXPANDED = 16  # of kernels that expand the weights first, such as Marlin
_WAVE_TILE = 128  # rows and columns of the tile that one SM works on
_MAX_WAVE_LOSS = 4.0
# Of the bandwidth that plain products reach: 128 experts of 2048 x 768 in bf16 take 420 to 450 us on H100
# (measured tables of aiconfigurator-core).
_GROUPED_MEMORY = 0.93

# Whose coefficients stand in for a product that no GPU of the tables was measured with.
_STAND_INS: dict[ProductType, tuple[ProductType, ...]] = {
    "bf16": ("bf16",),
    "fp8": ("fp8",),
    "fp8_block": ("fp8_block", "fp8"),
    "int8": ("fp8", "bf16"),  # shares of the int8 peak; fp8 runs on the same units
    "nvfp4": ("nvfp4", "fp8"),
}


def larger(a: float, b: float) -> float:
    """The larger of two numbers, or of two arrays element by element."""
    return 0.5 * (a + b + abs(a - b))


def smaller(a: float, b: float) -> float:
    """The smaller of two numbers, or of two arrays element by element."""
    return 0.5 * (a + b - abs(a - b))


class ExpertRows(NamedTuple):
    """What one GPU's experts have to do in a step."""

    rows: float
    """Routed copies of tokens."""
    tile_rows: float
    """The same with every expert's share rounded up to the tile."""
    experts: float
    """Experts that get at least one row; their weights are read."""


class Gemm:
    """Matrix product of a step's tokens with one weight matrix.

    launch + (compute^knee + memory^knee)^(1/knee): a large knee is the plain roofline, a small one lets
    compute and memory time add up near the ridge.  Compute rounds rows up to the tile and pays for a share of
    the SMs that the last wave of tiles leaves idle; a matrix streams as if it had some columns more, because
    a narrow one cannot keep all SMs asking for bytes.
    Raises ConfigError when the GPU has no units or no coefficients for the product.
    """

    __slots__ = (
        "_activation_bytes",
        "_flops_per_s",
        "_knee",
        "_memory_bytes_per_s",
        "_narrow_columns",
        "_sm_count",
        "_wave",
        "launch_s",
        "row_tile",
        "weight_bytes",
    )

    def __init__(self, gpu: GpuProfile, weights: WeightFormat) -> None:
        product = weights.product_on({str(kind): peak for kind, peak in gpu.peak_flops_per_s.items()})
        efficiency = _efficiency(gpu, product)
        self.weight_bytes = weights.bytes_per_weight
        self.row_tile = _ROW_TILE_EXPANDED if product == "bf16" and weights.bits < 16 else _ROW_TILE
        self._activation_bytes = weights.activation_bytes if product == weights.product else 2.0
        self.launch_s = efficiency.launch_s
        self._knee = efficiency.knee
        self._wave = efficiency.wave
        self._narrow_columns = efficiency.narrow_columns
        self._sm_count = gpu.sm_count
        self._flops_per_s = gpu.peak_flops_per_s[PEAK_OF_PRODUCT[product]] * efficiency.compute
        self._memory_bytes_per_s = gpu.hbm_bandwidth_bytes_per_s * efficiency.memory

    def seconds(self, num_rows: float, n: float, k: float) -> float:
        """Time of (num_rows x k) times (k x n)."""
        wave_columns = _WAVE_TILE * self._sm_count
        tiles = -(-num_rows // _WAVE_TILE) * -(-n // _WAVE_TILE)
        waves = -(-num_rows // self.row_tile) * self.row_tile * n / (_WAVE_TILE * wave_columns)
        idle = smaller(-(-tiles // self._sm_count), _MAX_WAVE_LOSS * waves) - waves
        wave_s = 2.0 * _WAVE_TILE * wave_columns * k / self._flops_per_s
        compute_s = wave_s * (waves + self._wave * idle)
        moved_bytes = self.weight_bytes * k * (n + self._narrow_columns)
        moved_bytes += self._activation_bytes * num_rows * k + 2.0 * num_rows * n
        return self.launch_s + self._join(compute_s, moved_bytes / self._memory_bytes_per_s)

    def grouped_seconds(self, load: ExpertRows, n: float, k: float) -> float:
        """Time of the rows of several experts, each times its own matrix of k x n, in one launch."""
        moved_bytes = self.weight_bytes * k * (load.experts * n + self._narrow_columns)
        moved_bytes += self._activation_bytes * load.rows * k + 2.0 * load.rows * n
        compute_s = 2.0 * load.tile_rows * n * k / self._flops_per_s
        return self.launch_s + self._join(
            compute_s, moved_bytes / (self._memory_bytes_per_s * _GROUPED_MEMORY)
        )

    def _join(self, compute_s: float, memory_s: float) -> float:
        high = larger(compute_s, memory_s)
        low = compute_s + memory_s - high
        joined: float = high * (1.0 + abs(low / high) ** self._knee) ** (1.0 / self._knee)
        return joined


def _efficiency(gpu: GpuProfile, product: ProductType) -> GemmEfficiency:
    known = gpu.efficiency.gemm
    if PEAK_OF_PRODUCT[product] in gpu.peak_flops_per_s:
        for stand_in in _STAND_INS[product]:
            if stand_in in known:
                return known[stand_in]
    raise ConfigError(
        Problem(
            f"{gpu.name} has no {product} matrix products",
            path="hardware.gpu" if product == "bf16" else "engine.quantization",
            got=product,
            hint=f"it has: {', '.join(sorted(known))}",
            next_step="set engine.quantization: none, or choose a GPU with these products",
        )
    )


class Elementwise:
    """A kernel that only moves data: never below its launch, never faster than its bytes."""

    __slots__ = ("_bytes_per_s", "_launch_s")

    def __init__(self, gpu: GpuProfile) -> None:
        self._launch_s = gpu.efficiency.elementwise_launch_s
        self._bytes_per_s = gpu.hbm_bandwidth_bytes_per_s * gpu.efficiency.gemm["bf16"].memory

    def seconds(self, num_bytes: float) -> float:
        """Time to move ``num_bytes``, read and written."""
        return larger(self._launch_s, num_bytes / self._bytes_per_s)
