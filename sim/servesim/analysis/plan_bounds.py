"""What can be said of a configuration without simulating it: memory, mean values, a birth-death chain.

All of it is of one replica that gets an equal share of the traffic, and none of it knows the order in which
requests come. The bound is what the mean load allows; a P99 needs more replicas. The chain is a first guess.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from servesim.analysis.points import ready
from servesim.analysis.simulation import Prepared
from servesim.config.load import LoadedScenario
from servesim.config.scenario import SloConfig
from servesim.cost.step_time import StepShape, StepTime, build_step_time
from servesim.workload.request import Request, Workload

__all__ = ["Analytic", "Traffic", "traffic_of"]


class Traffic(NamedTuple):
    """The means of a workload."""

    num_requests: int
    rate_per_s: float
    """Requests per second as the scenario has it."""
    prompt_tokens: float
    """To compute, per request: text that came before counts once, as if a cache kept all."""
    long_prompt_tokens: int
    """The 99th percentile, cached text included."""
    output_tokens: float
    decode_context_tokens: float
    """KV tokens that a decode step attends to, per request."""


def traffic_of(workload: Workload) -> Traffic:
    """The means of a workload whose requests wait for no service (open, with or without sessions)."""
    seen, new_tokens = set[object](), []
    prompts, outputs, arrivals_s = [], [], []
    for request in _everything(workload):
        new = request.prompt_tokens
        for name, num_tokens in request.prompt:
            if name is not None and name in seen:
                new -= num_tokens
            seen.add(name)
        new_tokens.append(max(1, new))
        prompts.append(request.prompt_tokens)
        outputs.append(request.output_tokens)
        arrivals_s.append(request.arrival_s)
    prompt, output = np.array(prompts, dtype=np.float64), np.array(outputs, dtype=np.float64)
    steps = np.maximum(output - 1, 0)
    contexts = steps * prompt + steps * (steps + 1) / 2
    first_s = [request.arrival_s for request in workload.arrivals()]
    span_s = (first_s[-1] - first_s[0]) * len(prompts) / len(first_s)
    return Traffic(
        num_requests=len(prompts),
        rate_per_s=(len(prompts) - 1) / span_s if span_s > 0 else math.inf,
        prompt_tokens=float(np.mean(new_tokens)),
        long_prompt_tokens=int(np.quantile(prompt, 0.99)),
        output_tokens=float(output.mean()),
        decode_context_tokens=float(contexts.sum() / max(1.0, steps.sum())),
    )


def _everything(workload: Workload) -> Iterator[Request]:
    for first in workload.arrivals():
        request: Request | None = first
        while request is not None:
            yield request
            request = workload.follow_up(request, request.arrival_s)


@dataclass(frozen=True)
class Analytic:
    """Laws of one replica under a share of the traffic."""

    loaded: LoadedScenario
    traffic: Traffic
    slo: SloConfig

    @cached_property
    def prepared(self) -> Prepared:
        """Everything but the workload; raises ServesimError when the model does not fit."""
        return ready(self.loaded)

    @cached_property
    def law(self) -> StepTime:
        """Of step time."""
        return build_step_time(
            self.prepared.model, self.prepared.gpu, self.prepared.engine, self.prepared.draft
        )

    @cached_property
    def most_running(self) -> tuple[int, str]:
        """Mean requests that run at once at most, and what limits them."""
        seqs = self.prepared.engine.max_num_seqs or 1
        each = self.traffic.decode_context_tokens + self.prepared.engine.block_size / 2
        fitting = int(self.prepared.memory.kv_cache_tokens / each)
        return (fitting, "KV blocks") if fitting < seqs else (seqs, "slots")

    def alone(self) -> str:
        """Why even an idle engine misses the SLO; empty when it does not."""
        slo, shape = self.slo, self._shape(1, 0)
        step_s = self.law.step_s(shape)
        if slo.tpot_p99_s is not None and step_s > slo.tpot_p99_s:
            return f"a decode step alone takes {step_s * 1e3:.0f} ms"
        prefill_s = self._prefill_s(self.traffic.long_prompt_tokens)
        if slo.ttft_p99_s is not None and prefill_s > slo.ttft_p99_s:
            tokens = f"{self.traffic.long_prompt_tokens:,} tokens (P99)"
            return f"a prompt of {tokens} alone takes {prefill_s * 1e3:.0f} ms"
        return ""

    def most_rate_per_s(self) -> float:
        """Requests per second of one replica at which the mean step takes as long as the TPOT may."""
        limit_s = self.slo.tpot_p99_s or math.inf
        low, high = 0, self.most_running[0]
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._step_s(middle)[0] <= limit_s else (low, middle - 1)
        return self._step_s(low)[1] if low else 0.0

    def likely_rate_per_s(self) -> float:
        """Where the 99th percentile of the running requests does so: a birth-death chain of their number.

        Births at the rate of the arrivals; with n running, deaths at n / (decode steps * time of a step).
        """
        limit_s, (most, _) = self.slo.tpot_p99_s or math.inf, self.most_running
        low, high = 0.0, self.most_rate_per_s()
        for _ in range(12):
            rate = (low + high) / 2
            running = self._high_number(rate)
            kept = running <= most and self._step_at(running, rate) <= limit_s
            low, high = (rate, high) if kept else (low, rate)
        return low

    def _high_number(self, rate_per_s: float) -> int:
        most = self.most_running[0]
        numbers = np.unique(np.geomspace(1, most + 1, 40).astype(np.int64))
        steps_s = [self._step_at(int(n), rate_per_s) for n in numbers]
        every = np.arange(1, most + 1)
        deaths = every / (self._decode_steps * np.interp(every, numbers, steps_s))
        logs = np.concatenate(([0.0], np.cumsum(math.log(rate_per_s) - np.log(deaths))))
        shares = np.cumsum(np.exp(logs - logs.max()))
        return int(np.searchsorted(shares, 0.99 * shares[-1]))

    @property
    def _decode_steps(self) -> float:
        return max(1.0, self.traffic.output_tokens - 1)

    def _step_s(self, running: int) -> tuple[float, float]:
        """Mean step with so many requests running, and the rate at which they run."""
        step_s, rate = self.law.step_s(self._shape(running, 0)), 0.0
        for _ in range(12):
            rate = running / (self._decode_steps * step_s)
            step_s = self._step_at(running, rate, step_s)
        return step_s, rate

    def _step_at(self, running: int, rate_per_s: float, step_s: float = 0.0) -> float:
        """A step that also computes the prompts that arrive in its own time, within the token budget."""
        budget = self.prepared.engine.max_num_batched_tokens or 1 << 20
        for _ in range(1 if step_s else 6):
            chunk = min(budget, round(rate_per_s * self.traffic.prompt_tokens * step_s))
            step_s = self.law.step_s(self._shape(running, chunk))
        return step_s

    def _shape(self, running: int, chunk: int) -> StepShape:
        context = self.traffic.decode_context_tokens
        contexts = tuple(
            round(running * (context if window is None else min(context, window)))
            for window in self.law.windows
        )
        chunks = ((chunk, 0),) if chunk else ()
        return StepShape(running, contexts, chunks, running)

    def _prefill_s(self, tokens: int) -> float:
        budget, done, seconds = self.prepared.engine.max_num_batched_tokens or tokens, 0, 0.0
        none = tuple(0 for _ in self.law.windows)
        while done < tokens:
            new = min(budget, tokens - done)
            seconds += self.law.step_s(StepShape(0, none, ((new, done),), int(done + new == tokens)))
            done += new
        return seconds
