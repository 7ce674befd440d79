"""Closed loops: N users who think for Z between the end of a request and the next."""

from __future__ import annotations

import numpy as np
import pytest
from queueing import assert_agree, fixed, geometric, rows, serve

REPLICATIONS = 12


@pytest.mark.parametrize(
    ("users", "slots", "think_s"),
    [(10, 4, 1.0), (30, 30, 2.0), (12, 3, 0.0)],
    ids=["queue", "free", "no thought"],
)
def test_the_interactive_law(users: int, slots: int, think_s: float) -> None:
    """X = N / (R + Z): throughput, users, mean latency and mean think time of a closed loop.

    R and X are taken from the requests that end in the middle of the run; X (R + Z) / N is compared with 1.
    """
    ratios = []
    for seed in range(REPLICATIONS):
        loop = {
            "process": "closed_loop", "concurrency": users,
            "think_time_s": think_s, "think_time_law": "exponential" if think_s else "fixed",
        }  # fmt: skip
        log = serve(
            seed, 3000, loop, fixed(30), geometric(25), base_s=0.01, per_token_s=1e-4, max_num_seqs=slots
        )
        of = rows(log)
        ends_s = np.sort(of["finish_s"])
        begin_s, end_s = ends_s[100], ends_s[-100]
        inside = (of["finish_s"] > begin_s) & (of["finish_s"] <= end_s)
        rate_per_s = inside.sum() / (end_s - begin_s)
        latency_s = (of["finish_s"] - of["arrival_s"])[inside].mean()
        ratios.append(rate_per_s * (latency_s + think_s) / users)
    assert_agree(ratios, 1.0)


def test_users_without_a_queue_never_wait() -> None:
    """With a slot for each user and no thought, a request follows the last one without a step in between."""
    loop = {"process": "closed_loop", "concurrency": 8}
    of = rows(serve(1, 2000, loop, fixed(7), geometric(20), base_s=0.0123, per_token_s=1e-4, max_num_seqs=8))
    np.testing.assert_array_equal(of["scheduled_s"], of["arrival_s"])
