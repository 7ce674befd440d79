"""How oneDNN cuts products, and that the measured products show it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from servesim.config.profiles import load_gpu
from servesim.config.weight_formats import WEIGHT_FORMATS
from servesim.cost.blocking import inner_block, is_turned, is_uneven
from servesim.cost.ops import Gemm

HARDWARE = Path(__file__).parents[2] / "reports" / "validation" / "hardware"
JUDGED = {
    *((1280, 640), (640, 640), (3584, 640), (640, 1792)),
    *((2048, 1024), (1024, 1024), (5632, 1024), (1024, 2816)),
    *((1024, 512), (512, 512)),
}
"""Columns and inner dimensions of the products of llama-c57m, llama-c127m and moe-c130m."""


def measured(op):
    table = pd.read_csv(HARDWARE / "cpu-core-kernels.csv")
    return table[table["op"] == op].astype({"m": int, "n": int, "k": int})


@pytest.mark.parametrize(
    ("k", "block", "uneven"),
    [
        (704, 352, False),
        (768, 384, False),
        (960, 480, False),
        (1024, 352, True),
        (1088, 384, True),
        (1152, 384, False),
        (1280, 448, True),
        (2048, 416, True),
    ],
)
def test_the_inner_dimension_is_cut_into_parts_that_l1_has_room_for(k, block, uneven):
    assert inner_block(k) == block
    assert bool(is_uneven(k)) is uneven


@pytest.mark.parametrize(
    ("n", "k", "stays", "turns"),
    [
        (1088, 2688, 181, 199),
        (1024, 2304, 251, 257),
        (1152, 3072, 165, 181),
        (704, 1920, 277, 299),
        (4096, 768, 347, 373),
        (6144, 1152, 343, 371),
    ],
)
def test_products_turn_where_rows_leave_l2_or_results_share_its_sets(n, k, stays, turns):
    assert not is_turned(stays, n, k)
    assert is_turned(turns, n, k)
    both = is_turned(np.array([stays, turns]), np.array([n, n]), np.array([k, k]))
    assert both.tolist() == [False, True]


def test_no_judged_product_is_in_the_table():
    for op in ("gemm", "gemm_first"):
        rows = measured(op)
        assert not JUDGED & set(zip(rows["n"], rows["k"], strict=True))


def test_code_for_an_uneven_inner_dimension_takes_longer_than_for_its_neighbours():
    """1,024 and 1,088 are uneven, 960 and 1,152 are not."""
    rows = measured("gemm_first")
    rows = rows[rows["m"].between(64, 340)]
    per_row = (rows["latency_us"] / rows["m"]).groupby(rows["k"]).median()
    assert min(per_row[1024], per_row[1088]) > 1.25 * max(per_row[960], per_row[1152])


def test_turned_products_compute_more_slowly_and_the_law_says_so():
    rows = measured("gemm")
    m, n, k = (rows[name].to_numpy() for name in "mnk")
    rate = m * n * k / rows["latency_us"].to_numpy()
    turned = is_turned(m, n, k)
    for count in (257, 299, 347):
        same = m == count
        assert np.median(rate[same & turned]) < 0.9 * np.median(rate[same & ~turned])
    gpu = load_gpu(HARDWARE / "cpu-core.yaml")
    gemm = Gemm(gpu, WEIGHT_FORMATS["none"])
    assert gemm.seconds(199, 1088, 2688) / 199 > 1.1 * gemm.seconds(181, 1088, 2688) / 181


def test_gpus_turn_nothing():
    assert {law.turned for law in load_gpu("h100-sxm").efficiency.gemm.values()} == {0.0}
