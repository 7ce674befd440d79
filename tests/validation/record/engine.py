"""What the recorder asks of an engine, and the one that is a real vLLM in this process."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

__all__ = ["Clock", "Engine", "Operators", "Output", "StepRow", "VllmEngine"]

Clock = Callable[[], float]


class Output(NamedTuple):
    """Tokens that a step gave a request."""

    request: int
    tokens: int
    finished: bool


class StepRow:
    """One call of the scheduler, and what became of it; times in seconds of the recorder's clock."""

    __slots__ = (
        "accepted", "call", "cpu_s", "drafts", "end_s", "evicted", "finished", "free_after", "free_blocks",
        "output_s", "preempted", "running", "schedule_s", "scheduled", "start_s", "waiting", "wall_s",
    )  # fmt: skip

    def __init__(self, call: int, start_s: float) -> None:
        self.call, self.start_s = call, start_s
        self.schedule_s = self.output_s = self.end_s = self.wall_s = self.cpu_s = 0.0
        self.scheduled: list[tuple[int, int, int]] = []
        """Request, tokens, computed tokens before, in scheduling order."""
        self.preempted: list[int] = []
        self.finished: list[int] = []
        self.drafts: dict[int, int] = {}
        self.accepted: dict[int, int] = {}
        self.running = self.waiting = self.free_blocks = self.evicted = self.free_after = 0


class Operators(Protocol):
    """Operators that are being timed."""

    batch: tuple[int, int, bool]
    """Sequences, tokens in the cache of each, and whether they decode: what the next step will be."""
    on: bool
    """Whether the next step is looked at."""
    is_new: bool
    """Whether the next step is the first one with so many tokens."""

    def __enter__(self) -> Operators:
        """Begin."""
        ...

    def __exit__(self, *exception: object) -> None:
        """End."""
        ...

    def stepped(self, seconds: float) -> None:
        """A step of decodes took so long."""
        ...

    def correct(self, watched_s: float, plain_s: float) -> None:
        """The same step took so long while it was looked at, and while it was not."""
        ...

    def rows(self) -> Iterable[Sequence[object]]:
        """Rows of kernels.csv."""
        ...


class Engine(Protocol):
    """An engine that is driven step by step."""

    steps: list[StepRow]
    """Calls of the scheduler since the list was last emptied; only those that computed or preempted."""
    calls: int
    """Calls of the scheduler in all, empty ones included."""

    def add(self, request: int, prompt: list[int], output_tokens: int) -> None:
        """Hand in a request."""
        ...

    def busy(self) -> bool:
        """Whether something is left to do."""
        ...

    def step(self) -> list[Output]:
        """One round of the engine."""
        ...

    def forget(self) -> None:
        """Empty the prefix cache."""
        ...

    def watch_operators(self) -> Operators | None:
        """A context in which single operators are timed; None where that cannot be done."""
        ...

    def facts(self) -> dict[str, Any]:
        """Versions and resolved settings."""
        ...

    def memory(self) -> dict[str, Any]:
        """What the engine says about its memory, in the names of memory.json."""
        ...


ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
"""Set before vLLM is imported: no network, and the engine core in this process, where it can be watched."""

_GIB = 2**30


class VllmEngine:
    """A real vLLM (V1) whose scheduler is listened to."""

    def __init__(self, model: Path, settings: dict[str, Any], clock: Clock) -> None:
        os.environ.update({name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()})
        from vllm import SamplingParams
        from vllm.engine.arg_utils import EngineArgs
        from vllm.sampling_params import RequestOutputKind
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.llm_engine import LLMEngine

        arguments = EngineArgs(
            model=str(model), load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16", seed=0,
            disable_log_stats=False, **settings,
        )  # fmt: skip
        # The server's defaults, not those of the offline class.
        self._engine = LLMEngine.from_engine_args(arguments, usage_context=UsageContext.OPENAI_API_SERVER)
        self._core = self._engine.engine_core.engine_core
        self._config = self._engine.vllm_config
        self._clock = clock
        self._parameters = lambda tokens: SamplingParams(
            max_tokens=tokens, ignore_eos=True, temperature=0.0, detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )  # fmt: skip
        self.steps: list[StepRow] = []
        self.calls = 0
        self._open: list[tuple[Any, StepRow]] = []
        self._closed: list[StepRow] = []
        self._listen()

    def add(self, request: int, prompt: list[int], output_tokens: int) -> None:
        """Hand in a request."""
        self._engine.add_request(str(request), {"prompt_token_ids": prompt}, self._parameters(output_tokens))

    def busy(self) -> bool:
        """Whether something is left to do."""
        return bool(self._engine.has_unfinished_requests())

    def step(self) -> list[Output]:
        """One round of the engine."""
        outputs = [
            Output(_number(each.request_id), len(each.outputs[0].token_ids), each.finished)
            for each in self._engine.step()
        ]
        end_s = self._clock()
        for row in self._closed:
            row.end_s = end_s
        self._closed = []
        return outputs

    def forget(self) -> None:
        """Empty the prefix cache."""
        self._engine.reset_prefix_cache()

    def _listen(self) -> None:
        scheduler = self._core.scheduler
        self._scheduler, self._pool = scheduler, scheduler.kv_cache_manager.block_pool
        self._do_schedule, self._do_update = scheduler.schedule, scheduler.update_from_output
        do_preempt, do_evict = scheduler._preempt_request, self._pool._maybe_evict_cached_block
        self._preempted: list[int] = []
        self._evicted = 0

        def preempt(request: Any, *args: Any, **options: Any) -> Any:
            self._preempted.append(_number(request.request_id))
            return do_preempt(request, *args, **options)

        def evict(block: Any) -> Any:
            was_cached = do_evict(block)
            self._evicted += bool(was_cached)
            return was_cached

        scheduler.schedule, scheduler.update_from_output = self._schedule, self._update
        scheduler._preempt_request, self._pool._maybe_evict_cached_block = preempt, evict

    def _schedule(self, *args: Any, **options: Any) -> Any:
        self._preempted, self._evicted = [], 0
        row = StepRow(self.calls, self._clock())
        row.wall_s, row.cpu_s = -time.perf_counter(), -time.thread_time()
        output = self._do_schedule(*args, **options)
        row.schedule_s = self._clock() - row.start_s
        self.calls += 1
        requests = self._scheduler.requests
        for name, tokens in output.num_scheduled_tokens.items():
            before = requests[name].num_computed_tokens - tokens
            row.scheduled.append((_number(name), tokens, before))
        row.drafts = {
            _number(name): len(drafts) for name, drafts in output.scheduled_spec_decode_tokens.items()
        }
        row.preempted, row.evicted = self._preempted, self._evicted
        row.running, row.waiting = len(self._scheduler.running), self._scheduler.get_request_counts()[1]
        row.free_blocks = self._pool.get_num_free_blocks()
        if row.scheduled or row.preempted:
            self.steps.append(row)
        self._open.append((output, row))
        return output

    def _update(self, output: Any, *args: Any, **options: Any) -> Any:
        row = next(row for opened, row in self._open if opened is output)
        self._open = [pair for pair in self._open if pair[1] is not row]
        row.output_s = self._clock()
        row.wall_s += time.perf_counter()
        row.cpu_s += time.thread_time()
        requests = self._scheduler.requests
        mine = {name: requests[name] for name in output.num_scheduled_tokens if name in requests}
        before = {name: request.num_output_tokens for name, request in mine.items()}
        result = self._do_update(output, *args, **options)
        for name, request in mine.items():
            number, tokens = _number(name), request.num_output_tokens - before[name]
            if number in row.drafts:
                row.accepted[number] = max(0, tokens - 1)
        row.finished = [_number(name) for name in mine if name not in requests]
        row.free_after = self._pool.get_num_free_blocks()
        self._closed.append(row)
        return result

    def watch_operators(self) -> Operators | None:
        """On a CPU, where a module's call is its time."""
        import torch

        if torch.cuda.is_available():
            return None
        from record.operators import OperatorTimes

        worker = getattr(getattr(self._core.model_executor, "driver_worker", None), "worker", None)
        runner: Any = worker.model_runner
        return OperatorTimes(runner.get_model(), runner.sampler, str(self.facts()["vllm"]))

    def facts(self) -> dict[str, Any]:
        """Versions and resolved settings."""
        import torch
        import vllm

        config = self._config
        runner = getattr(getattr(self._core.model_executor, "driver_worker", None), "worker", None)
        facts = {
            "vllm": vllm.__version__,
            "torch": torch.__version__,
            "max_num_seqs": config.scheduler_config.max_num_seqs,
            "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
            "max_model_len": config.model_config.max_model_len,
            "enable_chunked_prefill": config.scheduler_config.enable_chunked_prefill,
            "enable_prefix_caching": config.cache_config.enable_prefix_caching,
            "async_scheduling": bool(config.scheduler_config.async_scheduling),
            "block_size": config.cache_config.block_size,
            "num_gpu_blocks": config.cache_config.num_gpu_blocks,
            "enforce_eager": config.model_config.enforce_eager,
            "cudagraph_mode": str(config.compilation_config.cudagraph_mode),
            "scheduler": type(self._scheduler).__name__,
            "runner": type(getattr(runner, "model_runner", None)).__name__,
        }
        if torch.cuda.is_available():
            facts["device"] = torch.cuda.get_device_name()
        return facts

    def memory(self) -> dict[str, Any]:
        """What the engine says about its memory; GPU figures are absent on a CPU."""
        worker = getattr(getattr(self._core.model_executor, "driver_worker", None), "worker", None)
        runner = getattr(worker, "model_runner", None)
        named = {
            "requested_gib": getattr(worker, "requested_memory", None),
            "weights_gib": getattr(runner, "model_memory_usage", None),
            "activation_peak_gib": getattr(worker, "peak_activation_memory", None),
            "non_torch_gib": getattr(worker, "non_torch_memory", None),
            "cuda_graphs_gib": getattr(worker, "cudagraph_memory_estimate", None),
            "kv_cache_gib": self._core.available_gpu_memory_for_kv_cache,
        }
        said = {name: round(value / _GIB, 6) for name, value in named.items() if value}
        return {**said, "num_gpu_blocks": self._config.cache_config.num_gpu_blocks}


def _number(name: str) -> int:
    """The recorder's number of a request: vLLM appends a suffix to the id that it is given."""
    return int(name.split("-")[0])
