"""Theory for the tests of this folder, the engine set up for it, and the yardstick: three standard errors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from servesim.config.scenario import LinearStepTime
from servesim.config.workload import WorkloadConfig
from servesim.cost.linear import LinearLaw
from servesim.engine.events import Log
from servesim.engine.loop import simulate
from servesim.engine.scheduler import Scheduler, SchedulerLimits
from servesim.engine.versions import RULES
from servesim.kv.base import KVCacheManager
from servesim.kv.paged import PagedKVCache
from servesim.workload.build import build_workload
from servesim.workload.request import Workload

__all__ = [
    "StepChain",
    "assert_agree",
    "controls_of",
    "erlang_c_wait_s",
    "fixed",
    "geometric",
    "requests_of",
    "rows",
    "serve",
    "uniform",
]

Floats = NDArray[np.float64]


# ---- the engine -----------------------------------------------------------------------------------


def fixed(tokens: int) -> dict[str, Any]:
    """Always the same length."""
    return {"law": "fixed", "tokens": tokens}


def geometric(mean_tokens: float) -> dict[str, Any]:
    """P(O = k) = (1 - p) ** (k - 1) * p with p = 1 / mean: E[O^2] = 2 mean^2 - mean."""
    return {"law": "geometric", "mean_tokens": mean_tokens}


def uniform(low: int, high: int) -> dict[str, Any]:
    """Every length from low to high alike."""
    mean = (low + high) // 2
    assert (low + high) % 2 == 0
    return {"law": "uniform", "mean_tokens": mean, "range_ratio": (high - mean) / mean}


def serve(
    seed: int,
    num_requests: int,
    arrivals: dict[str, Any],
    prompt_tokens: dict[str, Any],
    output_tokens: dict[str, Any],
    *,
    base_s: float,
    per_token_s: float = 0.0,
    per_context_token_s: float = 0.0,
    max_num_seqs: int,
    kv: KVCacheManager[Any] | None = None,
    one_by_one: bool = False,
) -> Log:
    """A synchronous engine (pipeline_depth 1) with a linear step time and, by default, memory without end.

    Served ``one_by_one`` its log has a row for every step.
    """
    workload = {
        "num_requests": num_requests,
        "arrivals": arrivals,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
    }
    law = LinearStepTime(
        law="linear", base_s=base_s, per_token_s=per_token_s, per_context_token_s=per_context_token_s
    )
    limits = SchedulerLimits(max_num_seqs=max_num_seqs, max_num_batched_tokens=1 << 40, max_model_len=1 << 40)
    pool = kv or PagedKVCache(1 << 40, 16, enable_prefix_caching=False)
    scheduler = Scheduler(limits, RULES["0.26"], pool, one_by_one=one_by_one)
    return simulate(requests_of(workload, seed), scheduler, LinearLaw(law), pipeline_depth=1)


def requests_of(workload: dict[str, Any], seed: int) -> Workload:
    """The requests of a scenario's workload section."""
    return build_workload(WorkloadConfig.model_validate(workload), seed, Path)


def rows(log: Log, warm_up: int = 0) -> dict[str, Floats]:
    """The requests' columns in order of arrival, without the first ones."""
    index = np.array(log.requests.columns["index"])
    order = np.argsort(index)[warm_up:]
    return {name: np.array(column, dtype=float)[order] for name, column in log.requests.columns.items()}


def assert_agree(
    values: Sequence[float] | Floats,
    theory: float,
    controls: Sequence[Sequence[float]] = (),
    *,
    relative_error: float = 0.01,
    noise: float = 3.0,
) -> None:
    """The mean of independent replications is within three standard errors of theory, and these are small.

    ``controls``: for each replication, sample means less their known expectations. What a replication owes
    to having drawn more or longer requests than usual is regressed out (control variates, Law & Kelton 11.4).
    """
    sample = np.asarray(values)
    design = np.column_stack([np.ones(len(sample)), *np.transpose(controls)])
    coefficients, residuals, *_ = np.linalg.lstsq(design, sample, rcond=None)
    variance = float(residuals[0]) / (len(sample) - design.shape[1])
    error = np.sqrt(variance * np.linalg.inv(design.T @ design)[0, 0])
    assert error < relative_error * abs(theory), f"standard error {error:.3g} is too large for {theory:.4g}"
    difference = coefficients[0] - theory
    assert abs(difference) < noise * error, (
        f"{coefficients[0]:.5g} against {theory:.5g} by theory: {difference / error:+.1f} standard errors"
    )


def controls_of(log: Log, rate_per_s: float, mean_output: float) -> tuple[float, float]:
    """A replication's mean gap between arrivals and mean output, less their expectations."""
    of = rows(log)
    return of["arrival_s"][-1] / len(log.requests) - 1 / rate_per_s, of["output_tokens"].mean() - mean_output


# ---- theory ---------------------------------------------------------------------------------------


def erlang_c_wait_s(rate_per_s: float, service_rate_per_s: float, servers: int) -> float:
    """Mean wait in M/M/N: C / (N mu - lambda), C being Erlang's probability of waiting."""
    offered = rate_per_s / service_rate_per_s
    term, total = 1.0, 0.0
    for k in range(servers):
        total += term
        term *= offered / (k + 1)
    waiting = term * servers / (servers - offered)
    return waiting / (total + waiting) / (servers * service_rate_per_s - rate_per_s)


class StepChain:
    """The engine as a Markov chain, exactly: Poisson arrivals, geometric outputs, batch limit N, step t(n).

    Watch the number x in the system at the start of each step. The step runs n = min(x, N) requests for
    t(n) seconds; each of them ends with it with probability p = 1 / E[O], and Poisson(lambda t(n)) requests
    arrive meanwhile, who can only be admitted when it is over (this is the entry delay, half a step on
    average for who meets a busy engine). If nobody is left, the engine idles for 1 / lambda on average and
    the next step begins with x = 1. Between two step starts the number in the system is x + lambda t(n) / 2
    on average, since all ends fall on the step's end. Queue lengths are cut at ``most``, far in the tail.
    """

    def __init__(
        self,
        rate_per_s: float,
        mean_output: float,
        limit: int,
        step_s: Callable[[int], float],
        most: int = 400,
    ) -> None:
        self.rate_per_s = rate_per_s
        self.states = np.arange(1, most + 1)
        running = np.minimum(self.states, limit)
        self.running = running
        self.step_s = np.array([step_s(int(n)) for n in running])
        to_zero = np.zeros(most)
        matrix = np.zeros((most, most))
        for i, (x, n, t) in enumerate(zip(self.states, running, self.step_s, strict=True)):
            ends = _binomial(int(n), 1 / mean_output)  # P(k of n end), k = 0..n
            left = np.zeros(most + 1)
            left[x - n : x + 1] = ends[::-1]
            after = np.convolve(left, _poisson(rate_per_s * t, most))[: most + 1]
            to_zero[i] = after[0]
            matrix[i] = after[1:]
            matrix[i, -1] += 1 - after.sum()  # the tail
            matrix[i, 0] += after[0]
        self.shares = _stationary(matrix)  # of steps that start with x
        self.mean_cycle_s = float(self.shares @ self.step_s + self.shares @ to_zero / rate_per_s)
        assert self.shares[-1] < 1e-9, "the chain is cut too early"

    @property
    def mean_in_system(self) -> float:
        """Time average of requests waiting or running."""
        inside = self.step_s * (self.states + self.rate_per_s * self.step_s / 2)
        return float(self.shares @ inside) / self.mean_cycle_s

    @property
    def mean_running(self) -> float:
        """Time average of requests running."""
        return float(self.shares @ (self.step_s * self.running)) / self.mean_cycle_s

    @property
    def mean_latency_s(self) -> float:
        """From arrival to last token, by Little's law."""
        return self.mean_in_system / self.rate_per_s


def _binomial(n: int, p: float) -> Floats:
    law = np.ones(1)
    for _ in range(n):
        law = np.convolve(law, (1 - p, p))
    return law


def _poisson(mean: float, most: int) -> Floats:
    ratios = np.concatenate(([1.0], mean / np.arange(1, most + 1)))
    law: Floats = np.exp(-mean) * np.cumprod(ratios)
    return law


def _stationary(matrix: Floats) -> Floats:
    size = len(matrix)
    equations = np.vstack([matrix.T - np.eye(size), np.ones(size)])
    wanted = np.zeros(size + 1)
    wanted[-1] = 1
    shares: Floats = np.linalg.lstsq(equations, wanted, rcond=None)[0]
    return shares
