"""What to record, on which shapes, with which settings."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from record.arrivals import Ask, Lengths, poisson
from record.shapes import SHAPES

__all__ = ["CPU_ENVIRONMENT", "PLANS", "Grid", "Job", "Online", "first_look"]


@dataclass(frozen=True)
class Online:
    """Poisson arrivals at ``shares`` of the capacity that a burst of the same requests shows."""

    tag: str
    seed: int
    count: int
    prompt: Lengths
    output: Lengths
    shares: tuple[float, ...] = (0.3, 0.6, 0.85, 1.5)
    groups: int = 0
    prefix: int = 0
    capacity_of: str = ""
    """Group of the burst that gives the capacity, when it is that of another job."""

    def asks(self, rate: float, seed: int) -> list[Ask]:
        """The requests."""
        return poisson(seed, self.count, rate, self.prompt, self.output, self.groups, self.prefix)


@dataclass(frozen=True)
class Grid:
    """Prompts by length, decodes by batch and context, and (on a CPU) the times of single operators."""

    lengths: tuple[int, ...]
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    steps: int = 16
    most_tokens: int = 150_000
    operator_lengths: tuple[int, ...] = ()
    """Prompts whose operators are timed one by one, the first time apart, and those of decodes with them."""
    served: bool = True
    """Whether the grid itself is recorded, or only the times of operators."""


@dataclass(frozen=True)
class Job:
    """One engine: a shape, its settings, and what it does."""

    shape: str
    settings: dict[str, Any]
    grid: Grid | None = None
    onlines: tuple[Online, ...] = ()
    prefix: str = ""
    """Of the names of its runs, where a folder has several jobs."""
    overrides: tuple[str, ...] = ()
    """What the scenario must be told besides the engine's settings, as ``servesim --set`` takes it."""
    repeats: int = 3
    limit_s: float = 420.0
    clock: str = "wall"
    environment: tuple[tuple[str, str], ...] = ()
    """Variables of the process that the engine runs in."""

    @property
    def vocab(self) -> int:
        """Size of the vocabulary."""
        return int(SHAPES[self.shape]["vocab_size"])

    def changed(self, prefix: str, onlines: tuple[Online, ...], **settings: Any) -> Job:
        """The same shape with other settings, in the same folder."""
        return replace(
            self, settings={**self.settings, **settings}, grid=None, onlines=onlines, prefix=prefix
        )


_CPU = {
    "max_model_len": 2048, "max_num_seqs": 32, "max_num_batched_tokens": 512, "block_size": 32,
    "enable_prefix_caching": True, "enable_chunked_prefill": True, "async_scheduling": False,
    "enforce_eager": True, "kv_cache_memory_bytes": 2**29,
}  # fmt: skip
# One thread, and an allocator that keeps what it has got, as vLLM advises for CPUs (there another allocator):
# otherwise pages may come and go with every large tensor, and the first touch of each costs a microsecond.
CPU_ENVIRONMENT = (
    ("OMP_NUM_THREADS", "1"), ("VLLM_CPU_OMP_THREADS_BIND", "nobind"),
    ("MALLOC_MMAP_THRESHOLD_", str(2**25)), ("MALLOC_TRIM_THRESHOLD_", str(2**32)),
)  # fmt: skip
_CPU_CHAT = Online("chat", 1, 80, Lengths(120, 0.7, 16, 900), Lengths(40, 0.6, 4, 160))
_WALL = replace(_CPU_CHAT, shares=(0.6,), capacity_of="chat-burst")
# Sizes between the powers of two too, as batches have them: kernels are not equally good at all of them.
_CPU_LENGTHS = (16, 24, 32, 48, 64, 100, 128, 160, 200, 256, 300, 350, 400, 450, 512)
_CPU_GRID = Grid((*_CPU_LENGTHS, 1024), (1, 2, 4, 8, 16, 32), (32, 256, 1024), 14, 8200)

# What a first step with so many rows takes longer is told by one step each.
_MORE_LENGTHS = (
    499, 485, 469, 457, 437, 421, 403, 389, 371, 359, 343, 331, 317, 305, 287, 277, 261, 251, 233, 225, 211,
    191, 181, 173, 165, 151, 137, 125, 117, 109, 91, 83, 77, 59, 45, 37,
)  # fmt: skip


def _cpu(shape: str) -> Job:
    return Job(shape, dict(_CPU), _CPU_GRID, (_CPU_CHAT,), clock="cpu", environment=CPU_ENVIRONMENT)


# Steps of a server hardly ever have a round number of rows, and kernels are less good at others.
_TIMED_LENGTHS = (17, 23, 32, 47, 65, 99, 128, 163, 199, 230, 257, 299, 347, 401, 449, 491, 511, 512)
_TIMED_BATCHES = (1, 2, 3, 4, 5, 6, 7, 9, 11, 13, 16, 19, 23, 29, 32)


def _operators(shape: str, *more_lengths: int) -> Job:
    lengths = (*more_lengths, *_TIMED_LENGTHS)
    grid = replace(_CPU_GRID, served=False, operator_lengths=lengths, batches=_TIMED_BATCHES)
    return replace(_cpu(shape), grid=grid, onlines=())


def _features(base: Job, chat: Online, shared: Online, budget: int, blocks: int) -> list[Job]:
    """Prefix caching on and off, whole prompts within a ``budget`` of tokens, a pool of few ``blocks``."""
    return [
        base.changed("prefix-on-", (shared,)),
        base.changed(
            "prefix-off-",
            (replace(shared, capacity_of="prefix-on-shared-burst"),),
            enable_prefix_caching=False,
        ),
        base.changed("no-chunks-", (chat,), enable_chunked_prefill=False, max_num_batched_tokens=budget),
        base.changed("small-kv-", (chat,), num_gpu_blocks_override=blocks),
    ]


def _speculation(base: Job, chat: Online) -> list[Job]:
    """N-gram drafting: with random weights the accepted share means nothing, the steps do.

    A replay takes drafts and acceptance from the recording; the law of acceptance only fills a scenario.
    """
    overrides = (
        "engine.speculative.method=ngram", "engine.speculative.num_speculative_tokens=4",
        "engine.speculative.acceptance.law=iid", "engine.speculative.acceptance.rate=0",
    )  # fmt: skip
    drafting = {
        "method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4, "prompt_lookup_min": 2,
    }  # fmt: skip
    job = base.changed("ngram-", (chat,), speculative_config=drafting)
    return [replace(job, overrides=overrides)]


_CPU_SHORT = Online("chat", 1, 60, Lengths(120, 0.7, 16, 480), Lengths(60, 0.6, 4, 160), (0.85,))
_CPU_SHARED = Online("shared", 5, 60, Lengths(60, 0.6, 8, 300), Lengths(30, 0.5, 4, 80), (0.6,), 6, 256)
_CHAT = Online("chat", 1, 400, Lengths(400, 0.9, 16, 3000), Lengths(180, 0.7, 8, 800))
_DOCS = Online("docs", 3, 150, Lengths(3000, 0.5, 500, 7500), Lengths(120, 0.5, 8, 400), (0.6,))
_BUSY = replace(_CHAT, shares=(0.85,))
_SHARED = replace(_CHAT, tag="shared", seed=5, shares=(0.6,), groups=8, prefix=1536)
_GRID = Grid(
    (16, 64, 128, 256, 512, 1024, 2048, 4096, 8192), (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256),
    (128, 512, 1024, 2048, 4096, 8192), 24,
)  # fmt: skip


def _gpu(shape: str, *, onlines: tuple[Online, ...] = (_CHAT,), **settings: Any) -> Job:
    return Job(shape, {"max_model_len": 16384, **settings}, _GRID, onlines)


_GPU_3B = _gpu("llama-3b", max_model_len=8192, max_num_batched_tokens=2048)
_CPU_SHAPES = ("llama-c57m", "llama-c127m", "llama-c87m", "moe-c130m")
# Experts of shapes that nothing is judged on.
_CPU_MIXTURES = ("moe-c110m", "moe-c100m", "moe-c112m")
PLANS: dict[str, list[Job]] = {
    "cpu": [_cpu(shape) for shape in _CPU_SHAPES],
    "cpu-operators": [
        _operators("llama-c87m", *_MORE_LENGTHS),
        *(_operators(shape) for shape in _CPU_MIXTURES),
    ],
    "cpu-features": _features(_cpu("llama-c87m"), _CPU_SHORT, _CPU_SHARED, budget=2048, blocks=66),
    "cpu-speculation": _speculation(_cpu("llama-c87m"), _CPU_SHORT),
    # The same trace on the clock of the wall: is the CPU clock the same on a quiet machine?
    "cpu-wall": [replace(_cpu("llama-c57m").changed("wall-", (_WALL,)), clock="wall")],
    # On one 80 GB GPU.
    "gpu-shake": [_gpu("llama-1b")],
    "gpu-main": [_gpu("llama-8b", onlines=(_CHAT, _DOCS))],
    "gpu-features": _features(_GPU_3B, _BUSY, _SHARED, budget=8192, blocks=2500),
    "gpu-extra": [
        _gpu("moe-15b"),
        *_speculation(_GPU_3B, _BUSY),
        _GPU_3B.changed("sync-", (_BUSY,), async_scheduling=False),
        _GPU_3B.changed("eager-", (_BUSY,), enforce_eager=True),
    ],
}
"""Lists of jobs by name; jobs of one shape share a folder."""


def first_look(job: Job) -> Job:
    """The smallest sizes of a job, once: does everything work on this machine?"""
    grid = job.grid and replace(
        job.grid,
        lengths=job.grid.lengths[:3],
        batches=job.grid.batches[:3],
        contexts=job.grid.contexts[:2],
        operator_lengths=job.grid.operator_lengths[:3],
    )
    onlines = tuple(replace(each, count=20) for each in job.onlines)
    return replace(job, grid=grid, onlines=onlines, repeats=1)
