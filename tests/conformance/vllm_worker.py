"""Runs vLLM's own scheduler: workloads come in on stdin, one JSON line each, and their step traces go out.

This file runs inside an environment of its own that has vLLM but not servesim (see ``environment.py``), as a
process that lives through thousands of workloads. No GPU and no weights are involved: vLLM's Scheduler (or
AsyncScheduler) and KV-cache manager decide, and a worker that only counts tokens answers them.

In:  {"settings": {...}, "requests": [...]}, in the form that ``servesim trace`` reads.
Out: first {"vllm": version}; then per workload {"steps": [...]} or {"error": text}.
"""

from __future__ import annotations

import inspect
import json
import logging
import os
import random
import sys
import tempfile
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.update(VLLM_LOGGING_LEVEL="ERROR", VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1", PYTHONHASHSEED="0")
logging.disable(logging.WARNING)

import torch  # noqa: E402
import vllm  # noqa: E402
from vllm.config import (  # noqa: E402
    CacheConfig,
    DeviceConfig,
    ModelConfig,
    ParallelConfig,
    SchedulerConfig,
    SpeculativeConfig,
    VllmConfig,
)
from vllm.sampling_params import SamplingParams  # noqa: E402
from vllm.utils.hashing import sha256  # noqa: E402
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash  # noqa: E402
from vllm.v1.core.sched.async_scheduler import AsyncScheduler  # noqa: E402
from vllm.v1.core.sched.scheduler import Scheduler  # noqa: E402
from vllm.v1.kv_cache_interface import (  # noqa: E402
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    SlidingWindowSpec,
)
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput  # noqa: E402
from vllm.v1.request import Request  # noqa: E402
from vllm.v1.structured_output import StructuredOutputManager  # noqa: E402

MOST_STEPS = 3_000
DRAFT_TOKEN = 7

torch.set_num_threads(1)
init_none_hash(sha256)


def known(callable_: Callable[..., Any], **options: Any) -> dict[str, Any]:
    """The options that this version of vLLM has."""
    names = inspect.signature(callable_).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in names.values()):
        return options
    return {name: value for name, value in options.items() if name in names}


class Tokens:
    """Token ids by (name of a stream, place in it); two names never share an id."""

    def __init__(self) -> None:
        self._ids: dict[tuple[str, int], int] = {}

    def stream(self, name: str, count: int, start: int = 0) -> list[int]:
        return [self._ids.setdefault((name, j), 100 + len(self._ids)) for j in range(start, start + count)]

    def prompt(self, request: dict[str, Any]) -> list[int]:
        segments = request.get("segments")
        if segments is None:
            segments = [[f"u:{request['id']}", request.get("unique_len", 0)]]
            if request.get("prefix_id"):
                segments.insert(0, [request["prefix_id"], request.get("prefix_len", 0)])
        return [token for name, count in segments for token in self.stream(name, count)]


class Worker:
    """One scheduler with a workload before it."""

    def __init__(self, settings: dict[str, Any], base: VllmConfig, structured: Any) -> None:
        self.settings = settings
        self.spec = settings.get("spec") or {}
        self.tokens = Tokens()
        self.random = random.Random(self.spec.get("seed", 0))
        self.scheduler = self._scheduler(base, structured)
        self.pool = self.scheduler.kv_cache_manager.block_pool
        self.preempted: list[str] = []
        self.evicted = 0
        self._listen()

    # ---- set-up ------------------------------------------------------------------------------------

    def _scheduler(self, config: VllmConfig, structured: Any) -> Scheduler:
        get, block_size = self.settings.get, self.settings.get("block_size", 16)
        config.model_config.max_model_len = get("max_model_len", 4096)
        limits = config.scheduler_config
        limits.max_model_len = get("max_model_len", 4096)
        limits.max_num_seqs = get("max_num_seqs", 128)
        limits.max_num_batched_tokens = get("max_num_batched_tokens", 2048)
        limits.max_num_scheduled_tokens = get("max_num_scheduled_tokens")
        limits.enable_chunked_prefill = get("enable_chunked_prefill", True)
        limits.long_prefill_token_threshold = get("long_prefill_token_threshold", 0)
        limits.policy = get("policy", "fcfs")
        limits.watermark = get("watermark", 0.0)
        limits.scheduler_reserve_full_isl = get("scheduler_reserve_full_isl", True)
        limits.async_scheduling = get("async_scheduling", False)
        cache = config.cache_config
        cache.block_size = block_size
        cache.enable_prefix_caching = get("enable_prefix_caching", True)
        cache.num_gpu_blocks = self.settings["num_gpu_blocks"]
        config.speculative_config = self._speculative(config) if self.spec else None
        layout = KVCacheConfig(
            num_blocks=self.settings["num_gpu_blocks"], kv_cache_tensors=[], kv_cache_groups=self._groups()
        )
        lookahead = getattr(config, "num_hash_lookahead_tokens", 0)
        self.hasher = get_request_block_hasher(block_size, sha256, *([lookahead] if lookahead else []))
        kind = AsyncScheduler if limits.async_scheduling else Scheduler
        return kind(
            **known(
                Scheduler.__init__,
                vllm_config=config,
                kv_cache_config=layout,
                structured_output_manager=structured,
                block_size=block_size,
                hash_block_size=block_size,
                log_stats=True,
            )
        )

    def _speculative(self, config: VllmConfig) -> SpeculativeConfig:
        """An n-gram config that answers as the wanted method would: no draft model needs to be there."""
        made = SpeculativeConfig(
            model="ngram",
            num_speculative_tokens=self.spec["num_tokens"],
            prompt_lookup_min=2,
            prompt_lookup_max=3,
            target_model_config=config.model_config,
            target_parallel_config=config.parallel_config,
        )
        mode = self.spec.get("mode", "ngram")
        answers = {
            "use_eagle": mode == "eagle",
            "use_eagle_block_drop": mode == "eagle",
            "uses_draft_model": mode == "draft",
        }
        for name, answer in answers.items():
            if hasattr(made, name):
                object.__setattr__(made, name, lambda answer=answer: answer)
        return made

    def _groups(self) -> list[KVCacheGroupSpec]:
        size = self.settings.get("block_size", 16)
        shape = {"block_size": size, "num_kv_heads": 1, "head_size": 1, "dtype": torch.float32}
        groups = []
        for number, group in enumerate(self.settings.get("kv_groups") or [{"type": "full"}]):
            if group["type"] == "sliding":
                spec: Any = SlidingWindowSpec(sliding_window=group["window"], **shape)
            else:
                spec = FullAttentionSpec(**shape)
            groups.append(KVCacheGroupSpec([f"layer{number}"], spec))
        return groups

    def _listen(self) -> None:
        """Hear of preemptions in their order, and of every eviction."""
        preempt, evict = self.scheduler._preempt_request, self.pool._maybe_evict_cached_block

        def on_preempt(request: Request, *args: Any, **options: Any) -> Any:
            self.preempted.append(request.request_id)
            return preempt(request, *args, **options)

        def on_evict(block: Any) -> bool:
            was_cached = evict(block)
            self.evicted += bool(was_cached)
            return was_cached

        self.scheduler._preempt_request = on_preempt
        self.pool._maybe_evict_cached_block = on_evict

    # ---- one step ----------------------------------------------------------------------------------

    def add(self, entry: dict[str, Any], request_id: str, arrival: float) -> None:
        sampling = SamplingParams(max_tokens=entry["output_len"], ignore_eos=True, temperature=0.0)
        self.scheduler.add_request(
            Request(
                **known(
                    Request.__init__,
                    request_id=request_id,
                    prompt_token_ids=self.tokens.prompt(entry),
                    sampling_params=sampling,
                    pooling_params=None,
                    arrival_time=arrival,
                    priority=entry.get("priority", 0),
                    block_hasher=self.hasher,
                )
            )
        )

    def schedule(self) -> tuple[Any, dict[str, Any]]:
        scheduler = self.scheduler
        self.preempted, self.evicted = [], 0
        before = {i: request.status.name for i, request in scheduler.requests.items()}
        output = scheduler.schedule()
        computed = {i: scheduler.requests[i].num_computed_tokens for i in output.num_scheduled_tokens}
        starts = {i: computed[i] - tokens for i, tokens in output.num_scheduled_tokens.items()}
        free = self.pool.get_num_free_blocks()
        return output, {
            "sched": {i: [tokens, starts[i]] for i, tokens in output.num_scheduled_tokens.items()},
            "total_tokens": output.total_num_scheduled_tokens,
            "new": {i: starts[i] for i in starts if before[i] == "WAITING"},
            "resumed": {i: starts[i] for i in starts if before[i] == "PREEMPTED"},
            "preempted": self.preempted,
            "draft": {i: len(drafts) for i, drafts in output.scheduled_spec_decode_tokens.items()},
            "running": len(scheduler.running),
            "waiting": scheduler.get_request_counts()[1],
            "free_blocks": free,
            "used_blocks": self.pool.num_gpu_blocks - 1 - free,
            "evicted": self.evicted,
            "samples": [i for i in starts if not scheduler.requests[i].is_prefill_chunk],
        }

    def process(self, output: Any, step: dict[str, Any]) -> None:
        """Answer a step as a model would that accepts drafts by chance."""
        scheduler, samples = self.scheduler, set(step.pop("samples"))
        ids = list(output.num_scheduled_tokens)
        requests = {i: scheduler.requests[i] for i in ids if i in scheduler.requests}
        before = {i: request.num_output_tokens for i, request in requests.items()}
        accepted: dict[str, int] = {}
        sampled = []
        for i in ids:
            count = 0
            if i in samples and i in requests:
                count = 1
                if i in step["draft"]:
                    accepted[i] = self._accepted(step["draft"][i])
                    count += accepted[i]
            sampled.append(self.tokens.stream(f"out:{i}", count, before.get(i, 0)))
        answer = ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={i: index for index, i in enumerate(ids)},
            sampled_token_ids=sampled,
            logprobs=None,
            prompt_logprobs_dict={},
            pooler_output=[],
        )
        scheduler.update_from_output(output, answer)
        emitted = {i: request.num_output_tokens - before[i] for i, request in requests.items()}
        step["emitted"] = {i: count for i, count in emitted.items() if count}
        step["accepted"] = accepted
        step["finished"] = [i for i in requests if i not in scheduler.requests]
        step["free_after"] = self.pool.get_num_free_blocks()
        if self.spec and not self.settings.get("async_scheduling"):
            drafting = [i for i in ids if i in samples and i in scheduler.requests]
            drafts = [[DRAFT_TOKEN] * self.spec["num_tokens"] for _ in drafting]
            scheduler.update_draft_token_ids(DraftTokenIds(req_ids=drafting, draft_token_ids=drafts))

    def _accepted(self, drafts: int) -> int:
        rates = self.spec["acceptance"]
        for depth in range(drafts):
            if self.random.random() >= (rates[depth] if isinstance(rates, list) else rates):
                return depth
        return drafts

    # ---- the engine's loop -------------------------------------------------------------------------

    def steps(self, requests: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Steps that computed or preempted something; two are in flight with async scheduling."""
        by_step = any("arrival_step" in entry for entry in requests)
        samples = [(entry, i) for entry in requests for i in range(entry.get("n", 1))]
        todo = deque(sorted(samples, key=lambda sample: arrival_of(sample[0])))
        depth = 2 if self.settings.get("async_scheduling") else 1
        overhead = self.settings.get("sched_overhead", 0.0)
        flying: deque[tuple[Any, dict[str, Any], float]] = deque()
        now = gpu_free = 0.0
        number = made = 0
        while made < MOST_STEPS:
            while todo and arrival_of(todo[0][0]) <= (number if by_step else now + 1e-12):
                entry, i = todo.popleft()
                name = f"{i}_{entry['id']}" if entry.get("n", 1) > 1 else entry["id"]
                self.add(entry, name, float(arrival_of(entry)))
            if self.scheduler.has_requests():
                output, step = self.schedule()
                made += 1
                start = max(now + overhead, gpu_free)
                gpu_free = start + self._duration(step)
                now += overhead
                step |= {"step": number, "start": start}
                number += 1
                flying.append((output, step, gpu_free))
                if len(flying) < depth and (step["total_tokens"] or self.scheduler.has_requests()):
                    continue
            elif not flying:
                if not todo:
                    return
                number, now = number + by_step, now if by_step else max(now, arrival_of(todo[0][0]))
                continue
            output, step, end = flying.popleft()
            now = max(now, end)
            self.process(output, step)
            if step["total_tokens"] or step["preempted"]:
                yield step
            elif not flying and not self.scheduler.running and self.scheduler.has_unfinished_requests():
                if not todo:
                    yield {"stuck": True}
                    return
                if not by_step:
                    now = max(now, arrival_of(todo[0][0]))
        yield {"endless": True}

    def _duration(self, step: dict[str, Any]) -> float:
        if not step["total_tokens"]:
            return 0.0
        law = self.settings.get("step_time") or {"a": 0.01, "b": 1e-5, "c": 1e-8}
        context = sum(tokens + before for tokens, before in step["sched"].values())
        return law.get("a", 0) + law.get("b", 0) * step["total_tokens"] + law.get("c", 0) * context


def arrival_of(entry: dict[str, Any]) -> float:
    return entry.get("arrival_step", entry.get("arrival", 0.0))


def base_config(folder: Path) -> VllmConfig:
    """A configuration for a Llama of two layers, of which the scheduler reads next to nothing."""
    shape = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 1 << 20,
        "max_position_embeddings": 1 << 20,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "dtype": "float16",
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(shape))
    model = ModelConfig(
        model=str(folder), skip_tokenizer_init=True, dtype="float16", max_model_len=4096, enforce_eager=True
    )
    scheduler = SchedulerConfig(
        max_num_seqs=128, max_num_batched_tokens=8192, max_model_len=4096, is_encoder_decoder=False,
        async_scheduling=False,
    )  # fmt: skip
    return VllmConfig(
        model_config=model,
        scheduler_config=scheduler,
        cache_config=CacheConfig(block_size=16, cache_dtype="auto"),
        parallel_config=ParallelConfig(),
        device_config=DeviceConfig(device="cpu"),
    )


def main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever vLLM prints is no answer
    with tempfile.TemporaryDirectory() as folder:
        base = base_config(Path(folder))
        structured = StructuredOutputManager(base)
        print(json.dumps({"vllm": vllm.__version__}), file=answers, flush=True)
        for line in sys.stdin:
            workload = json.loads(line)
            try:
                worker = Worker(workload["settings"], base, structured)
                answer: dict[str, Any] = {"steps": list(worker.steps(workload["requests"]))}
            except Exception:
                answer = {"error": traceback.format_exc()}
            print(json.dumps(answer, separators=(",", ":")), file=answers, flush=True)


if __name__ == "__main__":
    main()
