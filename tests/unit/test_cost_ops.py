"""Laws of products, elementwise kernels and communication: hand-computed values, monotony, refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from servesim.config.load import list_data
from servesim.config.profiles import load_gpu
from servesim.config.weight_formats import PEAK_OF_PRODUCT, WEIGHT_FORMATS
from servesim.cost.collectives import AllReduce, PipelineSend
from servesim.cost.ops import Elementwise, Gemm, larger, smaller
from servesim.errors import ConfigError

A100 = load_gpu("a100-80gb-sxm")
H100 = load_gpu("h100-sxm")
B200 = load_gpu("b200")
GPUS = {name: load_gpu(name) for name in list_data("gpus")}
PLAIN = WEIGHT_FORMATS["none"]


def formats_of(gpu):
    """The weight formats that a GPU can multiply with."""
    known = []
    for name, weights in WEIGHT_FORMATS.items():
        try:
            Gemm(gpu, weights)
        except ConfigError:
            continue
        known.append(name)
    return known


def test_gemm_is_the_law_written_out():
    law = H100.efficiency.gemm["bf16"]
    rows, n, k = 200, 6144, 4096  # 2 x 48 tiles of 128 x 128 on 132 SMs: one wave, 96 SMs busy
    wave_s = 2 * 128 * 128 * 132 * k / (989.4e12 * law.compute)
    busy = 256 * n / (128 * 128 * 132)
    compute = wave_s * (busy + law.wave * (1 - busy))
    moved = 2 * ((n + law.narrow_columns) * k + rows * k) + 2 * rows * n
    memory = moved / (3.35e12 * law.memory)
    expected = law.launch_s + (compute**law.knee + memory**law.knee) ** (1 / law.knee)
    assert Gemm(H100, PLAIN).seconds(rows, n, k) == pytest.approx(expected, rel=1e-9)


def test_a_small_product_streams_weights_and_a_large_one_computes():
    gemm, law = Gemm(H100, PLAIN), H100.efficiency.gemm["bf16"]
    streaming = 2 * (28672 + law.narrow_columns) * 4096 / (3.35e12 * law.memory)
    assert gemm.seconds(1, 28672, 4096) == pytest.approx(law.launch_s + streaming, rel=0.001)
    computing = 2 * 8192 * 28672 * 4096 / (989.4e12 * law.compute)
    assert gemm.seconds(8192, 28672, 4096) == pytest.approx(computing, rel=0.01)


def test_weights_of_fewer_bits_stream_faster_and_compute_as_before():
    plain, four = Gemm(H100, PLAIN), Gemm(H100, WEIGHT_FORMATS["w4a16"])
    ratio = (four.seconds(1, 8192, 8192) - four.launch_s) / (plain.seconds(1, 8192, 8192) - plain.launch_s)
    assert ratio == pytest.approx(4.125 / 16, rel=0.02)
    assert four.seconds(8192, 8192, 8192) == pytest.approx(plain.seconds(8192, 8192, 8192), rel=0.001)


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("none", 16),
        ("fp8", 8),
        ("fp8_block", 8.002),
        ("int8", 8),
        ("w4a16", 4.125),
        ("mxfp4", 4.25),
        ("nvfp4", 4.5),
    ],
)
def test_bits_of_a_weight_with_its_scales(name, bits):
    assert WEIGHT_FORMATS[name].bits == pytest.approx(bits, abs=1e-4)


def test_nvfp4_multiplies_in_four_bits_on_blackwell_only():
    nvfp4, mxfp4 = WEIGHT_FORMATS["nvfp4"], WEIGHT_FORMATS["mxfp4"]
    shape = (8192, 8192, 8192)
    assert Gemm(H100, nvfp4).seconds(*shape) == pytest.approx(Gemm(H100, PLAIN).seconds(*shape), rel=0.001)
    # Measured on B200: 1.9 to 2.4 times bf16, not the 4 times of the peaks.
    assert 1.9 <= Gemm(B200, PLAIN).seconds(*shape) / Gemm(B200, nvfp4).seconds(*shape) <= 2.6
    assert Gemm(B200, mxfp4).seconds(*shape) == pytest.approx(Gemm(B200, PLAIN).seconds(*shape), rel=0.001)


def test_int8_borrows_the_shares_of_fp8_or_of_bf16():
    int8 = WEIGHT_FORMATS["int8"]
    assert Gemm(H100, int8).seconds(512, 4096, 4096) == Gemm(H100, WEIGHT_FORMATS["fp8"]).seconds(
        512, 4096, 4096
    )
    law = A100.efficiency.gemm["bf16"]
    computing = 2 * 8192 * 8192 * 8192 / (624e12 * law.compute)
    assert Gemm(A100, int8).seconds(8192, 8192, 8192) == pytest.approx(computing, rel=0.06)
    # B300's int8 units are cut down to 154 TOPS.
    b300 = GPUS["b300"]
    assert Gemm(b300, int8).seconds(8192, 8192, 8192) > 5 * Gemm(b300, PLAIN).seconds(8192, 8192, 8192)


@settings(deadline=None, max_examples=300)
@given(
    name=st.sampled_from(sorted(GPUS)),
    rows=st.integers(1, 9000),
    more=st.integers(1, 600),
    n=st.sampled_from([576, 4096, 6144, 14336, 128256]),
    k=st.sampled_from([512, 4096, 14336]),
    data=st.data(),
)
def test_gemm_never_takes_less_time_for_more_rows_nor_than_physics(name, rows, more, n, k, data):
    gpu = GPUS[name]
    weights = WEIGHT_FORMATS[data.draw(st.sampled_from(formats_of(gpu)))]
    gemm = Gemm(gpu, weights)
    here = gemm.seconds(rows, n, k)
    assert gemm.seconds(rows + more, n, k) >= here * (1 - 1e-12)
    peak = gpu.peak_flops_per_s[PEAK_OF_PRODUCT[weights.product_on(gpu.peak_flops_per_s)]]
    assert here >= 2 * rows * n * k / peak
    assert here >= weights.bytes_per_weight * n * k / gpu.hbm_bandwidth_bytes_per_s


def test_laws_take_whole_tables():
    rows, n, k = np.array([1.0, 200.0, 8192.0]), np.array([4096.0, 6144.0, 1024.0]), np.array([4096.0] * 3)
    gemm = Gemm(H100, PLAIN)
    one_by_one = [gemm.seconds(*map(int, sizes)) for sizes in zip(rows, n, k, strict=True)]
    assert gemm.seconds(rows, n, k) == pytest.approx(one_by_one, rel=1e-12)
    sizes = np.array([1e3, 1e6, 1e9])
    assert AllReduce(H100, 8).seconds(sizes) == pytest.approx([AllReduce(H100, 8).seconds(s) for s in sizes])


@given(a=st.floats(0, 1e3), b=st.floats(0, 1e3))
def test_larger_and_smaller(a, b):
    assert larger(a, b) == pytest.approx(max(a, b), rel=1e-12, abs=1e-12)
    assert smaller(a, b) == pytest.approx(min(a, b), rel=1e-12, abs=1e-12)


def test_all_reduce_takes_the_fastest_algorithm():
    law, rates = AllReduce(H100, 8), H100.efficiency.all_reduce[8]
    small, middle, large = 32 * 1024, 2 * 2**20, 256 * 2**20
    assert law.seconds(small) == pytest.approx(rates.small_launch_s + small / rates.small_bytes_per_s)
    assert law.seconds(middle) == pytest.approx(
        rates.middle_launch_s + 1.75 * middle / rates.middle_bus_bytes_per_s
    )
    assert law.seconds(large) == pytest.approx(
        rates.large_launch_s + 1.75 * large / rates.large_bus_bytes_per_s
    )
    assert law.gather_seconds(large) < law.seconds(large)
    assert AllReduce(H100, 1).seconds(large) == 0


@settings(deadline=None)
@given(
    name=st.sampled_from(sorted(GPUS)), num_bytes=st.floats(1, 1e9), more=st.floats(0, 1e8), data=st.data()
)
def test_all_reduce_grows_and_never_beats_the_link(name, num_bytes, more, data):
    gpu = GPUS[name]
    degree = data.draw(st.sampled_from(sorted(gpu.efficiency.all_reduce)))
    law = AllReduce(gpu, degree)
    assert law.seconds(num_bytes + more) >= law.seconds(num_bytes) * (1 - 1e-9)
    assert law.seconds(num_bytes) >= num_bytes / gpu.peer_bandwidth_bytes_per_s(degree)


def test_a_pipeline_send_is_a_launch_and_the_link():
    assert PipelineSend(H100, 2).seconds(450e6) == pytest.approx(10e-6 + 1e-3)
    # Sixteen GPUs are more than one board: the neighbour is reached over PCIe.
    assert PipelineSend(H100, 16).seconds(64e6) == pytest.approx(10e-6 + 1e-3)


def test_elementwise_is_a_launch_until_its_bytes_take_longer():
    law = Elementwise(H100)
    assert law.seconds("norm", 1000) == pytest.approx(2.5e-6)
    assert law.seconds("rotation", 1e9) == pytest.approx(
        1e9 / (3.35e12 * H100.efficiency.gemm["bf16"].memory)
    )


def test_a_gpu_without_the_units_refuses_a_product():
    peaks = {kind: peak for kind, peak in A100.peak_flops_per_s.items() if kind != "int8"}
    without = A100.model_copy(update={"peak_flops_per_s": peaks})
    with pytest.raises(ConfigError, match=r"engine\.quantization  a100-80gb-sxm has no int8 matrix products"):
        Gemm(without, WEIGHT_FORMATS["int8"])


def test_an_unknown_degree_of_parallelism_is_refused():
    with pytest.raises(ConfigError, match=r"engine\.tensor_parallel_size .* got 3 "):
        AllReduce(H100, 3)


CPU = Path(__file__).parents[2] / "reports" / "validation" / "hardware" / "cpu-core.yaml"


def test_bytes_come_after_the_launch_where_their_rate_was_measured():
    core = load_gpu(str(CPU))
    laws = core.efficiency.elementwise
    assert {"norm", "head_norm", "rotation", "activation", "sampling", "layer"} == set(laws)
    for kind, law in laws.items():
        seconds = Elementwise(core).seconds(kind, 1e6)
        assert seconds == pytest.approx(law.launch_s + 1e6 / law.bytes_per_s)
    # Experts choose within the operator that was measured as a whole.
    assert Elementwise(core).seconds("choice", 1e6) == 0.0


def test_rows_are_computed_in_tiles_of_the_device():
    """One token costs a whole tile of rows; a device with a small tile wastes less on it."""
    core = load_gpu(str(CPU))
    assert (core.row_tile, H100.row_tile) == (16, 64)
    coarse = core.model_copy(update={"row_tile": 64})
    n = k = 4096
    assert Gemm(core, PLAIN).seconds(1, n, k) < Gemm(coarse, PLAIN).seconds(1, n, k)
    assert Gemm(core, PLAIN).seconds(64, n, k) == Gemm(coarse, PLAIN).seconds(64, n, k)
    compute = [Gemm(core, PLAIN).seconds(rows, n, k) for rows in (1, 16, 17)]
    assert compute[1] - compute[0] < compute[2] - compute[1]
