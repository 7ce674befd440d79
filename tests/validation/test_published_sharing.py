"""Blocks saved by sharing: the PagedAttention paper (arXiv 2309.06180, Figure 15), and a closed form.

The six figures of Alpaca are expectations of their scenarios (test_published_scenarios.py).
"""

from __future__ import annotations

import numpy as np
import pytest

from servesim.api import simulate
from servesim.config.load import load_scenario
from servesim.workload.build import build_workload

BLOCK = 16


def saved_percent(scenario: str, *overrides: str) -> float:
    kv = simulate(scenario, overrides=list(overrides)).summary.kv
    assert kv.adds_up
    return 100 * kv.saved_by_sharing


@pytest.mark.parametrize(("width", "published"), [(2, 6.09), (6, 9.79)])
def test_parallel_sampling_as_vllm_v1_does_it(width: int, published: float) -> None:
    """Requests of their own, whose prompts meet in the prefix cache: the same blocks are shared."""
    scenario, v1 = f"pagedattention-alpaca-parallel-{width}", "workload.sampling.sharing=prefix-cache"
    assert saved_percent(scenario, v1) == pytest.approx(published, abs=1.5)


@pytest.mark.parametrize(("width", "published", "points"), [(2, 16.2, 1.5), (6, 30.5, 3)])
def test_parallel_sampling_of_sharegpt(width: int, published: float, points: float) -> None:
    """The two ends of the published range."""
    saved = saved_percent("pagedattention-sharegpt-parallel", f"workload.sampling.n={width}")
    assert saved == pytest.approx(published, abs=points)


def test_beam_search_of_sharegpt() -> None:
    """44.3 to 66.3 %. Our six beams save 6 points more: the law of branching forgets (docs/sharing.md)."""
    assert saved_percent("pagedattention-sharegpt-beam") == pytest.approx(44.3, abs=4)
    assert 4 < saved_percent("pagedattention-sharegpt-beam", "workload.sampling.n=6") - 66.3 < 8


@pytest.mark.parametrize("width", [2, 6])
def test_parallel_sampling_equals_its_closed_form(width: int) -> None:
    """While n sequences decode, only the prompt's full blocks are shared: saving = s (n - 1) / n.

    s is the share of a table's blocks that are full of prompt, over all decoding steps of all requests. One
    request runs at a time, so that every request weighs as long as its steps; equal steps.
    """
    loaded = load_scenario(f"pagedattention-alpaca-parallel-{width}")
    work = build_workload(loaded.scenario.workload, loaded.scenario.seed, lambda name: loaded.folder / name)
    lengths = np.array([(r.prompt_tokens, r.output_tokens) for r in list(work.arrivals())[:400]])
    full = table = 0
    for prompt, output in lengths:
        slots = np.arange(prompt + 1, prompt + output)
        full += (prompt // BLOCK) * len(slots)
        table += int((-(-slots // BLOCK)).sum())
        full += -(-prompt // BLOCK)  # the prompt's own step: its n tables are one
        table += -(-prompt // BLOCK)
    expected = 100 * full / table * (width - 1) / width
    measured = saved_percent(
        f"pagedattention-alpaca-parallel-{width}",
        "workload.num_requests=400",
        "workload.arrivals.rate_per_s=0.001",
        "engine.step_time={law: linear, base_s: 0.01}",
    )
    assert measured == pytest.approx(expected, rel=0.03)


def test_one_sequence_saves_nothing_and_more_beams_save_more() -> None:
    few = ("workload.num_requests=200",)
    assert saved_percent("pagedattention-alpaca-parallel-2", *few, "workload.sampling.n=1") == 0
    savings = [
        saved_percent("pagedattention-alpaca-beam-2", *few, f"workload.sampling.n={n}") for n in (1, 2, 3, 5)
    ]
    assert savings == sorted(savings)
    assert savings[0] == 0
    assert savings[-1] < 80, "five tables are never less than one"


def test_an_undecided_model_brings_beams_together_sooner() -> None:
    few = ("workload.num_requests=200",)
    savings = [
        saved_percent("pagedattention-alpaca-beam-4", *few, f"workload.sampling.concentration={c}")
        for c in (0.05, 0.4, 4)
    ]
    assert savings[0] + 3 < savings[1] < savings[2] - 3
