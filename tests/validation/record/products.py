"""Times first products of many shapes on a CPU as vLLM's build runs them:  python -m record.products FOLDER

Writes rows of kernels.csv: `gemm_first`, what the first product of so many rows takes longer than later ones.
Nothing is judged on a model that has these shapes. How long a product takes once it is prepared is not taken
from here: weights of so many shapes leave no cache as a model's do.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from record.folder import Folder
from record.operators import kernel_row
from record.plans import CPU_ENVIRONMENT

__all__ = ["product_rows"]

_SHAPES = (
    (768, 1536), (768, 2048), (896, 2304), (1024, 3072), (1280, 768), (1280, 3328), (1536, 1536),
    (2048, 768), (2048, 1024), (2560, 640), (3072, 768), (3072, 1536), (3584, 896), (4096, 768),
    (4096, 1024), (5120, 1280), (6144, 1024), (6144, 1280),
)  # fmt: skip
_ROWS = (37, 66, 98, 133, 165, 199, 229, 261, 295, 327, 359, 391, 423, 455, 487, 511)
_LAYERS, _TIMES, _REPEATS = 6, 3, 3


def product_rows() -> Iterator[list[object]]:
    """One process's times; a product that was made ready stays so."""
    import torch
    import vllm
    import vllm._C
    from vllm import _custom_ops as ops

    torch.set_num_threads(1)
    layers = {
        (n, k): [ops.create_onednn_mm(torch.randn(n, k, dtype=torch.bfloat16).t()) for _ in range(_LAYERS)]
        for n, k in _SHAPES
    }

    def called(matrix: object, rows: object) -> float:
        begin_s = time.thread_time()
        ops.onednn_mm(matrix, rows, None)
        return 1e6 * (time.thread_time() - begin_s)

    for count in (2047, 17, *_ROWS):  # the first two warm up
        for (n, k), matrices in layers.items():
            rows = torch.randn(count, k, dtype=torch.bfloat16)
            first_us = [called(matrix, rows) for matrix in matrices]
            later_us = statistics.median(called(each, rows) for _ in range(_TIMES) for each in matrices)
            extra_us = max(first_us[0] - later_us, 1.0)
            if count in _ROWS:
                sizes = {"m": count, "n": n, "k": k, "kernel": "onednn"}
                yield kernel_row(vllm.__version__, "gemm_first", extra_us, **sizes)


def main() -> int:
    """Some processes one after another; the median of each time stays."""
    folder = Folder(Path(sys.argv[1]))
    if len(sys.argv) > 2:
        folder.add_kernels(product_rows())
        return 0
    words = [sys.executable, "-m", "record.products", sys.argv[1], "once"]
    for _ in range(_REPEATS):
        subprocess.run(words, env={**os.environ, **dict(CPU_ENVIRONMENT)}, check=True)
    folder.merge_kernels()
    return 0


if __name__ == "__main__":
    sys.exit(main())
