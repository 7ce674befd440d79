"""GPU profiles: values in SI, sources, measured and derived efficiency, and files that are broken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from servesim.config.load import find_data, list_data, read_yaml
from servesim.config.profiles import load_gpu
from servesim.config.weight_formats import PEAK_OF_PRODUCT
from servesim.errors import ConfigError

SHIPPED = Path(__file__).parents[2] / "hardware" / "gpus"
MEASURED = {"a100-80gb-sxm", "h100-sxm", "h200-sxm", "b200"}
# memory MiB, HBM GB/s, SMs, on-chip TB/s, bf16 and fp8 dense TFLOPS (None: the type does not exist)
TABLE: dict[str, tuple[int, float, int, str, float, float | None]] = {
    "a100-40gb-sxm": (40_960, 1555, 108, "19.5", 312, None),
    "a100-40gb-pcie": (40_960, 1555, 108, "19.5", 312, None),
    "a100-80gb-sxm": (81_920, 2039, 108, "19.5", 312, None),
    "a100-80gb-pcie": (81_920, 1935, 108, "19.5", 312, None),
    "h100-sxm": (81_559, 3350, 132, "33.5", 989.4, 1978.9),
    "h100-pcie": (81_559, 2000, 114, "25.6", 756.5, 1513),
    "h100-nvl": (95_830, 3900, 132, "30.2", 835.5, 1671),
    "h200-sxm": (143_771, 4800, 132, "33.5", 989.4, 1978.9),
    "b200": (183_359, 7672, 148, "37.2", 2250, 4500),
    "gb200": (189_471, 8000, 148, "37.2", 2500, 5000),
    "b300": (275_040, 7750, 148, "36.4", 2250, 4500),
    "l4": (23_034, 300, 58, "15.1", 121, 242),
    "l40s": (46_068, 864, 142, "45.8", 362.05, 733),
    "a10g": (23_028, 600, 80, "17.5", 70, None),
    "rtx-4090": (24_564, 1008, 128, "41.3", 165.2, 330.3),
    "rtx-pro-6000": (97_887, 1792, 188, "63.0", 503.8, 1007.6),
    "mi300x": (196_592, 5300, 304, "81.7", 1307, 2614.9),
}


def test_every_gpu_is_shipped_and_no_other() -> None:
    assert {path.stem for path in SHIPPED.glob("*.yaml")} == set(TABLE)


@pytest.mark.parametrize("name", TABLE)
def test_values_are_in_si(name: str) -> None:
    gpu = load_gpu(name)
    memory_mib, hbm_gb_per_s, sm_count, on_chip, bf16, fp8 = TABLE[name]
    assert gpu.name == name
    assert gpu.memory_bytes == memory_mib * 2**20
    assert gpu.hbm_bandwidth_bytes_per_s == hbm_gb_per_s * 1e9
    assert gpu.sm_count == sm_count
    assert f"{gpu.on_chip_bandwidth_bytes_per_s / 1e12:.1f}" == on_chip
    assert gpu.peak_flops_per_s["bf16"] == pytest.approx(bf16 * 1e12)
    assert ("fp8" in gpu.peak_flops_per_s) == (fp8 is not None)
    assert gpu.peak_flops_per_s.get("fp8", 0.0) == pytest.approx((fp8 or 0.0) * 1e12)
    assert gpu.memory_bytes - 700 * 2**20 < gpu.cuda_memory_bytes <= gpu.memory_bytes


def test_what_a_process_sees_of_the_memory() -> None:
    assert load_gpu("a100-40gb-sxm").cuda_memory_bytes == 40_441 * 2**20  # deviceQuery
    assert f"{load_gpu('h100-sxm').cuda_memory_bytes / 2**30:.2f}" == "79.22"  # a vLLM start-up log
    assert load_gpu("l4").cuda_memory_bytes == (23_034 - 480) * 2**20
    assert load_gpu("l4").sources["cuda_memory_bytes"].startswith("computed")


@pytest.mark.parametrize("name", TABLE)
def test_every_field_that_is_a_number_has_a_source(name: str) -> None:
    gpu = load_gpu(name)
    plain = {"name", "label", "vendor", "architecture", "marketed_memory", "sources", "efficiency"}
    described = {"link_max_gpus", "price_as_of"}  # belong to the link and the price
    for field in type(gpu).model_fields.keys() - plain - described:
        value = getattr(gpu, field)
        if isinstance(value, dict):
            assert all(gpu.sources[f"{field}.{key}"] for key in value)
        elif value:
            assert gpu.sources[field]
    assert gpu.efficiency.provenance
    assert (gpu.price_per_hour_usd is None) == (gpu.price_as_of is None)


def test_h100_carries_the_measured_coefficients() -> None:
    """The file's block in SI units, number by number."""
    gpu = load_gpu("h100-sxm")
    block = read_yaml(find_data("gpus", "h100-sxm"))["efficiency"]["measured"]
    efficiency = gpu.efficiency
    for kind, law in efficiency.gemm.items():
        given = block["gemm"][kind]
        assert law.launch_s == pytest.approx(given["launch_us"] / 1e6)
        for name in ("compute", "memory", "knee", "wave", "narrow_columns"):
            assert getattr(law, name) == given[name]
    for kind, decode in efficiency.decode_attention.items():
        given = block["decode_attention"][kind]
        assert (decode.launch_s, decode.per_seq_kv_head_s, decode.memory) == pytest.approx(
            (given["launch_us"] / 1e6, given["per_seq_kv_head_ns"] / 1e9, given["memory"])
        )
    for kind, prefill in efficiency.prefill_attention.items():
        given = block["prefill_attention"][kind]
        assert (prefill.launch_s, prefill.per_key_s, prefill.compute, prefill.short_tokens) == pytest.approx(
            (given["launch_us"] / 1e6, given["per_key_ns"] / 1e9, given["compute"], given["short_tokens"])
        )
    for degree, sums in efficiency.all_reduce.items():
        given = block["all_reduce"][degree]
        for size in ("small", "middle", "large"):
            assert getattr(sums, f"{size}_launch_s") == pytest.approx(given[f"{size}_launch_us"] / 1e6)
        assert sums.small_bytes_per_s == pytest.approx(given["small_gb_per_s"] * 1e9)
        assert sums.middle_bus_bytes_per_s == pytest.approx(given["middle_bus_gb_per_s"] * 1e9)
        assert sums.large_bus_bytes_per_s == pytest.approx(given["large_bus_gb_per_s"] * 1e9)
    assert efficiency.elementwise_launch_s == pytest.approx(2.5e-6, rel=1e-9)
    assert "aiconfigurator" in efficiency.provenance
    assert efficiency.errors["gemm.bf16"].mean_percent < 6.6


def test_a_block_needs_both_attentions_for_the_same_caches(tmp_path: Path) -> None:
    tree = tree_of("h100-sxm")
    del tree["efficiency"]["measured"]["prefill_attention"]["fp8"]
    with pytest.raises(ConfigError, match="prefill_attention  has other cache types than decode_attention"):
        load_gpu(written(tmp_path, tree))


@pytest.mark.parametrize("name", TABLE)
def test_coefficients_exist_for_what_the_gpu_can_do(name: str) -> None:
    gpu = load_gpu(name)
    efficiency = gpu.efficiency
    has_fp8 = "fp8" in gpu.peak_flops_per_s
    caches = {"bf16", "fp8"} if has_fp8 else {"bf16"}
    assert set(efficiency.decode_attention) == set(efficiency.prefill_attention) == caches
    products = {"bf16", *({"fp8", "fp8_block"} if has_fp8 else ())}
    if name in ("b200", "gb200", "b300"):
        products.add("nvfp4")
    assert set(efficiency.gemm) == products
    assert all(PEAK_OF_PRODUCT[product] in gpu.peak_flops_per_s for product in efficiency.gemm)
    assert set(efficiency.all_reduce) == {2, 4, 8}
    assert (name in MEASURED) == (not efficiency.provenance.startswith("derived")) == bool(efficiency.errors)
    for degree, law in efficiency.all_reduce.items():
        assert law.large_bus_bytes_per_s <= gpu.peer_bandwidth_bytes_per_s(degree)


@pytest.mark.parametrize("name", sorted(MEASURED))
def test_best_product_predicts_the_fitted_share_of_peak(name: str) -> None:
    # The ground of the rule that a derived GPU's compute share is its best product over its peak.
    gpu = load_gpu(name)
    share = gpu.best_gemm_flops_per_s["bf16"] / gpu.peak_flops_per_s["bf16"]
    assert gpu.efficiency.gemm["bf16"].compute == pytest.approx(share, rel=0.09)


def test_work_that_is_spread_over_the_sms_goes_with_their_number() -> None:
    pcie, sxm = load_gpu("h100-pcie").efficiency, load_gpu("h100-sxm").efficiency
    per_head = sxm.decode_attention["bf16"].per_seq_kv_head_s
    assert pcie.decode_attention["bf16"].per_seq_kv_head_s == pytest.approx(per_head * 132 / 114)
    assert pcie.gemm["bf16"].narrow_columns == pytest.approx(sxm.gemm["bf16"].narrow_columns * 114 / 132)
    factor = pcie.gemm["bf16"].compute / sxm.gemm["bf16"].compute
    assert pcie.gemm["bf16"].compute == pytest.approx(400 / 756.5)
    for kind, law in sxm.prefill_attention.items():  # what holds products back holds attention back
        own = pcie.prefill_attention[kind]
        assert own == law.model_copy(update={"compute": own.compute})
        assert own.compute == pytest.approx(law.compute * factor)
    for kind, expert in sxm.experts.items():
        assert pcie.experts[kind].compute == pytest.approx(expert.compute * factor)


def test_a_derived_gpu_with_a_best_product_uses_it() -> None:
    mi300x, h100 = load_gpu("mi300x").efficiency, load_gpu("h100-sxm").efficiency
    assert mi300x.gemm["bf16"].compute == pytest.approx(668 / 1307)
    factor = 668 / 1307 / h100.gemm["bf16"].compute
    assert mi300x.gemm["fp8"].compute == pytest.approx(h100.gemm["fp8"].compute * factor)
    assert mi300x.gemm["bf16"].memory == h100.gemm["bf16"].memory
    assert load_gpu("h100-nvl").efficiency.gemm == h100.gemm


def test_cards_without_a_link_reduce_over_pcie() -> None:
    l40s, a100 = load_gpu("l40s").efficiency.all_reduce, load_gpu("a100-80gb-sxm").efficiency.all_reduce
    for degree in (2, 4, 8):
        assert l40s[degree].large_bus_bytes_per_s == pytest.approx(
            a100[degree].large_bus_bytes_per_s * 32 / 300
        )
        assert l40s[degree].small_bytes_per_s == pytest.approx(a100[degree].small_bytes_per_s * 32 / 300)
        assert l40s[degree].small_launch_s == l40s[degree].middle_launch_s == a100[degree].large_launch_s


def test_a_bridge_joins_a_pair_only() -> None:
    gpu, sxm = load_gpu("a100-80gb-pcie"), load_gpu("a100-80gb-sxm")
    assert gpu.peer_bandwidth_bytes_per_s(2) == 300e9
    assert gpu.peer_bandwidth_bytes_per_s(4) == 32e9
    assert gpu.efficiency.all_reduce[2] == sxm.efficiency.all_reduce[2]
    large = sxm.efficiency.all_reduce[4].large_bus_bytes_per_s
    assert gpu.efficiency.all_reduce[4].large_bus_bytes_per_s == pytest.approx(large * 32 / 300)


def test_a_mesh_gives_one_link_to_each_peer() -> None:
    gpu = load_gpu("mi300x")
    assert [gpu.peer_bandwidth_bytes_per_s(n) / 1e9 for n in (2, 4, 8, 16)] == [64, 192, 448, 64]


def tree_of(name: str) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads(json.dumps(read_yaml(find_data("gpus", name))))
    return tree


def written(folder: Path, tree: object) -> Path:
    path = folder / "broken.yaml"
    path.write_text(json.dumps(tree, indent=1), encoding="utf-8")  # JSON is YAML
    return path


def test_a_users_own_file_by_path_and_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = tree_of("h100-pcie") | {"name": "mine"}
    tree["hbm_bandwidth_gb_per_s"]["value"] = 2039
    path = written(tmp_path, tree)
    assert load_gpu(str(path)).hbm_bandwidth_bytes_per_s == 2039e9
    (tmp_path / "hardware" / "gpus").mkdir(parents=True)
    path.rename(tmp_path / "hardware" / "gpus" / "mine.yaml")
    monkeypatch.chdir(tmp_path)
    assert load_gpu("mine").efficiency.provenance.startswith("derived, not measured: gemm of h100-sxm")
    assert "mine" in list_data("gpus")


def test_an_edited_bandwidth_changes_what_is_reached(tmp_path: Path) -> None:
    tree = tree_of("h200-sxm")
    tree["hbm_bandwidth_gb_per_s"]["value"] = 2 * 4800
    gpu = load_gpu(written(tmp_path, tree))
    share = load_gpu("h200-sxm").efficiency.gemm["bf16"].memory
    assert gpu.hbm_bandwidth_bytes_per_s * gpu.efficiency.gemm["bf16"].memory == 2 * 4.8e12 * share


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"did you mean h100-sxm\?"):
        load_gpu("h100-sxmm")


Change = tuple[tuple[str, ...], object]
MISTAKES: list[tuple[str, Change, list[str]]] = [
    ("h100-sxm", (("memory_gib",), 80), ["memory_gib  unknown key", "did you mean memory_mib?"]),
    ("h100-sxm", (("sm_count",), 132), ["sm_count  a number needs its source", "source: unverified"]),
    ("h100-sxm", (("sm_count", "value"), 1.5), ["sm_count.value", "must be a whole number"]),
    ("h100-sxm", (("tdp_w", "value"), -700), ["tdp_w.value", "greater than 0"]),
    ("h100-sxm", (("l2_mib", "source"), ""), ["l2_mib.source"]),
    ("h100-sxm", (("peak_tflops", "bf17"), {"value": 1, "source": "x"}), ["peak_tflops.bf17"]),
    ("h100-sxm", (("peak_tflops",), {"fp32": {"value": 1, "source": "x"}}), ["peak_tflops  has no bf16"]),
    ("h100-sxm", (("best_gemm_tflops", "bf16", "value"), 1e4), ["bf16 is above the peak"]),
    ("h100-sxm", (("cuda_memory_mib", "value"), 90_000), ["cuda_memory_mib  is larger than memory_mib"]),
    ("l4", (("memory_mib", "value"), 300), ["memory_mib", "that the driver keeps"]),
    ("h100-sxm", (("price_per_hour_usd", "as_of"), "May"), ["price_per_hour_usd.as_of"]),
    ("h100-sxm", (("efficiency",), {}), ["efficiency  needs exactly one of measured and derived"]),
    (
        "h100-sxm",
        (("efficiency", "measured", "gemm"), {}),
        ["gemm, decode_attention and prefill_attention need bf16"],
    ),
    ("h100-sxm", (("efficiency", "measured", "gemm", "bf16", "memory"), 1.2), ["gemm.bf16.memory", "1"]),
    (
        "l4",
        (("efficiency", "derived", "gemm"), "h101-sxm"),
        ["efficiency.derived.gemm", "did you mean h100-sxm?"],
    ),
    (
        "l4",
        (("efficiency", "derived", "attention"), "l40s"),
        ["derived.attention", "measured GPU only", '"l40s"'],
    ),
]


@pytest.mark.parametrize(("name", "change", "words"), MISTAKES)
def test_a_mistake_is_named(tmp_path: Path, name: str, change: Change, words: list[str]) -> None:
    tree = tree_of(name)
    (*sections, key), value = change
    node = tree
    for section in sections:
        node = node[section]
    node[key] = value
    with pytest.raises(ConfigError) as caught:
        load_gpu(written(tmp_path, tree))
    assert "broken.yaml:" in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_all_mistakes_of_a_file_come_at_once(tmp_path: Path) -> None:
    tree = tree_of("l4")
    del tree["tdp_w"]
    tree["sm_count"] = 58
    tree["l2_mb"] = 48
    with pytest.raises(ConfigError) as caught:
        load_gpu(written(tmp_path, tree))
    assert len(caught.value.problems) == 3
