"""A run written by hand, small enough to work out every figure on paper.

Pool of 1000 slots. Five requests: 0 (3 tokens) and 1 (one token) arrive at 0, 2 (two tokens) at 0.5 and
waits until 0.72, 3 at 1.5 is refused, 4 (one token) at 2.0. Nothing runs from 1.2 to 2.0.

    row   start  steps        running waiting  tokens      yields
    0     0.00   1 x 0.5      2       0        150         first tokens of 0 and 1; 1 ends
    1     0.50   0.10, 0.12   1       1        101, 102    tokens 2 and 3 of 0, which ends at 0.72
    2     0.72   1 x 0.28     1       0        10          first token of 2
    3     1.00   1 x 0.2      1       0        11          second token of 2, which ends at 1.2
    4     2.00   1 x 0.3      1       0        20          the only token of 4, which ends at 2.3
"""

from __future__ import annotations

from typing import Any

from servesim.analysis.run import Run
from servesim.config.profiles import load_gpu, load_model
from servesim.config.scenario import Scenario
from servesim.cost.budget import MemoryBudget
from servesim.cost.kv_groups import KvLayout
from servesim.engine.events import Log

GIB = 2**30
POOL = 1000
NAN = float("nan")
LLAMA_KV_BYTES = 131_072  # of one token of Llama-3.1-8B in bf16


def handmade_log() -> Log:
    """The log of the module's table."""
    log = Log()
    rows = [
        # start first growth | steps decodes prefills prefill_tokens context outputs itl running waiting
        ((0.00, 0.50, 0.00), (1, 0, 2, 150, 0, 2, 0, 2, 0), (150, 0, 10, 0, 0), (150, 0, 10, 0, 0)),
        ((0.50, 0.10, 0.02), (2, 1, 0, 0, 101, 1, 1, 1, 1), (101, 0, 11, 0, 48), (102, 0, 10, 0, 48)),
        ((0.72, 0.28, 0.00), (1, 0, 1, 10, 0, 1, 0, 1, 0), (10, 0, 6, 0, 144), (10, 0, 6, 0, 144)),
        ((1.00, 0.20, 0.00), (1, 1, 0, 0, 11, 1, 1, 1, 0), (11, 0, 5, 0, 144), (11, 0, 5, 0, 144)),
        ((2.00, 0.30, 0.00), (1, 0, 1, 20, 0, 1, 0, 1, 0), (20, 0, 12, 0, 128), (20, 0, 12, 0, 128)),
    ]
    for times, counts, first, last in rows:
        log.steps.append(*times, *counts, 0, 0, *_with_free(first), *_with_free(last))
    # arrival scheduled first_token finish | index prompt output generated cached preemptions status
    for row in [
        (0.0, 0.0, 0.5, 0.5, 1, 50, 1, 1, 0, 0, 0),
        (0.0, 0.0, 0.5, 0.72, 0, 100, 3, 3, 0, 0, 0),
        (0.5, 0.72, 1.0, 1.2, 2, 10, 2, 2, 0, 0, 0),
        (1.5, NAN, NAN, NAN, 3, 99_999, 5, 0, 0, 0, 2),
        (2.0, 2.0, 2.3, 2.3, 4, 20, 1, 1, 0, 0, 0),
    ]:
        log.requests.append(*row)
    log.end_s = 2.3
    log.counters = {"prefix_cache_queries": 180, "prefix_cache_hits": 45}
    return log


def handmade_run(log: Log | None = None, **changes: Any) -> Run:
    """The log with a scenario around it; ``changes`` replace parts of the scenario."""
    scenario = {
        "name": "by-hand",
        "model": "llama-3.1-8b",
        "hardware": {"gpu": "h100-sxm"},
        "engine": {"max_model_len": 16_384, "max_num_seqs": 256, "max_num_batched_tokens": 8192},
        "workload": {
            "arrivals": {"process": "poisson", "rate_per_s": 2.0},
            "prompt_tokens": {"law": "fixed", "tokens": 50},
            "output_tokens": {"law": "fixed", "tokens": 3},
            "num_requests": 5,
        },
        "slo": {"ttft_p99_s": 0.4, "tpot_p99_s": 0.15},
        "seed": 7,
    }
    return Run(
        Scenario.model_validate(scenario | changes),
        load_gpu("h100-sxm"),
        load_model("llama-3.1-8b"),
        handmade_memory(),
        log or handmade_log(),
    )


def handmade_memory() -> MemoryBudget:
    """A GPU of 80 GiB of which 73.6 are requested and 56 are the KV pool."""
    layout = KvLayout(
        block_size=16,
        page_bytes=65_536,
        layers_per_group=32,
        group_windows=(None,),
        token_bytes=LLAMA_KV_BYTES,
        in_flight_tokens=8192,
    )
    return MemoryBudget(
        total_bytes=80 * GIB,
        requested_bytes=int(73.6 * GIB),
        weights_bytes=15 * GIB,
        activation_peak_bytes=int(1.5 * GIB),
        non_torch_bytes=int(0.5 * GIB),
        cuda_graphs_bytes=int(0.6 * GIB),
        kv_cache_bytes=56 * GIB,
        num_gpu_blocks=28_672,
        block_bytes=32 * 65_536,
        kv_cache_tokens=458_752,
        max_concurrency=28.0,
        kv_layout=layout,
        contiguous_tokens=458_752,
    )


def _with_free(classes: tuple[int, ...]) -> tuple[int, ...]:
    """tokens, reserved, internal, holes, cached; what is left of the pool is free; logical is tokens."""
    return (*classes[:3], 0, *classes[3:], POOL - sum(classes), classes[0])
