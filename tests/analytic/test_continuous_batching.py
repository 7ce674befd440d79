"""N slots that advance together: Erlang's M/M/N at constant step time, a birth-death chain at b0 + b1 n.

Both formulas are limits for short steps. The engine is compared with the exact chain of its steps
(queueing.StepChain), and the chain with the formulas, so that every deviation has its reason.
"""

from __future__ import annotations

import numpy as np
import pytest
from queueing import StepChain, assert_agree, controls_of, erlang_c_wait_s, fixed, geometric, rows, serve

from servesim.analysis.timeline import timeline
from servesim.engine.events import Log

REPLICATIONS = 20


def mean_running(log: Log, warm_up: int) -> float:
    """Time average while requests arrive, after the first ``warm_up``."""
    line, arrivals_s = timeline(log.steps, 0.0), rows(log)["arrival_s"]
    column = line.columns["running"]
    return float(line.bin_means(arrivals_s[[warm_up, -1]], column, column)[0])


@pytest.mark.parametrize(
    ("limit", "base_s", "per_slot_s", "load"),
    [(4, 0.01, 0.0, 0.7), (16, 0.01, 0.0, 0.8), (8, 0.006, 0.001, 0.7), (12, 0.0, 0.002, 0.5)],
)
def test_the_engine_is_the_chain_of_its_steps(
    limit: int, base_s: float, per_slot_s: float, load: float
) -> None:
    """Latency and batch size, within three standard errors of the exact chain.

    A prompt of one token makes the prefill step cost what any step costs: t(n) = base_s + per_slot_s n, the
    first output token included. ``load`` is the rate as a share of the capacity N / (t(N) E[O]).
    """
    mean_output = 10
    rate_per_s = load * limit / ((base_s + per_slot_s * limit) * mean_output)
    chain = StepChain(rate_per_s, mean_output, limit, lambda n: base_s + per_slot_s * n)
    latencies, batches, controls = [], [], []
    for seed in range(REPLICATIONS):
        log = serve(
            seed, 2500, {"process": "poisson", "rate_per_s": rate_per_s}, fixed(1), geometric(mean_output),
            base_s=base_s, per_token_s=per_slot_s, max_num_seqs=limit,
        )  # fmt: skip
        of = rows(log, warm_up=200)
        latencies.append((of["finish_s"] - of["arrival_s"]).mean())
        batches.append(mean_running(log, warm_up=200))
        controls.append(controls_of(log, rate_per_s, mean_output))
    assert_agree(latencies, chain.mean_latency_s, controls, relative_error=0.015)
    assert_agree(batches, chain.mean_running, controls)


def test_the_chain_of_steps_tends_to_erlangs_formula() -> None:
    """At constant step time d the chain is M/M/N with mu = 1 / (E[O] d), but for terms of the order of d.

    With E[O] d kept at 1 s, W = C / (N mu - lambda) + 1 / mu is approached as d falls, twice as close at
    half the step. What is missing is the wait for the next step, d / 2, less what geometric service times,
    multiples of d, save by their smaller variance.
    """
    limit, rate_per_s = 6, 4.8
    erlang_s = erlang_c_wait_s(rate_per_s, 1.0, limit) + 1.0
    errors = []
    for mean_output in (10, 20, 40, 80):
        chain = StepChain(rate_per_s, mean_output, limit, lambda n, step_s=1 / mean_output: step_s)
        errors.append(chain.mean_latency_s - erlang_s)
    assert abs(errors[-1]) < 0.01 * erlang_s
    halved = np.array(errors[:-1]) / np.array(errors[1:])
    np.testing.assert_allclose(halved, 2.0, rtol=0.05)


def birth_death_mean(
    rate_per_s: float, mean_output: float, limit: int, base_s: float, slot_s: float
) -> float:
    """Mean number in the system: births at rate lambda, deaths at m / (E[O] (b0 + b1 m)), m = min(n, N)."""
    weights, most = [1.0], 2000
    for n in range(1, most):
        m = min(n, limit)
        weights.append(weights[-1] * rate_per_s * mean_output * (base_s + slot_s * m) / m)
    shares = np.array(weights) / sum(weights)
    return float(shares @ np.arange(most))


def test_the_chain_of_steps_tends_to_the_birth_death_chain() -> None:
    """With E[O] t(n) kept, more and shorter steps bring the mean number to that of the birth-death chain."""
    limit, rate_per_s, base_s, slot_s = 8, 6.0, 0.4, 0.08  # for one output token; shared out below
    errors = []
    for mean_output in (10, 20, 40, 80):
        chain = StepChain(
            rate_per_s, mean_output, limit, lambda n, k=mean_output: (base_s + slot_s * n) / k, most=250
        )
        expected = birth_death_mean(rate_per_s, 1, limit, base_s, slot_s)
        errors.append(chain.mean_in_system / expected - 1)
    assert abs(errors[-1]) < 0.02
    halved = np.array(errors[:-1]) / np.array(errors[1:])
    np.testing.assert_allclose(halved, 2.0, rtol=0.1)


@pytest.mark.parametrize("limit", [4, 32])
def test_the_capacity_of_a_full_batch(limit: int) -> None:
    """Saturated, N slots end N / ((b0 + b1 N) E[O]) requests per second.

    Counted from the first request's end to the moment when the last one is admitted, while the batch is
    full in every step.
    """
    base_s, slot_s, mean_output = 0.02, 0.001, 25
    capacity_per_s = limit / ((base_s + slot_s * limit) * mean_output)
    rates = []
    for seed in range(REPLICATIONS):
        log = serve(
            seed, 2500, {"process": "burst"}, fixed(1), geometric(mean_output),
            base_s=base_s, per_token_s=slot_s, max_num_seqs=limit,
        )  # fmt: skip
        of = rows(log)
        last_s = of["scheduled_s"].max()
        rates.append((of["finish_s"] <= last_s).sum() / last_s)
    assert_agree(rates, capacity_per_s)
