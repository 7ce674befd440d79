"""What the scheduler decided, step by step, in the form in which recordings of vLLM are written.

A record has: step; t, start, dur (seconds: when it was scheduled, when the GPU began, how long it took);
arrived; sched {id: [tokens, computed before]} in scheduling order; total_tokens; new and resumed {id: prefix
hit}; preempted, in order; draft {id: drafts to verify}; running and waiting after scheduling; free_blocks,
used_blocks (without the null block) and evicted (cached blocks reclaimed) after scheduling. Then, once its
output was processed: emitted {id: tokens}, accepted {id: drafts}, finished and free_after. On demand also
tables {id: block ids by group} and evicted_ids.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from servesim.config.scenario import EngineVersion
from servesim.config.step_trace import ListedRequest, SpeculationSettings, TraceSettings
from servesim.engine.scheduler import Scheduler, SchedulerLimits
from servesim.engine.speculation import Accept, Speculation, SpeculativeScheduler
from servesim.engine.state import Plan, RequestState
from servesim.engine.versions import RULES
from servesim.errors import ConfigError, Problem
from servesim.kv.grouped import GroupedKVCache
from servesim.workload.request import Request, Segment

__all__ = ["Replay", "Step", "StepRecorder", "trace_head", "trace_steps"]

Step = dict[str, Any]


class StepRecorder:
    """Describes the plans of a scheduler that looks at its requests one by one."""

    def __init__(self, scheduler: Scheduler, *, blocks: bool = False) -> None:
        self._scheduler = scheduler
        self._acceptance: _NotedAcceptance | None = None
        if isinstance(scheduler, SpeculativeScheduler):
            self._acceptance = scheduler.accept = _NotedAcceptance(scheduler.accept)
        self._blocks = blocks
        self._evictions = self._evicted_ids = 0
        self._num_blocks = scheduler.kv.num_free_blocks
        self._times: dict[str, _Times] = {}  # by request id
        self._arrived: list[str] = []

    def arrived(self, request: Request, now_s: float) -> None:
        """A request was added."""
        self._times[request.request_id] = _Times(now_s)
        self._arrived.append(request.request_id)

    def scheduled(self, plan: Plan) -> Step:
        """The record of a plan just made, without its times and its output."""
        kv = self._scheduler.kv
        admitted = dict.fromkeys(plan.admitted)
        hits = [(r, before) for r, _, before in plan.scheduled if r in admitted]
        step: Step = {
            "arrived": self._arrived,
            "sched": {_id(r): [tokens, before] for r, tokens, before in plan.scheduled},
            "total_tokens": sum(tokens for _, tokens, _ in plan.scheduled),
            "new": {_id(r): before for r, before in hits if not r.num_preemptions},
            "resumed": {_id(r): before for r, before in hits if r.num_preemptions},
            "preempted": [_id(r) for r in plan.preempted],
            "draft": {_id(r): drafts for r, drafts in plan.drafts.items()},
            "running": plan.running,
            "waiting": plan.waiting,
            "free_blocks": kv.num_free_blocks,
            "used_blocks": self._num_blocks - kv.num_free_blocks,
            "evicted": kv.evictions - self._evictions,
        }
        if self._blocks and isinstance(kv, GroupedKVCache):
            step["tables"] = {_id(r): kv.block_ids(r.sequence) for r, _, _ in plan.scheduled}
            step["evicted_ids"] = kv.pool.evicted_ids[self._evicted_ids :]
            self._evicted_ids = len(kv.pool.evicted_ids)
        self._arrived, self._evictions = [], kv.evictions
        return step

    def outputs(self, plan: Plan) -> dict[RequestState, int]:
        """Output tokens before a plan's output is processed."""
        return {request: request.num_output_tokens for request in plan.yielding}

    def processed(self, step: Step, plan: Plan, before: dict[RequestState, int], now_s: float) -> None:
        """Add a plan's output, processed just now; ``before`` is what outputs said."""
        counts = {_id(r): r.num_output_tokens - num_outputs for r, num_outputs in before.items()}
        step["emitted"] = emitted = {request_id: tokens for request_id, tokens in counts.items() if tokens}
        if self._acceptance is not None:
            step["accepted"] = self._acceptance.take()
        step["finished"] = [_id(r) for r in plan.finishing]
        step["free_after"] = self._scheduler.kv.num_free_blocks
        for request_id, tokens in emitted.items():
            times = self._times[request_id]
            first_s = times.first_s if times.tokens else now_s
            self._times[request_id] = times._replace(
                first_s=first_s, last_s=now_s, tokens=times.tokens + tokens
            )

    def summary(self) -> dict[str, Any]:
        """The last line of a trace; means are None where nothing was emitted."""
        served = [times for times in self._times.values() if times.tokens]
        ttft = [times.first_s - times.arrival_s for times in served]
        tpot = [(times.last_s - times.first_s) / (times.tokens - 1) for times in served if times.tokens > 1]
        return {
            "completed": len(served),
            "mean_ttft_s": sum(ttft) / len(ttft) if ttft else None,
            "mean_tpot_s": sum(tpot) / len(tpot) if tpot else None,
            "output_tokens": sum(times.tokens for times in served),
        }


class _Times(NamedTuple):
    arrival_s: float
    first_s: float = 0.0
    last_s: float = 0.0
    tokens: int = 0


class _NotedAcceptance:
    """A law of acceptance that notes what it has said."""

    def __init__(self, law: Accept) -> None:
        self._law = law
        self._noted: dict[str, int] = {}

    def __call__(self, request: RequestState, num_drafts: int, padded: bool) -> int:
        """Ask the law."""
        accepted = self._noted[_id(request)] = self._law(request, num_drafts, padded)
        return accepted

    def take(self) -> dict[str, int]:
        """Accepted drafts by request id, since this was last called."""
        noted, self._noted = self._noted, {}
        return noted


def trace_steps(scheduler: Scheduler, write: Callable[[Step], None]) -> StepRecorder:
    """Let an engine's scheduler, which must go one by one, write the record of every step that is done."""
    recorder = StepRecorder(scheduler)
    add, make_plan, process = scheduler.add, scheduler.plan, scheduler.commit
    steps: deque[Step] = deque()
    now_s = gpu_free_s = 0.0  # now: the engine's clock as it shows, the last arrival or end of a step

    def traced_add(request: Request) -> RequestState:
        nonlocal now_s
        now_s = max(now_s, request.arrival_s)
        recorder.arrived(request, request.arrival_s)
        return add(request)

    def traced_plan() -> Plan | None:
        number, plan = scheduler.step, make_plan()
        if plan is not None:
            steps.append({"step": number, "t": round(now_s, 9), **recorder.scheduled(plan)})
        return plan

    def traced_commit(plan: Plan, end_s: float, num_steps: int = 1) -> tuple[int, list[float]]:
        nonlocal now_s, gpu_free_s
        step, before = steps.popleft(), recorder.outputs(plan)
        result = process(plan, end_s, num_steps)
        start_s = max(step["t"], gpu_free_s)
        step |= {"start": round(start_s, 9), "dur": round(end_s - start_s, 9)}
        recorder.processed(step, plan, before, end_s)
        now_s = gpu_free_s = end_s
        write(step)
        return result

    hooks = {"add": traced_add, "plan": traced_plan, "commit": traced_commit}
    for name, hook in hooks.items():
        setattr(scheduler, name, hook)
    return recorder


class _Flight(NamedTuple):
    plan: Plan | None
    step: Step
    end_s: float


class Replay:
    """Settings and a list of requests, run as vLLM's engine core would run them.

    Raises ConfigError for what the scheduler cannot do, and when a request can never be admitted.
    """

    def __init__(
        self,
        settings: TraceSettings,
        requests: Sequence[ListedRequest],
        version: EngineVersion,
        *,
        blocks: bool = False,
    ) -> None:
        self._settings = settings
        self.scheduler = _scheduler(settings, version, blocks)
        self._recorder = StepRecorder(self.scheduler, blocks=blocks)
        self._by_step = any(request.arrival_step is not None for request in requests)
        self._todo = deque(sorted(_samples(requests), key=lambda request: request.arrival_s))
        self._ended = False  # vLLM schedules once more to tell its workers who has finished

    @property
    def summary(self) -> dict[str, Any]:
        """Means over the requests so far."""
        return self._recorder.summary()

    def steps(self) -> Iterator[Step]:
        """The steps that computed or preempted something; two are in flight with async scheduling."""
        settings, flights = self._settings, deque[_Flight]()
        depth = 2 if settings.async_scheduling else 1
        now_s = gpu_free_s = 0.0
        number = 0
        while True:
            self._admit(now_s, number)
            if self._has_requests():
                self._ended = False
                plan = self.scheduler.plan()
                step = {} if plan is None else self._recorder.scheduled(plan)
                start_s = max(now_s + settings.sched_overhead, gpu_free_s)
                duration_s = self._duration_s(plan)
                gpu_free_s = start_s + duration_s
                times = {"t": round(now_s, 9), "start": round(start_s, 9), "dur": round(duration_s, 9)}
                flights.append(_Flight(plan, {"step": number, **times, **step}, gpu_free_s))
                now_s += settings.sched_overhead
                number += 1
                if len(flights) < depth and (plan is not None or self._has_requests()):
                    continue
            elif not flights:
                if not self._todo:
                    return
                now_s, number = self._sleep(now_s, number + self._by_step)
                continue
            plan, step, end_s = flights.popleft()
            now_s = max(now_s, end_s)
            if plan is not None:
                self._commit(plan, step, now_s)
                yield step
            elif not flights and not self.scheduler.running and self.scheduler.waiting:
                now_s, number = self._sleep(now_s, number)

    def _admit(self, now_s: float, number: int) -> None:
        limit = number if self._by_step else now_s + 1e-12
        while self._todo and self._todo[0].arrival_s <= limit:
            request = self._todo.popleft()
            self.scheduler.add(request)
            self._recorder.arrived(request, now_s if self._by_step else request.arrival_s)

    def _has_requests(self) -> bool:
        return bool(self.scheduler.running or self.scheduler.waiting) or self._ended

    def _sleep(self, now_s: float, number: int) -> tuple[float, int]:
        """Time and step at which to look again, when nothing can be done before another request arrives."""
        if not self._todo:
            stuck = self.scheduler.waiting.head.request
            raise ConfigError(
                Problem(
                    "can never be admitted",
                    path=f"request {stuck.request_id}",
                    got=f"{stuck.prompt_tokens} tokens of prompt",
                    next_step="raise num_gpu_blocks (block 0 holds nothing), or lower the watermark",
                )
            )
        return (now_s if self._by_step else max(now_s, self._todo[0].arrival_s)), number

    def _duration_s(self, plan: Plan | None) -> float:
        if plan is None or not plan.scheduled:
            return 0.0
        law = self._settings.step_time
        tokens = sum(tokens for _, tokens, _ in plan.scheduled)
        context = sum(tokens + before for _, tokens, before in plan.scheduled)
        return law.a + law.b * tokens + law.c * context

    def _commit(self, plan: Plan, step: Step, now_s: float) -> None:
        before = self._recorder.outputs(plan)
        self.scheduler.commit(plan, now_s)
        self._recorder.processed(step, plan, before, now_s)
        self._ended |= bool(plan.finishing)


def _id(state: RequestState) -> str:
    return state.request.request_id


def _samples(requests: Sequence[ListedRequest]) -> Iterator[Request]:
    """Requests as the engine sees them: each parallel sample is one."""
    for listed in requests:
        prompt = tuple(Segment(name, length) for name, length in listed.parts)
        for sample in range(listed.n):
            request_id = str(listed.id) if listed.n == 1 else f"{sample}_{listed.id}"
            yield Request(
                0, request_id, listed.arrives, listed.num_prompt_tokens, listed.output_len,
                prompt, f"out:{request_id}", listed.priority,
            )  # fmt: skip


class _ByChance:
    """One random generator for all requests, asked in the order in which outputs are processed."""

    def __init__(self, settings: SpeculationSettings) -> None:
        rates = settings.acceptance
        self._rates = rates if isinstance(rates, list) else [rates] * settings.num_tokens
        self._random = random.Random(settings.seed)

    def __call__(self, request: RequestState, num_drafts: int, padded: bool) -> int:
        """Placeholders are judged like drafts: the recordings' model takes any token for one."""
        for depth in range(num_drafts):
            if self._random.random() >= self._rates[depth]:
                return depth
        return num_drafts


def _scheduler(settings: TraceSettings, version: EngineVersion, blocks: bool) -> Scheduler:
    rules, spec = RULES[version], settings.spec
    eagle = spec is not None and spec.mode == "eagle"
    steps_in_flight = 2 if settings.async_scheduling and rules.windows_wait_for_output else 1
    kv = GroupedKVCache(
        settings.num_gpu_blocks,
        settings.block_size,
        settings.windows,
        in_flight_tokens=settings.max_num_batched_tokens * steps_in_flight,
        max_model_len=settings.max_model_len,
        enable_prefix_caching=settings.enable_prefix_caching,
        blank_blocks_first=rules.blank_blocks_first,
        track_ids=blocks,
        hash_lookahead_tokens=int(eagle and rules.hashes_lookahead),
        drop_last_hit=eagle and not rules.hashes_lookahead,
    )
    limits = SchedulerLimits(
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_scheduled_tokens or settings.max_num_batched_tokens,
        max_model_len=settings.max_model_len,
        enable_chunked_prefill=settings.enable_chunked_prefill,
        long_prefill_token_threshold=settings.long_prefill_token_threshold,
        priority_policy=settings.policy == "priority",
        watermark_blocks=int(settings.watermark * settings.num_gpu_blocks * rules.has_watermark),
        scheduler_reserve_full_isl=settings.scheduler_reserve_full_isl,
    )
    if spec is None:
        return Scheduler(limits, rules, kv, one_by_one=True)
    drafts = spec.mode == "draft"
    speculation = Speculation(spec.num_tokens, eagle or drafts, eagle, draft_rows=int(drafts))
    accept, asynchronous = _ByChance(spec), settings.async_scheduling
    return SpeculativeScheduler(
        limits, rules, kv, speculation=speculation, accept=accept, asynchronous=asynchronous
    )


def trace_head(version: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The first line of a trace: which servesim, whose rules, what settings."""
    from importlib.metadata import version as installed

    return {"servesim": installed("servesim"), "vllm": version, "settings": settings}
