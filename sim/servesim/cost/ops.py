"""Laws of matrix products and of kernels that only move data: seconds from sizes and measured efficiency.

Every law is a launch time plus work over an achieved rate, and never falls when the work grows, but for the
few rows at which a CPU goes through a product another way (cost/blocking.py).  Work is per GPU: the caller
has divided by the tensor-parallel degree.  Coefficients come from the GPU's file
(Efficiency); the forms are those of docs/model.md, "Time of one step".  Sizes are numbers, or numpy arrays of
equal shape: `servesim fit` asks the very laws that the simulation uses, for a whole table at once.
"""

from __future__ import annotations

from servesim.config.profiles import ElementwiseKind, GemmEfficiency, GpuProfile
from servesim.config.weight_formats import PEAK_OF_PRODUCT, ProductType, WeightFormat
from servesim.cost.blocking import is_turned
from servesim.errors import ConfigError, Problem

__all__ = ["Elementwise", "Gemm", "gemm_efficiency", "joined", "larger", "smaller"]

_ROW_TILE_EXPANDED = 16  # of kernels that expand the weights first, such as Marlin
_WAVE_TILE = 128  # rows and columns of the tile that one SM works on
_MAX_WAVE_LOSS = 4.0

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


class Gemm:
    """Matrix product of a step's tokens with one weight matrix.

    launch + (compute^knee + memory^knee)^(1/knee): a large knee is the plain roofline, a small one lets
    compute and memory time add up near the ridge.  Compute rounds rows up to the tile and pays for a share of
    the SMs that the last wave of tiles leaves idle; a matrix streams as if it had some columns more, because
    a narrow one cannot keep all SMs asking for bytes.  A quantised product first converts its input.  On a
    CPU computing takes longer where the rows do not stay in L2.
    Raises ConfigError when the GPU has no units or no coefficients for the product.
    """

    __slots__ = (
        "_activation_bytes",
        "_convert_s",
        "_flops_per_s",
        "_knee",
        "_memory_bytes_per_s",
        "_narrow_columns",
        "_row_tile",
        "_sm_count",
        "_turned",
        "_wave",
        "_weight_bytes",
        "launch_s",
    )

    def __init__(self, gpu: GpuProfile, weights: WeightFormat) -> None:
        product = weights.product_on({str(kind): peak for kind, peak in gpu.peak_flops_per_s.items()})
        efficiency = gemm_efficiency(gpu, product)
        self._weight_bytes = weights.bytes_per_weight
        self._row_tile = _ROW_TILE_EXPANDED if product == "bf16" and weights.bits < 16 else gpu.row_tile
        self._activation_bytes = weights.activation_bytes if product == weights.product else 2.0
        self.launch_s = efficiency.launch_s
        self._knee = efficiency.knee
        self._wave = efficiency.wave
        self._turned = efficiency.turned
        self._convert_s = efficiency.convert_bytes / gpu.hbm_bandwidth_bytes_per_s
        self._narrow_columns = efficiency.narrow_columns
        self._sm_count = gpu.sm_count
        self._flops_per_s = gpu.peak_flops_per_s[PEAK_OF_PRODUCT[product]] * efficiency.compute
        self._memory_bytes_per_s = gpu.hbm_bandwidth_bytes_per_s * efficiency.memory

    def seconds(self, num_rows: float, n: float, k: float) -> float:
        """Time of (num_rows x k) times (k x n)."""
        wave_columns = _WAVE_TILE * self._sm_count
        tiles = -(-num_rows // _WAVE_TILE) * -(-n // _WAVE_TILE)
        waves = -(-num_rows // self._row_tile) * self._row_tile * n / (_WAVE_TILE * wave_columns)
        idle = smaller(-(-tiles // self._sm_count), _MAX_WAVE_LOSS * waves) - waves
        wave_s = 2.0 * _WAVE_TILE * wave_columns * k / self._flops_per_s
        compute_s = wave_s * (waves + self._wave * idle)
        if self._turned:
            compute_s = compute_s * (1.0 + self._turned * is_turned(num_rows, n, k))
        moved_bytes = self._weight_bytes * k * (n + self._narrow_columns)
        moved_bytes += self._activation_bytes * num_rows * k + 2.0 * num_rows * n
        product_s = joined(compute_s, moved_bytes / self._memory_bytes_per_s, self._knee)
        return self.launch_s + product_s + self._convert_s * num_rows * k


def joined(compute_s: float, memory_s: float, knee: float) -> float:
    """Time of work that computes and moves bytes: the longer part when ``knee`` is large, their sum at 1."""
    high = larger(compute_s, memory_s)
    low = compute_s + memory_s - high
    seconds: float = high * (1.0 + abs(low / high) ** knee) ** (1.0 / knee)
    return seconds


def gemm_efficiency(gpu: GpuProfile, product: ProductType) -> GemmEfficiency:
    """The coefficients of a kind of product, or of the one that stands in; raises ConfigError without any."""
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
    """Kernels that only move data: never below their launch, never faster than their bytes.

    Where they were measured kind by kind, on a CPU, the bytes come after the launch, and a kind that was not
    measured is a part of something that was.
    """

    __slots__ = ("_bytes_per_s", "_launch_s", "_measured")

    def __init__(self, gpu: GpuProfile) -> None:
        self._launch_s = gpu.efficiency.elementwise_launch_s
        self._bytes_per_s = gpu.hbm_bandwidth_bytes_per_s * gpu.efficiency.gemm["bf16"].memory
        self._measured = gpu.efficiency.elementwise

    @property
    def is_measured(self) -> bool:
        """Whether there is a law for every kind."""
        return bool(self._measured)

    def seconds(self, kind: ElementwiseKind, num_bytes: float) -> float:
        """Time to move ``num_bytes``, read and written."""
        if not self._measured:
            return larger(self._launch_s, num_bytes / self._bytes_per_s)
        law = self._measured.get(kind)
        return 0.0 * num_bytes if law is None else law.launch_s + num_bytes / law.bytes_per_s
