"""What a scenario may say of its serving engine."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from servesim.config.kv_formats import KvCacheDtype
from servesim.config.kv_options import KvEvictionConfig, SwapConfig
from servesim.config.record import Record, RuleError
from servesim.config.speculative import SpeculativeConfig
from servesim.config.weight_formats import Quantization

__all__ = ["EngineConfig", "LinearStepTime", "OperatorStepTime", "keep_whole_tables", "refuse_beside"]

EngineVersion = Literal["0.6", "0.11", "0.19", "0.22", "0.26", "0.32", "0.33"]


class OperatorStepTime(Record):
    """Step time from the additive law of operators, with the GPU's efficiency coefficients."""

    law: Literal["operators"] = "operators"
    host: Literal["auto", "vllm-2023", "v0.6", "v1-sync", "v1-async", "v1-cpu", "none"] = "auto"
    """Profile of the time the engine's CPU side adds to a step; auto follows version and async_scheduling."""
    gpu_time_factor: float = Field(default=1.0, ge=0.1, le=10)
    """GPU time of every step over what the law says; `servesim calibrate` fits it."""
    bandwidth_factor: float = Field(default=1.0, ge=0.1, le=10)
    """Share of the HBM bandwidth that kernels reach, over the GPU file's; the share ends at 1."""
    exposed_host_s: float | None = Field(default=None, ge=0, le=10)
    """Host time that every step waits for, instead of the profile's: its fixed part, with async_scheduling
    its residual."""
    sampler: Literal["greedy", "top_k_top_p"] = "greedy"
    """What draws the tokens; sorting the logits for top-k or top-p takes several passes more."""
    expert_popularity_skew: float = Field(default=0.0, ge=0, le=3)
    """Zipf exponent of how often tokens are routed to an expert; 0 is uniform, and reads the most weights."""
    attention_kernel: Literal["flash", "standard"] = "flash"
    """For exploration: standard writes all scores to memory and reads them back; flash was measured."""
    paging_overhead: float = Field(default=0.0, ge=0, le=10)
    """For exploration: what looking up blocks of 16 tokens adds to reading the KV cache, as a share; other
    block sizes add 16 / block_size times that. The first PagedAttention kernel took 0.20 to 0.26 more than
    one for contiguous memory (arXiv 2309.06180, Figure 18a); the measured coefficients include today's."""
    shared_memory_per_sm_kib: int | None = Field(default=None, ge=1, le=10_000)
    """For exploration: shared memory of an SM that flash attention may use, instead of the GPU's own. Less
    slows long prompts; more changes nothing, since the measured efficiency stands."""


class LinearStepTime(Record):
    """Step time base_s + per_token_s * scheduled tokens + per_context_token_s * KV tokens attended."""

    law: Literal["linear"]
    base_s: float = Field(ge=0)
    per_token_s: float = Field(default=0.0, ge=0)
    per_context_token_s: float = Field(default=0.0, ge=0)


def _law(step_time: Any) -> Any:
    """The law that a step_time section names; one that names none means operators, the default."""
    return (
        step_time.get("law", "operators") if isinstance(step_time, dict) else getattr(step_time, "law", None)
    )


StepTimeConfig = Annotated[
    Annotated[OperatorStepTime, Tag("operators")] | Annotated[LinearStepTime, Tag("linear")],
    Discriminator(_law),
]


class EngineConfig(Record):
    """The serving engine, in vLLM's names and with vLLM's defaults."""

    version: EngineVersion = "0.26"
    """vLLM version that is followed: 0.22 (also 0.20), 0.26 (0.24 to 0.31), 0.32 or 0.33. The older ones
    schedule like 0.22, which is not verified, and have their own memory profiling and defaults: 0.6, 0.11
    (also 0.8 to 0.13) and 0.19 (0.14 to 0.19)."""
    profile: str | None = None
    """Engine profile that `servesim calibrate` wrote: path of a file, beside the scenario or anywhere."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    dtype: Literal["auto", "bfloat16", "float16"] = "auto"
    """Type of activations and unquantised weights; auto is bfloat16."""
    pipeline_parallel_size: int = Field(default=1, ge=1)
    """Groups of tensor-parallel GPUs that hold consecutive layers. One batch at a time is simulated, where
    vLLM keeps one in each stage: step times are right, the throughput of a busy engine is a lower bound."""
    enable_expert_parallel: bool = False
    """Whole experts on each of the tensor-parallel GPUs instead of a slice of each."""
    quantization: Quantization = "none"
    """Format of the linear layers' weights; embeddings and the LM head keep dtype. int8 is W8A8; w4a16 stands
    for AWQ and GPTQ; nvfp4 runs in 4 bits on Blackwell and weight-only elsewhere."""
    kv_cache_dtype: KvCacheDtype = "auto"
    """Type of the KV cache; auto is dtype. int8 and int4 keep a scale and a zero point per token and head.
    What they do to the answers is not modelled."""
    gpu_memory_utilization: float = Field(default=0.92, gt=0, le=1)
    max_model_len: int | None = Field(default=None, ge=1)
    """Most tokens (prompt and output) of one request; empty takes the model's maximum."""
    max_num_seqs: int | None = Field(default=None, ge=1)
    """Most requests in one step; empty takes vLLM's default for the GPU's memory size."""
    max_num_batched_tokens: int | None = Field(default=None, ge=1)
    """Most tokens in one step; empty takes vLLM's default for the GPU's memory size."""
    block_size: int = Field(default=16, ge=1)
    """Tokens in one KV block."""
    num_gpu_blocks_override: int | None = Field(default=None, ge=2)
    """KV blocks of the pool, with the null block, instead of what the memory budget gives."""
    kv_cache_memory_bytes: int | None = Field(default=None, ge=1)
    """KV bytes per GPU instead of what the memory budget gives."""
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    long_prefill_token_threshold: int = Field(default=0, ge=0)
    """Most prompt tokens that one request may prefill in a step; 0 sets no limit."""
    scheduling_policy: Literal["fcfs", "priority"] = "fcfs"
    async_scheduling: bool = True
    watermark: float = Field(default=0.0, ge=0, lt=1)
    """Share of the blocks that must stay free when a waiting request is admitted beside running ones."""
    scheduler_reserve_full_isl: bool = True
    """Admit a request only when its whole prompt fits, not only its first chunk."""
    enforce_eager: bool = False
    """Run without CUDA graphs."""
    cudagraph_mode: Literal["none", "piecewise", "full", "full_decode_only", "full_and_piecewise"] = (
        "full_and_piecewise"
    )
    """Which steps are replayed from CUDA graphs, and whether attention is in them."""
    preemption_mode: Literal["recompute", "swap"] = "recompute"
    """What happens to a preempted request: its blocks are freed, or wait in host memory while nobody else is
    admitted. swap is vLLM's up to its V0 engine, without prefix caching and async_scheduling."""
    swap_space_gib: float = Field(default=4.0, ge=0, le=1e6)
    """Host memory for swapped blocks, per GPU (vLLM: --swap-space)."""
    swap: SwapConfig = SwapConfig()
    kv_eviction: KvEvictionConfig | None = None
    """A budget of KV tokens per request; empty keeps all."""
    allocator: Literal["paged", "contiguous-max", "contiguous-pow2", "contiguous-oracle"] = "paged"
    """paged is vLLM's. The others reserve consecutive slots when a request is admitted: max_model_len; its
    prompt and the next power of two of its output; or exactly what it will need (docs/allocators.md)."""
    contiguous_fit: Literal["first", "best", "buddy"] = "first"
    """Where a contiguous allocator reserves: in the first or the smallest hole that is large enough, or in a
    chunk of a buddy system, which rounds up to a power of two."""
    batching: Literal["continuous", "static", "orca", "prefill-first"] = "continuous"
    """continuous is vLLM's. static: a batch ends with its longest request (FasterTransformer); orca: whole
    prompts join the running decodes; prefill-first: prompts in steps of their own (vLLM before chunking)."""
    speculative: SpeculativeConfig | None = None
    """Speculative decoding; empty switches it off."""
    step_time: StepTimeConfig = OperatorStepTime()

    @model_validator(mode="after")
    def _swaps_as_vllm_did(self) -> EngineConfig:
        if self.preemption_mode == "swap":
            keep_whole_tables(self, "preemption_mode: swap")
        return self

    @model_validator(mode="after")
    def _evicts_from_plain_tables(self) -> EngineConfig:
        if self.kv_eviction is not None:
            refuse_beside(self, "kv_eviction", "allocator", "speculative", "enable_prefix_caching")
        return self

    @model_validator(mode="after")
    def _allocates_as_it_batches(self) -> EngineConfig:
        given = self.model_fields_set
        if self.allocator == "paged":
            if self.batching == "static":
                raise RuleError(
                    "static needs a contiguous allocator (a batch must have all its memory when it begins)",
                    path=("batching",),
                    next_step="add allocator: contiguous-max under engine",
                )
            if self.contiguous_fit != "first":
                raise RuleError(
                    "needs a contiguous allocator (any free block serves a paged one)",
                    path=("contiguous_fit",),
                    next_step="remove it, or add allocator: contiguous-max under engine",
                )
        elif self.watermark:
            raise RuleError(
                "needs allocator: paged (a reservation never grows)",
                path=("watermark",),
                next_step="remove it",
            )
        if self.batching == "continuous":
            return self
        only_continuous = {
            "enable_chunked_prefill": self.enable_chunked_prefill,
            "long_prefill_token_threshold": self.long_prefill_token_threshold,
            "async_scheduling": self.async_scheduling,
            "speculative": self.speculative,
            "max_num_batched_tokens": self.batching != "prefill-first",
        }
        for name, wanted in only_continuous.items():
            if name in given and wanted and getattr(self, name) is not None:
                raise RuleError(
                    f"does not go with batching: {self.batching} (docs/allocators.md says how it schedules)",
                    path=(name,),
                    next_step="remove it, or the batching",
                )
        return self

    @model_validator(mode="after")
    def _speculates_as_vllm_can(self) -> EngineConfig:
        speculative = self.speculative
        if speculative is None:
            return self
        if self.allocator != "paged":
            raise RuleError(
                "needs allocator: paged (drafts are put into blocks that are given to requests as they grow)",
                path=("speculative",),
                next_step="remove the section, or the allocator",
            )
        asked = "async_scheduling" in self.model_fields_set and self.async_scheduling
        if asked and not speculative.can_be_async:
            raise RuleError(
                f"is not possible with {speculative.method}: vLLM makes its drafts on the host, from tokens "
                "that the next step would have to wait for",
                path=("async_scheduling",),
                next_step="leave async_scheduling out, or set it to false",
            )
        return self


def keep_whole_tables(engine: EngineConfig, what: str, path: tuple[str, ...] = ()) -> None:
    """Raise RuleError for a setting that was asked for and that vLLM's V0 engine lacked beside ``what``."""
    keys = ["allocator", "batching", "speculative", "kv_eviction", "scheduling_policy"]
    keys += ["enable_prefix_caching", "async_scheduling"]
    refuse_beside(engine, what, *keys, path=path)


def refuse_beside(engine: EngineConfig, what: str, *keys: str, path: tuple[str, ...] = ()) -> None:
    """Raise RuleError if one of ``keys`` was given another value than the plainest, which ``what`` needs."""
    plainest = {
        "allocator": "paged",
        "batching": "continuous",
        "kv_eviction": None,
        "scheduling_policy": "fcfs",
        "speculative": None,
    }
    for key in keys:
        if key in engine.model_fields_set and getattr(engine, key) != plainest.get(key, False):
            raise RuleError(f"does not go with {what}", path=(*path, key), next_step="leave it out")
