"""The table of docs/cost_of_context.md is what its commands give; run this file to print it anew."""

from __future__ import annotations

import math
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from servesim import studies

PAGE = Path(__file__).parents[2] / "docs/cost_of_context.md"
CONTEXTS = ("8k", "32k", "128k", "500k")
ATTENTION = {"context/llama-8b-gqa.yaml": "GQA", "context/llama-8b-mha.yaml": "MHA"}
GPUS = {"h100-sxm": "H100", "h200-sxm": "H200"}
VARY = (
    f"model={','.join(ATTENTION)}",
    "engine.enable_prefix_caching=true,false",
    f"hardware.gpu={','.join(GPUS)}",
    "engine.tensor_parallel_size=1,2,4,8",
)


def table(jobs: int = 2) -> list[str]:
    """The rows, each for the number of GPUs that is cheapest per request."""
    return [row for context in CONTEXTS for row in rows(context, jobs)]


def rows(context: str, jobs: int) -> list[str]:
    with TemporaryDirectory() as folder:
        frame = studies.sweep(f"context-{context}", VARY, out=folder, jobs=jobs).frame
    found = []
    for keys, group in frame.groupby([axis.split("=")[0] for axis in VARY[:3]], sort=False):
        model, caching, gpu = keys
        known = group[group["refused"] == ""]
        best = known.loc[known["usd_per_request"].idxmin()]
        cells = (
            context,
            ATTENTION[model],
            "on" if caching == "true" else "off",
            f"{best['engine.tensor_parallel_size']} x {GPUS[gpu]}",
            f"{best['computed_tokens_per_request']:,.0f}",
            f"{best['kv_gib_per_request']:.1f}",
            f"{best['usd_per_request'] * 1000:.2f}",
            f"{best['median_ttft_ms'] / 1000:.2f}",
            f"{best['mean_e2el_ms'] / 1000:.1f}",
        )
        found.append(f"| {' | '.join(cells)} |")
    return found


@pytest.fixture(scope="module")
def printed() -> list[str]:
    begins = tuple(f"| {context} |" for context in CONTEXTS)
    return [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith(begins)]


def test_the_table_is_current(printed: list[str]) -> None:
    assert table() == printed


def test_what_the_page_says_follows_from_the_table(printed: list[str]) -> None:
    usd = {tuple(cells[:4]): float(cells[6]) for cells in map(split, printed)}
    cost = {(c, a, k, g.split()[-1]): value for (c, a, k, g), value in usd.items()}
    for context in CONTEXTS:
        for gpu in GPUS.values():
            for attention in ATTENTION.values():
                assert cost[context, attention, "on", gpu] < cost[context, attention, "off", gpu]
            assert cost[context, "GQA", "on", gpu] < cost[context, "MHA", "on", gpu]
    assert cost["500k", "GQA", "off", "H100"] > 60 * cost["8k", "GQA", "off", "H100"]
    assert math.isclose(cost["500k", "GQA", "on", "H100"] / cost["8k", "GQA", "on", "H100"], 29, rel_tol=0.1)


def split(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


if __name__ == "__main__":
    print("\n".join(table()))
