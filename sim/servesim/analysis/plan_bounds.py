"""What can be said of a configuration without simulating it: memory, an idle engine, mean values.

All of it is of one replica that gets an equal share of the traffic, and none of it knows the order in which
requests come. The bound is what the mean load allows; a P99 needs more replicas (plan_guess).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from servesim.analysis.points import ready
from servesim.analysis.simulation import Prepared
from servesim.config.load import LoadedScenario
from servesim.config.scenario import SloConfig
from servesim.cost.step_time import StepShape, StepTime, build_step_time
from servesim.workload.request import Request, Workload

__all__ = ["Analytic", "Traffic", "traffic_of"]

Floats = NDArray[np.float64]


class Traffic(NamedTuple):
    """A workload in numbers."""

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
    arrivals_s: Floats
    """Of every request, in order."""
    prompts: Floats
    """Tokens to compute of each."""
    outputs: Floats
    """Tokens to generate of each."""


def traffic_of(workload: Workload) -> Traffic:
    """The numbers of a workload whose requests wait for no service (open, with or without sessions)."""
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
    order = np.argsort(arrivals_s, kind="stable")
    first_s = [request.arrival_s for request in workload.arrivals()]
    span_s = (first_s[-1] - first_s[0]) * len(prompts) / len(first_s)
    return Traffic(
        num_requests=len(prompts),
        rate_per_s=(len(prompts) - 1) / span_s if span_s > 0 else math.inf,
        prompt_tokens=float(np.mean(new_tokens)),
        long_prompt_tokens=int(np.quantile(prompt, 0.99)),
        output_tokens=float(output.mean()),
        decode_context_tokens=float(contexts.sum() / max(1.0, steps.sum())),
        arrivals_s=np.array(arrivals_s)[order],
        prompts=np.array(new_tokens, dtype=np.float64)[order],
        outputs=output[order],
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
        slo, step_s = self.slo, self.decode_step_s(1)
        if slo.tpot_p99_s is not None and step_s > slo.tpot_p99_s:
            return f"a decode step alone takes {step_s * 1e3:.0f} ms"
        prefill_s = self.prompt_s(self.traffic.long_prompt_tokens)
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

    def decode_step_s(self, running: int) -> float:
        """Time of a step in which so many requests decode, and no prompt is computed."""
        return self.law.step_s(self._shape(running, 0))

    def prompt_s(self, tokens: int, running: int = 0) -> float:
        """What a prompt adds to the steps that compute it beside so many decoding requests."""
        budget, done, seconds = self.prepared.engine.max_num_batched_tokens or tokens, 0, 0.0
        beside, alone_s = self._shape(running, 0), self.decode_step_s(running) if running else 0.0
        while done < tokens:
            new = min(budget, tokens - done)
            sampled = running + int(done + new == tokens)
            shape = beside._replace(chunks=((new, done),), num_sampled=sampled)
            seconds += self.law.step_s(shape) - alone_s
            done += new
        return seconds

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
