"""An engine that only schedules, with servesim's scheduler: the recorder itself is tested without vLLM.

It shares the real one's interface and nothing else; what it records says nothing about a server.
"""

from __future__ import annotations

from typing import Any

from record.engine import Operators, Output, StepRow
from record.plans import Job
from record.session import RunClock
from servesim.config.step_trace import TraceSettings
from servesim.engine.state import Plan, RequestState
from servesim.engine.step_trace import Replay
from servesim.workload.request import Request, Segment

__all__ = ["StandIn"]

_STEP_S, _TOKEN_S = 0.01, 0.0001


class StandIn:
    """servesim's scheduler behind the interface of an engine; a step takes 10 ms and 0.1 ms a token."""

    def __init__(self, job: Job) -> None:
        known = {name: value for name, value in job.settings.items() if name in TraceSettings.model_fields}
        blocks = job.settings.get("num_gpu_blocks_override", 2000)
        known["spec"] = _speculation(job.settings.get("speculative_config"))
        self._settings = TraceSettings.model_validate({**known, "num_gpu_blocks": blocks})
        self._now_s = 0.0
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
        return bool(self._scheduler.running or self._scheduler.waiting)

    def step(self) -> list[Output]:
        """One round of the engine."""
        scheduler, row = self._scheduler, StepRow(self.calls, self.clock())
        self.calls += 1
        evictions = scheduler.kv.evictions
        plan = scheduler.plan()
        if plan is None:
            return []
        row.scheduled = [(_number(request), tokens, before) for request, tokens, before in plan.scheduled]
        row.preempted = [_number(request) for request in plan.preempted]
        row.drafts = {_number(request): drafts for request, drafts in plan.drafts.items()}
        row.running, row.waiting = plan.running, plan.waiting
        row.free_blocks, row.evicted = scheduler.kv.num_free_blocks, scheduler.kv.evictions - evictions
        self._now_s += _STEP_S + _TOKEN_S * sum(tokens for _, tokens, _ in plan.scheduled)
        row.output_s = row.end_s = self.clock()
        row.wall_s = row.cpu_s = row.output_s - row.start_s
        outputs = self._process(plan, row.output_s)
        row.accepted = {one.request: one.tokens - 1 for one in outputs if one.request in row.drafts}
        row.finished, row.free_after = (
            [_number(each) for each in plan.finishing],
            scheduler.kv.num_free_blocks,
        )
        self.steps.append(row)
        return outputs

    def _process(self, plan: Plan, now_s: float) -> list[Output]:
        before = {request: request.num_output_tokens for request in plan.yielding}
        self._scheduler.commit(plan, now_s)
        ended = set(map(_number, plan.finishing))
        return [
            Output(_number(request), request.num_output_tokens - tokens, _number(request) in ended)
            for request, tokens in before.items()
        ]

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
            "enforce_eager": True,
            "torch": "",
        }

    def memory(self) -> dict[str, Any]:
        """The pool."""
        return {"num_gpu_blocks": self._settings.num_gpu_blocks}


def _speculation(config: dict[str, Any] | None) -> dict[str, Any] | None:
    """Drafts are accepted by chance here."""
    return config and {"num_tokens": config["num_speculative_tokens"], "acceptance": 0.6}


def _number(request: RequestState) -> int:
    return int(request.request.request_id)
