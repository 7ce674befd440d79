"""Little's law on requests and on KV tokens: what the steps show over time is what the requests went through.

On a whole run, from an empty engine to an empty one, the law is an identity and must hold to rounding; with
the rate and the lengths known it also predicts the averages, within three standard errors.
"""

from __future__ import annotations

import numpy as np
import pytest
from queueing import assert_agree, fixed, geometric, rows, serve, uniform

from servesim.analysis.timeline import Timeline, expand_steps, timeline
from servesim.engine.events import Log
from servesim.kv.contiguous import ContiguousKVCache
from servesim.kv.paged import PagedKVCache

OPEN = {"process": "poisson", "rate_per_s": 9.0}


def busy_log(seed: int, **settings: object) -> Log:
    """An engine at work on lengths that vary, with a queue and step times that grow with the context."""
    return serve(
        seed, 2000, OPEN, uniform(20, 400), geometric(40),
        base_s=0.004, per_token_s=2e-5, per_context_token_s=1e-6, max_num_seqs=6, **settings,
    )  # fmt: skip


def integral(line: Timeline, first: str, last: str) -> float:
    """Over time, of what the steps' rows give at their first and last step."""
    return float(line.integral(line.columns[first], line.columns[last]).sum())


@pytest.mark.parametrize("seed", range(3))
def test_running_and_waiting_requests(seed: int) -> None:
    """The time integral of the running is the sum of the times from admission to the last token.

    A request counts as waiting from the first step that begins after its arrival, to its admission.
    """
    log = busy_log(seed)
    line, of = timeline(log.steps, 0.0), rows(log)
    steps = expand_steps(line)
    starts_s = steps.end_s - steps.duration_s
    assert integral(line, "waiting", "waiting") > 1.0
    running_s = (of["finish_s"] - of["scheduled_s"]).sum()
    assert integral(line, "running", "running") == pytest.approx(running_s, rel=1e-9)
    noticed_s = starts_s[np.searchsorted(starts_s, of["arrival_s"] - 1e-9)]
    waiting_s = (of["scheduled_s"] - noticed_s).sum()
    assert integral(line, "waiting", "waiting") == pytest.approx(waiting_s, rel=1e-6)


@pytest.mark.parametrize("contiguous", [False, True], ids=["paged", "contiguous"])
def test_kv_tokens(contiguous: bool) -> None:
    """The time integral of the KV tokens is the sum of the areas under the requests' token curves.

    A request admitted with step a and ended by step b holds, during step a + j, its prompt and j tokens.
    Every request of 8192 slots at most has its place, in blocks of 16 or in a run of its own.
    """
    kv = (
        ContiguousKVCache(50_000, 8192)
        if contiguous
        else PagedKVCache(40_000, 16, enable_prefix_caching=False)
    )
    log = busy_log(1, kv=kv)
    line, of = timeline(log.steps, 0.0), rows(log)
    steps = expand_steps(line)
    starts_s = np.append(steps.end_s - steps.duration_s, np.inf)
    area = 0.0
    for admitted_s, prompt, output in zip(
        of["scheduled_s"], of["prompt_tokens"], of["output_tokens"], strict=True
    ):
        first = int(np.searchsorted(starts_s, admitted_s - 1e-9))
        ages = np.arange(int(output))
        area += float(steps.duration_s[first : first + int(output)] @ (prompt + ages))
    assert integral(line, "kv_tokens", "end_kv_tokens") == pytest.approx(area, rel=1e-9)
    assert integral(line, "kv_logical", "end_kv_logical") == pytest.approx(area, rel=1e-9)


def test_mean_kv_tokens_are_rate_times_area() -> None:
    """Mean KV tokens = lambda E[area], at constant step time d, with a slot for everybody.

    area = d (P + (P + 1) + ... + (P + O - 1)), so E[area] = d (E[P] E[O] + (E[O^2] - E[O]) / 2); for
    geometric O, E[O^2] = 2 E[O]^2 - E[O].
    """
    rate_per_s, step_s, prompt, output = 20.0, 0.01, 150, 30
    square = 2 * output**2 - output
    expected = rate_per_s * step_s * (prompt * output + (square - output) / 2)
    means, controls = [], []
    for seed in range(20):
        log = serve(
            seed, 2000, {"process": "poisson", "rate_per_s": rate_per_s}, fixed(prompt), geometric(output),
            base_s=step_s, max_num_seqs=10_000,
        )  # fmt: skip
        line, arrivals_s = timeline(log.steps, 0.0), rows(log)["arrival_s"]
        window_s = arrivals_s[[200, -1]]
        means.append(float(line.bin_means(window_s, *line.kv("tokens"))[0]))
        controls.append([1800 / (window_s[1] - window_s[0]) - rate_per_s])
    assert_agree(means, expected, controls)
