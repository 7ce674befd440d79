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

from servesim.analysis.plan_trials import WARM_UP
from servesim.analysis.points import ready
from servesim.analysis.simulation import Prepared
from servesim.config.load import LoadedScenario
from servesim.config.scenario import SloConfig
from servesim.config.speculative import IidAcceptance, RecordedAcceptance
from servesim.cost.step_time import StepShape, StepTime, build_step_time
from servesim.engine.acceptance import expected_tokens_per_step
from servesim.workload.request import Request, Workload
from servesim.workload.traces import read_column

__all__ = ["Analytic", "Traffic", "traffic_of"]

Floats = NDArray[np.float64]


class Traffic(NamedTuple):
    """A workload in numbers."""

    num_requests: int
    rate_per_s: float
    """Requests per second as the scenario has it."""
    output_tokens: float
    arrivals_s: Floats
    """Of every request, in order."""
    prompts: Floats
    """Tokens of each."""
    new_prompts: Floats
    """The same without text that came before, as if a cache kept all."""
    outputs: Floats
    """Tokens to generate of each."""

    def decode_context_tokens(self, prompts: Floats, window: int | None) -> float:
        """KV tokens behind such prompts that a decode step attends to under a window, per request."""
        steps = np.maximum(self.outputs - 1, 0)
        most = math.inf if window is None else window
        below = np.clip(most - prompts, 0, steps)  # steps until the window is full
        contexts = below * prompts + below * (below + 1) / 2
        if window is not None:
            contexts += (steps - below) * window
        return float(contexts.sum() / max(1.0, steps.sum()))


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
        seen.add(request.output_name)
        new_tokens.append(max(1, new))
        prompts.append(request.prompt_tokens)
        outputs.append(request.output_tokens)
        arrivals_s.append(request.arrival_s)
    output = np.array(outputs, dtype=np.float64)
    order = np.argsort(arrivals_s, kind="stable")
    first_s = [request.arrival_s for request in workload.arrivals()]
    span_s = (first_s[-1] - first_s[0]) * len(prompts) / len(first_s)
    return Traffic(
        num_requests=len(prompts),
        rate_per_s=(len(prompts) - 1) / span_s if span_s > 0 else math.inf,
        output_tokens=float(output.mean()),
        arrivals_s=np.array(arrivals_s)[order],
        prompts=np.array(prompts, dtype=np.float64)[order],
        new_prompts=np.array(new_tokens, dtype=np.float64)[order],
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
    def prompts(self) -> Floats:
        """Tokens to compute of every prompt."""
        cached = self.prepared.engine.enable_prefix_caching
        return self.traffic.new_prompts if cached else self.traffic.prompts

    @cached_property
    def long_prompt_tokens(self) -> int:
        """The 99th percentile of those that a trial counts: caches are warm then."""
        arrival_s = self.traffic.arrivals_s
        begin_s = arrival_s[0] + WARM_UP * (arrival_s[-1] - arrival_s[0])
        return int(np.quantile(self.prompts[arrival_s >= begin_s], 0.99))

    @cached_property
    def tokens_per_step(self) -> float:
        """Of a request that decodes: one, and the drafts that are accepted on average."""
        speculative = self.prepared.engine.speculative
        if speculative is None:
            return 1.0
        law, drafts = speculative.acceptance, speculative.num_speculative_tokens
        if isinstance(law, RecordedAcceptance):
            steps = read_column(self.loaded.find("traces", law.file), law.column)
            return float(np.minimum(steps, 1 + drafts).mean())
        return expected_tokens_per_step((law.rate,) * drafts if isinstance(law, IidAcceptance) else law.rates)

    @cached_property
    def most_running(self) -> int:
        """Mean requests that run at once at most; blocks that several share are counted for none."""
        memory = self.prepared.memory
        layout = memory.kv_layout
        kept = (self._context(self.prompts, window) for window in layout.group_windows)
        each = sum(tokens / layout.block_size + 0.5 for tokens in kept)  # the last block is half full
        return max(1, min(self.prepared.engine.max_num_seqs or 1, int(memory.num_gpu_blocks / each)))

    def alone(self) -> str:
        """Why even an idle engine misses the SLO, or does not answer; empty when it keeps it."""
        longest = self.prepared.engine.max_model_len or 0
        too_long = int((self.traffic.prompts + self.traffic.outputs > longest).sum())
        if too_long:
            count = f"{too_long:,} of {self.traffic.num_requests:,} requests"
            return f"{count} are longer than engine.max_model_len={longest}: refused, or cut short"
        slo, token_s = self.slo, self.token_s(1)
        if slo.tpot_p99_s is not None and token_s > slo.tpot_p99_s:
            return f"a decode step alone takes {token_s * 1e3:.0f} ms a token"
        tokens = self.long_prompt_tokens
        prefill_s = self.prompt_s(tokens)
        if slo.ttft_p99_s is not None and prefill_s > slo.ttft_p99_s:
            return f"a prompt of {tokens:,} new tokens (P99) alone takes {prefill_s * 1e3:.0f} ms"
        return ""

    def most_rate_per_s(self) -> float:
        """Requests per second of one replica at which the mean step takes as long as the TPOT may.

        With one request at a time, if even that is beyond: a replica may be idle in between.
        """
        limit_s = (self.slo.tpot_p99_s or math.inf) * self.tokens_per_step
        low, high = 1, self.most_running
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._step_s(middle) <= limit_s else (low, middle - 1)
        return low / (self._decode_steps * self._step_s(low))

    def token_s(self, running: int) -> float:
        """Between two tokens of a request, when so many decode and no prompt is computed."""
        return self.law.step_s(self._shape(running, 0)) / self.tokens_per_step

    def prompt_s(self, tokens: int, running: int = 0) -> float:
        """What a prompt adds to the steps that compute it beside so many decoding requests."""
        budget, done, seconds = self._budget_tokens, 0, 0.0
        beside = self._shape(running, 0)
        alone_s = self.law.step_s(beside) if running else 0.0
        while done < tokens:
            new = min(budget, tokens - done)
            sampled = beside.num_sampled + int(done + new == tokens)
            shape = beside._replace(chunks=((new, done),), num_sampled=sampled)
            seconds += self.law.step_s(shape) - alone_s
            done += new
        return seconds

    @property
    def _decode_steps(self) -> float:
        return max(1.0, (self.traffic.output_tokens - 1) / self.tokens_per_step)

    def _step_s(self, running: int) -> float:
        """Mean step with so many requests running: it also computes the prompts that come in its time."""
        new = running / self._decode_steps * float(self.prompts.mean())
        return self.law.step_s(self._shape(running, round(min(new, self._budget_tokens))))

    @property
    def _budget_tokens(self) -> int:
        return self.prepared.engine.max_num_batched_tokens or 1 << 20

    @cached_property
    def _contexts(self) -> list[float]:
        return [self._context(self.traffic.prompts, window) for window in self.law.windows]

    def _context(self, prompts: Floats, window: int | None) -> float:
        eviction = self.prepared.engine.kv_eviction
        budget = None if eviction is None else eviction.budget_tokens
        ends = [end for end in (window, budget) if end is not None]
        return self.traffic.decode_context_tokens(prompts, min(ends, default=None))

    def _shape(self, running: int, chunk: int) -> StepShape:
        speculative = self.prepared.engine.speculative
        drafts = running * speculative.num_speculative_tokens if speculative else 0
        contexts = tuple(round(running * context) for context in self._contexts)
        chunks = ((chunk, 0),) if chunk else ()
        return StepShape(running, contexts, chunks, running + drafts, drafts)
