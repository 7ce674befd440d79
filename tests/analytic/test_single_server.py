"""A batch limit of one makes the engine a single server: M/D/1 and M/G/1, exactly.

A step that begins on arrival at an idle engine, or at the end of the step before, leaves no other delay in a
synchronous engine; so the formulas hold without correction, and every single wait is the one of Lindley's
recursion. 20 replications each, their first tenth cut.
"""

from __future__ import annotations

import numpy as np
import pytest
from queueing import assert_agree, controls_of, fixed, geometric, rows, serve, uniform

from servesim.engine.events import Log

REPLICATIONS = 20


def lindley_waits_s(log: Log) -> np.ndarray:
    """W(i + 1) = max(0, W(i) + S(i) - A(i)), with the log's arrivals and service times."""
    of = rows(log)
    services, gaps = of["finish_s"] - of["scheduled_s"], np.diff(of["arrival_s"])
    waits = [0.0]
    for service, gap in zip(services[:-1], gaps, strict=True):
        waits.append(max(0.0, waits[-1] + service - gap))
    return np.array(waits)


@pytest.mark.parametrize("load", [0.3, 0.6])
def test_prefill_only_is_an_m_d_1_queue(load: float) -> None:
    """W = D + rho D / (2 (1 - rho)): Poisson arrivals, every request one step of D = 10 ms + 100 tokens."""
    service_s = 0.01 + 100 * 1e-4
    expected_s = service_s * (1 + load / (2 * (1 - load)))
    latencies, controls = [], []
    for seed in range(REPLICATIONS):
        log = serve(
            seed, 4000, {"process": "poisson", "rate_per_s": load / service_s}, fixed(100), fixed(1),
            base_s=0.01, per_token_s=1e-4, max_num_seqs=1,
        )  # fmt: skip
        of = rows(log, warm_up=400)
        np.testing.assert_allclose(of["finish_s"] - of["scheduled_s"], service_s, rtol=1e-9)
        np.testing.assert_allclose(of["scheduled_s"] - of["arrival_s"], lindley_waits_s(log)[400:], atol=1e-9)
        latencies.append((of["finish_s"] - of["arrival_s"]).mean())
        controls.append(controls_of(log, load / service_s, 1)[:1])
    assert_agree(latencies, expected_s, controls)


@pytest.mark.parametrize(
    ("law", "lengths", "shares"),
    [
        (geometric(8), np.arange(1, 500), 1 / 8 * (7 / 8) ** np.arange(499)),
        (uniform(1, 39), np.arange(1, 40), np.full(39, 1 / 39)),
    ],
    ids=["geometric", "uniform"],
)
def test_random_outputs_are_an_m_g_1_queue(
    law: dict[str, object], lengths: np.ndarray, shares: np.ndarray
) -> None:
    """Pollaczek-Khinchine: Wq = lambda E[S^2] / (2 (1 - rho)).

    S of a request with prompt 50 and O outputs: O steps of base_s, per_token_s for 50 + O - 1 tokens and
    per_context_token_s for contexts 50, 51, ..., 50 + O - 1 (the prefill step sees its own 50 tokens).
    """
    base_s, per_token_s, per_context_s, prompt = 0.002, 1e-5, 2e-6, 50
    contexts = lengths * prompt + lengths * (lengths - 1) / 2
    service_s = lengths * base_s + (prompt + lengths - 1) * per_token_s + contexts * per_context_s
    mean_s, square_s = shares @ service_s, shares @ service_s**2
    load = 0.5
    expected_s = load / mean_s * square_s / (2 * (1 - load))
    waits, controls = [], []
    for seed in range(REPLICATIONS):
        log = serve(
            seed, 3000, {"process": "poisson", "rate_per_s": load / mean_s}, fixed(prompt), law,
            base_s=base_s, per_token_s=per_token_s, per_context_token_s=per_context_s, max_num_seqs=1,
        )  # fmt: skip
        of = rows(log, warm_up=300)
        expected_service_s = np.interp(of["output_tokens"], lengths, service_s)
        np.testing.assert_allclose(of["finish_s"] - of["scheduled_s"], expected_service_s, rtol=1e-9)
        np.testing.assert_allclose(of["scheduled_s"] - of["arrival_s"], lindley_waits_s(log)[300:], atol=1e-9)
        waits.append((of["scheduled_s"] - of["arrival_s"]).mean())
        controls.append(controls_of(log, load / mean_s, shares @ lengths))
    assert_agree(waits, expected_s, controls, relative_error=0.015)
