"""An engine that only schedules, with servesim's scheduler: the recorder itself is tested without vLLM.

It shares the real one's interface and nothing else; what it records says nothing about a server.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from record.engine import Operators, Output, StepRow
from record.plans import Job
from record.session import RunClock
from record.shapes import SHAPES
from servesim.config.step_trace import TraceSettings
from servesim.engine.state import Plan, RequestState
from servesim.engine.step_trace import Replay
from servesim.workload.request import Request, Segment

__all__ = ["StandIn"]

_STEP_S, _TOKEN_S = 0.01, 0.0001


class StandIn:
    """servesim's scheduler behind the interface of an engine; a step takes 10 ms and 0.1 ms a token.

    With async scheduling a step is scheduled while the one before runs, as on a GPU.
    """

    def __init__(self, job: Job) -> None:
        speculates = job.settings.get("speculative_config")
        defaults = {
            "async_scheduling": job.clock == "wall" and not speculates,
            "num_gpu_blocks": _blocks(job),
        }
        known = {name: value for name, value in job.settings.items() if name in TraceSettings.model_fields}
        spec = {"spec": _by_chance(speculates)} if speculates else {}
        self._settings = TraceSettings.model_validate({**defaults, **known, **spec})
        self._depth = 2 if self._settings.async_scheduling else 1
        self._eager = bool(job.settings.get("enforce_eager", job.clock == "cpu"))
        self._now_s = self._free_s = 0.0
        self._flying: deque[tuple[Plan, StepRow, float]] = deque()
        self.clock = RunClock(lambda: self._now_s, waits=False)
        self.steps: list[StepRow] = []
        self.calls = 0
        self.forget()

    def add(self, request: int, prompt: list[int], output_tokens: int) -> None:
        """Hand in a request."""
        segments = tuple(Segment(token, 1) for token in prompt)
        self._scheduler.add(
            Request(request, str(request), self.clock(), len(prompt), output_tokens, segments)
        )

    def busy(self) -> bool:
        """Whether something is left to do."""
        return bool(self._scheduler.running or self._scheduler.waiting or self._flying)

    def step(self) -> list[Output]:
        """One round of the engine."""
        if self._schedule() and len(self._flying) < self._depth:
            return []
        if not self._flying:
            return []
        plan, row, self._now_s = self._flying.popleft()
        row.output_s = row.end_s = self.clock()
        row.wall_s = row.cpu_s = row.output_s - row.start_s
        return self._process(plan, row)

    def _schedule(self) -> bool:
        """Plan a step and let it run; whether there was something to plan."""
        scheduler, row = self._scheduler, StepRow(self.calls, self.clock())
        self.calls += 1
        evictions = scheduler.kv.evictions
        plan = scheduler.plan()
        if plan is None:
            return False
        row.scheduled = [(_number(request), tokens, before) for request, tokens, before in plan.scheduled]
        row.preempted = [_number(request) for request in plan.preempted]
        row.drafts = {_number(request): drafts for request, drafts in plan.drafts.items()}
        row.running, row.waiting = plan.running, plan.waiting
        row.free_blocks, row.evicted = scheduler.kv.num_free_blocks, scheduler.kv.evictions - evictions
        tokens = sum(tokens for _, tokens, _ in plan.scheduled)
        self._free_s = max(self._free_s, self._now_s) + _STEP_S + _TOKEN_S * tokens
        self._flying.append((plan, row, self._free_s))
        self.steps.append(row)
        return True

    def _process(self, plan: Plan, row: StepRow) -> list[Output]:
        before = {request: request.num_output_tokens for request in plan.yielding}
        self._scheduler.commit(plan, row.output_s)
        row.finished = [_number(each) for each in plan.finishing]
        row.free_after = self._scheduler.kv.num_free_blocks
        outputs = [
            Output(_number(each), each.num_output_tokens - tokens, _number(each) in row.finished)
            for each, tokens in before.items()
            if each.num_output_tokens > tokens
        ]
        row.accepted = {one.request: one.tokens - 1 for one in outputs if one.request in row.drafts}
        return outputs

    def forget(self) -> None:
        """Empty the prefix cache: a new scheduler."""
        self._scheduler = Replay(self._settings, [], "0.32").scheduler

    def watch_operators(self) -> Operators | None:
        """There are none."""
        return None

    def facts(self) -> dict[str, Any]:
        """Settings, in vLLM's names."""
        return {
            **self._settings.model_dump(mode="json", exclude={"spec"}),
            "vllm": "0.32.0",
            "enforce_eager": self._eager,
            "torch": "",
        }

    def memory(self) -> dict[str, Any]:
        """The pool."""
        return {"num_gpu_blocks": self._settings.num_gpu_blocks}


def _blocks(job: Job) -> int:
    """The pool that was asked for."""
    settings, shape = job.settings, SHAPES[job.shape]
    if "num_gpu_blocks_override" in settings or "kv_cache_memory_bytes" not in settings:
        return int(settings.get("num_gpu_blocks_override", 2000))
    values = 2 * shape["num_layers"] * shape["num_kv_heads"] * shape["head_dim"]
    return int(settings["kv_cache_memory_bytes"] // (2 * values * settings["block_size"]))


def _by_chance(config: dict[str, Any]) -> dict[str, Any]:
    """Drafts are accepted by chance here."""
    return {"num_tokens": config["num_speculative_tokens"], "acceptance": 0.6}


def _number(request: RequestState) -> int:
    return int(request.request.request_id)
