"""Times products of many shapes on a CPU as vLLM's build runs them:  python -m record.products FOLDER KERNELS

Writes rows of kernels.csv: `gemm`, and `gemm_first`, what the first product of so many rows takes longer than
later ones.  No model that is judged has one of these shapes.  Shapes are called as models call theirs, layer
after layer, so that weights leave the caches.  The fitted model's own shapes are among them, and times are
multiplied by what makes those come out as in KERNELS, its operators' times: machines have faster hours, and
products by themselves other neighbours than in an engine.  For `gemm` that is done at every count of rows.
"""

from __future__ import annotations

import csv
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from record.folder import Folder
from record.operators import kernel_row
from record.plans import CPU_ENVIRONMENT

__all__ = ["product_rows"]

Key = tuple[str, int, int, int]
"""Operator, rows, columns, inner dimension."""
Times = dict[Key, float]
"""Microseconds."""

_FITTED = ((1280, 768), (768, 768), (4096, 768), (768, 2048))
_SHAPES = (
    _FITTED,
    ((1408, 704), (3840, 704), (704, 1920)),
    ((1792, 896), (896, 896), (4864, 896), (896, 2432)),
    ((1920, 960), (960, 960), (5120, 960), (960, 2560)),
    ((1536, 1024), (1280, 1024), (4608, 1024), (1024, 2304)),
    ((3072, 1088), (2176, 1088), (1088, 2688)),
    ((2304, 1152), (1152, 1152), (6144, 1152), (1152, 3072)),
    ((2560, 1280), (1280, 1280), (6656, 1280), (1280, 3328)),
    ((2048, 832), (2048, 1152), (2048, 1280), (1024, 2560)),  # columns that are a power of two
)
"""Columns and inner dimensions of a layer's products, model by model."""
_FEW_ROWS = (2, 5, 9, 16)  # of decodes: nothing is told of first products
_ROWS = (23, 32, 37, 45, 47, 65, 83, 99, 125, 128, 151, 163, 181, 199, 211, 230, 257, 277, 299, 317, 347, 371,
         401, 421, 449, 469, 491, 511)  # fmt: skip
_LAYERS, _TIMES, _REPEATS = 6, 4, 3
_OTHER_BYTES = 2**23  # what runs between two products leaves nothing of the last one in the core's cache


def product_rows(in_table: Times) -> Iterator[list[object]]:
    """One process's times; a product that was made ready stays so."""
    import torch
    import vllm
    import vllm._C
    from vllm import _custom_ops as ops

    torch.set_num_threads(1)
    models = [
        [
            [ops.create_onednn_mm(torch.randn(n, k, dtype=torch.bfloat16).t()) for n, k in shapes]
            for _ in range(_LAYERS)
        ]
        for shapes in _SHAPES
    ]
    other = torch.zeros(_OTHER_BYTES // 4)

    def called(matrix: object, rows: object) -> float:
        other.add_(1)
        begin_s = time.thread_time()
        ops.onednn_mm(matrix, rows, None)
        return 1e6 * (time.thread_time() - begin_s)

    times_us: Times = {}
    for count in (2047, 17, *_FEW_ROWS, *_ROWS):  # the first two warm up
        rows = {
            k: torch.randn(count, k, dtype=torch.bfloat16) for k in {k for each in _SHAPES for _, k in each}
        }
        calls_us: defaultdict[tuple[int, int], list[float]] = defaultdict(list)
        for _ in range(_TIMES):  # of all shapes in turn: a slow second slows them alike
            for shapes, layers in zip(_SHAPES, models, strict=True):
                for layer in layers:
                    for shape, matrix in zip(shapes, layer, strict=True):
                        calls_us[shape].append(called(matrix, rows[shape[1]]))
        for shape, (first_us, *later_us) in calls_us.items():
            each_us = statistics.median(later_us)
            if count in (*_FEW_ROWS, *_ROWS):
                times_us["gemm", count, *shape] = each_us
            if count in _ROWS:
                times_us["gemm_first", count, *shape] = max(first_us - each_us, 1.0)
    first = _hour(in_table, times_us, [key for key in times_us if key[0] == "gemm_first"])
    print(f"first products are multiplied by {first:.3f}", file=sys.stderr)
    for (op, m, n, k), latency_us in times_us.items():
        in_engine = [key for key in times_us if key[:2] == ("gemm", m) and key in in_table]
        if (n, k) in _FITTED or (op == "gemm" and not in_engine):
            continue
        hour = first if op == "gemm_first" else _hour(in_table, times_us, in_engine)
        named = {"m": m, "n": n, "k": k, "kernel": "onednn"}
        yield kernel_row(vllm.__version__, op, hour * latency_us, **named)


def _hour(in_table: Times, now: Times, keys: list[Key]) -> float:
    """How much longer the fitted model's products took in its engine, when the table was recorded."""
    return statistics.median(in_table[key] / now[key] for key in keys if key in in_table)


def _table(path: str) -> Times:
    """Times of the fitted model's products."""
    with Path(path).open(encoding="utf-8") as file:
        return {
            (row["op"], int(row["m"]), int(row["n"]), int(row["k"])): float(row["latency_us"])
            for row in csv.DictReader(file)
            if row["op"] in ("gemm", "gemm_first") and (int(row["n"]), int(row["k"])) in _FITTED
        }


def main() -> int:
    """Some processes one after another; the median of each time stays."""
    folder = Folder(Path(sys.argv[1]))
    if len(sys.argv) > 3:
        folder.add_kernels(product_rows(_table(sys.argv[2])))
        return 0
    words = [sys.executable, "-m", "record.products", *sys.argv[1:3], "once"]
    for _ in range(_REPEATS):
        subprocess.run(words, env={**os.environ, **dict(CPU_ENVIRONMENT)}, check=True)
    folder.merge_kernels()
    return 0


if __name__ == "__main__":
    sys.exit(main())
