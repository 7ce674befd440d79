"""Drives the scheduler as the recorded vLLM runs were driven, and writes the same step records.

The recordings in ``vllm_traces`` come from the real vLLM V1 scheduler and KV-cache manager, run without a GPU
against a step time of ``a + b * tokens + c * context`` seconds; requests arrive by step number or by time.
"""

from __future__ import annotations

import gzip
import json
import random
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from servesim.engine.scheduler import Scheduler, SchedulerLimits
from servesim.engine.speculation import Speculation, SpeculativeScheduler
from servesim.engine.state import Plan, RequestState
from servesim.engine.versions import RULES
from servesim.kv.grouped import GroupedKVCache
from servesim.workload.request import Request, Segment

TRACES = Path(__file__).parent / "vllm_traces"


def load_case(case: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Settings and requests of a recorded workload."""
    folder = TRACES / case
    settings = json.loads((folder / "settings.json").read_text())
    requests = [json.loads(line) for line in (folder / "requests.jsonl").read_text().splitlines() if line]
    return settings, requests


def recorded_steps(case: str, version: str) -> list[dict[str, Any]]:
    """The steps vLLM made, without the empty ones after the last finish."""
    with gzip.open(TRACES / case / f"trace-{version}.jsonl.gz", "rt") as lines:
        steps = [json.loads(line) for line in lines]
    return [s for s in steps if "sched" in s and (s["total_tokens"] or s["preempted"])]


def build_scheduler(settings: dict[str, Any], rules_version: str) -> Scheduler:
    """A scheduler with the recording's settings that tracks block ids."""
    rules = RULES[rules_version]  # type: ignore[index]
    groups = settings.get("kv_groups") or [{"type": "full"}]
    asynchronous = bool(settings.get("async_scheduling"))
    in_flight = settings.get("max_num_batched_tokens", 2048) * (2 if asynchronous else 1)
    spec = settings.get("spec")
    eagle = bool(spec) and spec.get("mode") == "eagle"
    kv = GroupedKVCache(
        settings["num_gpu_blocks"],
        settings.get("block_size", 16),
        [group.get("window") for group in groups],
        in_flight_tokens=in_flight,
        max_model_len=settings.get("max_model_len", 4096),
        enable_prefix_caching=settings.get("enable_prefix_caching", True),
        blank_blocks_first=rules.blank_blocks_first,
        track_ids=True,
        hash_lookahead_tokens=int(eagle and rules.hashes_lookahead),
        drop_last_hit=eagle and not rules.hashes_lookahead,
    )
    limits = SchedulerLimits(
        max_num_seqs=settings.get("max_num_seqs", 128),
        max_num_batched_tokens=settings.get("max_num_batched_tokens", 2048),
        max_model_len=settings.get("max_model_len", 4096),
        enable_chunked_prefill=settings.get("enable_chunked_prefill", True),
        long_prefill_token_threshold=settings.get("long_prefill_token_threshold", 0),
        priority_policy=settings.get("policy", "fcfs") == "priority",
        watermark_blocks=int(
            settings.get("watermark", 0.0) * settings["num_gpu_blocks"] * rules.has_watermark
        ),
        scheduler_reserve_full_isl=settings.get("scheduler_reserve_full_isl", True),
    )
    if not spec:
        return Scheduler(limits, rules, kv, one_by_one=True)
    draft = spec.get("mode") == "draft"
    speculation = Speculation(spec["num_tokens"], eagle or draft, eagle, draft_rows=int(draft))
    return SpeculativeScheduler(
        limits, rules, kv, speculation=speculation, accept=RecordedAcceptance(spec), asynchronous=asynchronous
    )


class RecordedAcceptance:
    """The recordings' acceptance of drafts: one generator for all requests, in the order of their outputs."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self._rates = spec["acceptance"]
        self._random = random.Random(spec.get("seed", 0))
        self.accepted: dict[str, int] = {}

    def __call__(self, request: RequestState, num_drafts: int, padded: bool) -> int:
        accepted = 0
        while accepted < num_drafts and self._random.random() < self._rate(accepted):
            accepted += 1
        self.accepted[_id(request)] = accepted
        return accepted

    def _rate(self, position: int) -> float:
        rates = self._rates
        return float(rates[position] if isinstance(rates, list) else rates)


def expand(requests: list[dict[str, Any]]) -> list[Request]:
    """Requests in order of arrival; parallel samples become requests of their own."""
    expanded = []
    for entry in requests:
        arrival = float(entry.get("arrival_step", entry.get("arrival", 0.0)))
        samples = entry.get("n", 1)
        for sample in range(samples):
            request_id = str(entry["id"]) if samples == 1 else f"{sample}_{entry['id']}"
            prompt = _prompt(entry)
            length = sum(segment.num_tokens for segment in prompt)
            expanded.append(
                Request(
                    0,
                    request_id,
                    arrival,
                    length,
                    entry["output_len"],
                    prompt,
                    f"out:{request_id}",
                    entry.get("priority", 0),
                )
            )
    return sorted(expanded, key=lambda request: request.arrival_s)


def _prompt(entry: dict[str, Any]) -> tuple[Segment, ...]:
    if "segments" in entry:
        return tuple(Segment(name, length) for name, length in entry["segments"])
    shared = (Segment(entry["prefix_id"], entry.get("prefix_len", 0)),) if entry.get("prefix_id") else ()
    return (*shared, Segment(f"u:{entry['id']}", entry.get("unique_len", 0)))


class Driver:
    """One run of a workload; ``steps()`` yields the records in the order in which vLLM's loop made them."""

    def __init__(self, settings: dict[str, Any], requests: list[dict[str, Any]], rules_version: str) -> None:
        self.settings = settings
        self.scheduler = build_scheduler(settings, rules_version)
        self.depth = 2 if settings.get("async_scheduling") else 1
        self.law = settings.get("step_time") or {"a": 0.01, "b": 1e-5, "c": 1e-8}
        self.by_step = any("arrival_step" in entry for entry in requests)
        self.todo = deque(expand(requests))
        self.unreported_end = False  # vLLM schedules once more to tell its workers about finished requests

    def steps(self) -> Iterator[dict[str, Any]]:
        """Records of all executed steps."""
        now, step, gpu_free = 0.0, 0, 0.0
        in_flight: deque[tuple[Plan | None, dict[str, Any], float]] = deque()
        while True:
            arrived = self._admit(now, step)
            if not self._has_requests() and not in_flight:
                if not self.todo:
                    return
                if self.by_step:
                    step += 1
                else:
                    now = max(now, self.todo[0].arrival_s)
                continue
            if self._has_requests():
                plan, record = self._schedule()
                record |= {"step": step, "t": round(now, 9), "dur": round(self._duration(plan), 9)}
                record["arrived"] = arrived
                now += self.settings.get("sched_overhead", 0.0)
                gpu_free = max(now, gpu_free) + self._duration(plan)
                step += 1
                in_flight.append((plan, record, gpu_free))
                if len(in_flight) < self.depth and (plan is not None or self._has_requests()):
                    continue
            plan, record, end = in_flight.popleft()
            now = max(now, end)
            if plan is not None:
                self._commit(plan, record, now)
                yield record

    def _has_requests(self) -> bool:
        return bool(self.scheduler.running or self.scheduler.waiting) or self.unreported_end

    def _admit(self, now: float, step: int) -> list[str]:
        limit = step if self.by_step else now + 1e-12
        arrived = []
        while self.todo and self.todo[0].arrival_s <= limit:
            request = self.todo.popleft()
            self.scheduler.add(request)
            arrived.append(request.request_id)
        return arrived

    def _duration(self, plan: Plan | None) -> float:
        if plan is None or not plan.scheduled:
            return 0.0
        tokens = sum(t for _, t, _ in plan.scheduled)
        context = sum(t + before for _, t, before in plan.scheduled)
        return self.law.get("a", 0) + self.law.get("b", 0) * tokens + self.law.get("c", 0) * context

    def _schedule(self) -> tuple[Plan | None, dict[str, Any]]:
        kv: GroupedKVCache = self.scheduler.kv  # type: ignore[assignment]
        evictions, num_evicted_ids = kv.evictions, len(kv.pool.evicted_ids)
        self.unreported_end = False
        plan = self.scheduler.plan()
        if plan is None:
            return None, {}
        resumed = [r for r in plan.admitted if r.num_preemptions]
        record = {
            "sched": {_id(r): [tokens, before] for r, tokens, before in plan.scheduled},
            "total_tokens": sum(tokens for _, tokens, _ in plan.scheduled),
            "new": {_id(r): b for r, _, b in plan.scheduled if r in plan.admitted and r not in resumed},
            "resumed": {_id(r): b for r, _, b in plan.scheduled if r in resumed},
            "preempted": [_id(r) for r in plan.preempted],
            "draft": {_id(r): drafts for r, drafts in plan.drafts.items()},
            "running": plan.running,
            "waiting": plan.waiting,
            "free_blocks": kv.num_free_blocks,
            "used_blocks": kv.pool.num_blocks - 1 - kv.num_free_blocks,
            "evicted": kv.evictions - evictions,
            "evicted_ids": kv.pool.evicted_ids[num_evicted_ids:],
            "tables": {_id(r): kv.block_ids(r.sequence) for r, _, _ in plan.scheduled},
        }
        return plan, record

    def _commit(self, plan: Plan, record: dict[str, Any], now: float) -> None:
        accept = getattr(self.scheduler, "_accept", None)
        if accept is not None:
            accept.accepted.clear()
        before = {r: r.num_output_tokens for r in plan.yielding}
        self.scheduler.commit(plan, now)
        emitted = {_id(r): r.num_output_tokens - n for r, n in before.items()}
        record["emitted"] = {request_id: tokens for request_id, tokens in emitted.items() if tokens}
        if accept is not None:
            record["accepted"] = dict(accept.accepted)
        record["finished"] = [_id(r) for r in plan.finishing]
        record["free_after"] = self.scheduler.kv.num_free_blocks
        self.unreported_end |= bool(plan.finishing)


def _id(state: RequestState) -> str:
    return state.request.request_id
