"""What the KV pool holds, by class, against closed forms: blocks' empty ends, reservations, leftovers."""

from __future__ import annotations

import numpy as np
import pytest
from queueing import assert_agree, fixed, geometric, rows, serve, uniform

from servesim.analysis.timeline import timeline
from servesim.kv.contiguous import ContiguousKVCache
from servesim.kv.paged import PagedKVCache

BURST = {"process": "burst"}
REPLICATIONS = 12


@pytest.mark.parametrize("block_size", [5, 15, 31])
def test_the_end_of_the_last_block_wastes_half_a_block(block_size: int) -> None:
    """A sequence that ends after P + O - 1 slots leaves -(P + O - 1) mod B empty: (B - 1) / 2 on average.

    P is uniform over 9 B lengths, so the remainder is uniform whatever O (B is odd because a uniform law has
    an odd number of values). One request runs at a time: the row of its last step shows its waste alone.
    """
    means = []
    for seed in range(REPLICATIONS):
        kv = PagedKVCache(10_000, block_size, enable_prefix_caching=False)
        log = serve(
            seed, 1500, BURST, uniform(33, 32 + 9 * block_size), geometric(20),
            base_s=0.01, max_num_seqs=1, kv=kv,
        )  # fmt: skip
        of, columns = rows(log), log.steps.columns
        ends_s = np.array(columns["start_s"]) + np.array(columns["steps"]) * 0.01
        last_rows = np.searchsorted(ends_s, of["finish_s"] - 1e-6)
        waste = np.array(columns["end_kv_internal"])[last_rows]
        np.testing.assert_array_equal(waste, -(of["prompt_tokens"] + of["output_tokens"] - 1) % block_size)
        means.append(waste.mean())
    assert_agree(means, (block_size - 1) / 2, relative_error=0.02)


def test_empty_slots_over_the_life_of_paged_sequences() -> None:
    """At every age a sequence's last block has (B - 1) / 2 empty slots on average, filled later or never.

    Those never filled are held from the first slot of the last block on. With w of them, uniform on 0 to
    B - 1, that is for B - w steps (O is at least B): the mean number is N E[w (B - w)] / E[O], and
    E[w (B - w)] = (B^2 - 1) / 6, in a batch that is always full with N requests. A row of many steps tells
    its two ends only, and waste comes in between, so every step has its own row here.
    """
    block_size, limit, outputs = 15, 20, 40
    empties, wastes = [], []
    for seed in range(REPLICATIONS):
        kv = PagedKVCache(10_000, block_size, enable_prefix_caching=False)
        log = serve(
            seed, 1500, BURST, uniform(33, 32 + 9 * block_size), uniform(outputs - 20, outputs + 20),
            base_s=0.01, max_num_seqs=limit, kv=kv, one_by_one=True,
        )  # fmt: skip
        line = timeline(log.steps, 0.0)
        window_s = np.array([5.0, rows(log)["scheduled_s"].max()])
        reserved, internal = (
            float(line.bin_means(window_s, *line.kv(name))[0]) for name in ("reserved", "internal")
        )
        empties.append(reserved + internal)
        wastes.append(internal)
    assert_agree(empties, limit * (block_size - 1) / 2)
    assert_agree(wastes, limit * (block_size**2 - 1) / 6 / outputs, relative_error=0.02)


def test_shares_of_contiguous_reservations() -> None:
    """Saturated, a pool of N reservations of L slots and r slots more; tokens, reserved, internal, holes.

    Slots are renewal processes of equal steps. Tokens per running request: E[P] + (E[O^2] - E[O]) / (2 E[O]).
    Its final length is seen biased by its duration: E[P] + E[O^2] / E[O] - 1, and L less that is never
    filled. The r slots are too few for a reservation.
    """
    most, slots, rest = 600, 12, 250
    prompt, output = 100, 30
    square = 2 * output**2 - output
    tokens = prompt + (square - output) / (2 * output)
    internal = most - (prompt + square / output - 1)
    expected = {
        "tokens": slots * tokens,
        "internal": slots * internal,
        "reserved": slots * (most - internal - tokens),
    }
    shares: dict[str, list[float]] = {name: [] for name in expected}
    for seed in range(REPLICATIONS):
        log = serve(
            seed, 3000, BURST, fixed(prompt), geometric(output),
            base_s=0.01, max_num_seqs=100, kv=ContiguousKVCache(slots * most + rest, most),
        )  # fmt: skip
        line = timeline(log.steps, 0.0)
        window_s = np.array([20.0, rows(log)["scheduled_s"].max()])
        for name, values in shares.items():
            values.append(float(line.bin_means(window_s, *line.kv(name))[0]))
        queued = line.columns["waiting"] > 0
        np.testing.assert_array_equal(line.columns["kv_holes"][queued], rest)
    for name, mean in expected.items():
        assert_agree(shares[name], mean, relative_error=0.02)
