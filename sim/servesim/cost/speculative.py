"""What speculative decoding takes in time: verifying many tokens at once, and drafting them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from servesim.config.profiles import GpuProfile, ModelProfile
from servesim.config.scenario import EngineConfig, OperatorStepTime
from servesim.cost.calibrated import with_bandwidth_factor
from servesim.cost.drafter import head_layer
from servesim.cost.host import host_profile
from servesim.cost.step_time import AffineSteps, StepShape

__all__ = ["GpuLaw", "SpeculativeLaw"]

_BYTES = 2.0  # a drafter's weights are not quantised
_NGRAM_HOST_S = 10e-6  # per request and step; estimate for vLLM's compiled search


class GpuLaw(Protocol):
    """The GPU's part of a law of step time."""

    @property
    def windows(self) -> tuple[int | None, ...]:
        """As in StepTime."""
        ...

    @property
    def context_slopes_s(self) -> tuple[float, ...]:
        """Seconds that one more KV token of context adds to a decode step, by attention window."""
        ...

    def gpu_s(self, shape: StepShape) -> float:
        """Seconds that the GPU works on one step."""
        ...

    def breakdown(self, shape: StepShape) -> dict[str, float]:
        """The same by kind of operation."""
        ...


class SpeculativeLaw:
    """Verification on the model, then drafting: T_verify + T_draft of every step, and the host's time.

    The products and the LM head see every draft as a row.  Attention reads a sequence's keys once for all its
    drafts and computes with them for each, so that it turns compute-bound sooner.  A drafter with layers
    first runs over all tokens of the step and then, once per further draft, over one token of each sequence;
    every draft takes an LM head.  ``law_of`` gives the law of a model under an engine, of the drafter too.
    ``engine`` must be resolved, speculate, and its step_time be the law of operators.
    """

    def __init__(
        self,
        law_of: Callable[[ModelProfile, EngineConfig], GpuLaw],
        model: ModelProfile,
        gpu: GpuProfile,
        engine: EngineConfig,
        draft: ModelProfile | None,
    ) -> None:
        speculative, law = engine.speculative, engine.step_time
        assert speculative is not None
        assert isinstance(law, OperatorStepTime)
        self._target = target = law_of(model, engine)
        self._speculative = speculative
        self._host = host_profile(engine)
        self._draft_host_s = speculative.draft_host_s
        if self._draft_host_s is None:
            self._draft_host_s = _NGRAM_HOST_S if speculative.method == "ngram" else 0.0
        self._model, self._degree = draft or model, engine.tensor_parallel_size
        self._products = _Products(with_bandwidth_factor(gpu, law.bandwidth_factor), law.gpu_time_factor)
        self._drafter: GpuLaw | None = None
        if speculative.keeps_kv:
            plain = engine.model_copy(update={"quantization": "none"})
            profile = draft if draft is not None else head_layer(model, speculative)
            self._drafter = law_of(profile, plain)
        self._flops_s = _attention_flops(model, self._degree) / self._products.attention_flops_per_s
        self._layers = tuple(model.windows.count(window) for window in target.windows)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The distinct attention windows of the model's layers (None: full attention)."""
        return self._target.windows

    def step_s(self, shape: StepShape) -> float:
        """Seconds of one step, host time included."""
        gpu_s, host = self.gpu_s(shape), self._host
        assert self._draft_host_s is not None
        host_s = host.host_s(shape.num_decodes + len(shape.chunks))
        host_s += self._draft_host_s * _sequences(shape)
        return max(gpu_s, host_s) + host.residual_s if host.hidden else gpu_s + host_s

    def gpu_s(self, shape: StepShape) -> float:
        """Seconds that the GPU works on one step."""
        return self.verify_s(shape) + self.draft_s(shape)

    def decode_steps(
        self, num_decodes: int, context_tokens: tuple[int, ...], context_growth: tuple[int, ...]
    ) -> AffineSteps:
        """Durations of pure decode steps without drafts, one at a time."""
        return AffineSteps(self.step_s(StepShape(num_decodes, context_tokens, (), num_decodes)), 0.0, 1)

    def breakdown(self, shape: StepShape) -> dict[str, float]:
        """GPU seconds of one step by kind of operation; they add up to ``gpu_s``."""
        parts = self._target.breakdown(self._with_tree(shape))
        verification_s = self._verification_attention_s(shape)
        return {**parts, "verification_attention": verification_s, "draft": self.draft_s(shape)}

    def verify_s(self, shape: StepShape) -> float:
        """Seconds of the model's own pass."""
        return self._target.gpu_s(self._with_tree(shape)) + self._verification_attention_s(shape)

    def draft_s(self, shape: StepShape) -> float:
        """Seconds of proposing the next drafts."""
        sequences, drafts = _sequences(shape), self._speculative.num_speculative_tokens
        model, products = self._model, self._products
        lm_head_s = products.seconds(sequences, model.vocab_size // self._degree, model.hidden_size)
        if self._speculative.method == "medusa":
            square_s = products.seconds(sequences, model.hidden_size // self._degree, model.hidden_size)
            return drafts * (square_s + lm_head_s)
        if self._drafter is None:
            return 0.0
        extra_rows = self._speculative.draft_rows * sequences
        contexts = self._drafter_contexts(shape.decode_context_tokens)
        first = StepShape(shape.num_decodes, contexts, shape.chunks, 0, shape.num_draft_tokens + extra_rows)
        seconds = self._drafter.gpu_s(first)
        if not sequences:
            return seconds
        next_one = StepShape(sequences, self._drafter_contexts(self._sampled_contexts(shape)), (), 0)
        seconds += (drafts - 1) * self._drafter.gpu_s(next_one) + drafts * lm_head_s
        if self._speculative.reads_hidden_states:
            n, k = model.hidden_size // self._degree, 2 * model.hidden_size
            seconds += products.seconds(shape.num_tokens, n, k)
            seconds += (drafts - 1) * products.seconds(sequences, n, k)
        return seconds

    def _with_tree(self, shape: StepShape) -> StepShape:
        tree = self._speculative.tree_tokens
        if tree is None or not shape.num_draft_tokens:
            return shape
        verified = shape.num_draft_tokens * tree // self._speculative.num_speculative_tokens
        more = verified - shape.num_draft_tokens
        return shape._replace(num_draft_tokens=verified, num_sampled=shape.num_sampled + more)

    def _verification_attention_s(self, shape: StepShape) -> float:
        """What computing with every draft's query takes beyond the law of one query per sequence."""
        wide = self._with_tree(shape)
        if not wide.num_draft_tokens:
            return 0.0
        queries, seconds = 1 + wide.num_draft_tokens / wide.num_decodes, 0.0
        slopes = zip(wide.decode_context_tokens, self._layers, self._target.context_slopes_s, strict=True)
        for context, layers, slope_s in slopes:
            seconds += context * max(0.0, layers * queries * self._flops_s - slope_s)
        return seconds

    def _sampled_contexts(self, shape: StepShape) -> tuple[int, ...]:
        """Contexts of the sequences that go on: the decodes, and their share of the chunks."""
        ending = _sequences(shape) - shape.num_decodes
        if ending <= 0 or not shape.chunks:
            return shape.decode_context_tokens
        lengths = sum(new + cached for new, cached in shape.chunks) * ending // len(shape.chunks)
        return tuple(context + lengths for context in shape.decode_context_tokens)

    def _drafter_contexts(self, contexts: tuple[int, ...]) -> tuple[int, ...]:
        """Contexts by the drafter's own windows; where the model has no such window, the longest."""
        assert self._drafter is not None
        of = dict(zip(self._target.windows, contexts, strict=True))
        return tuple(of.get(window, max(contexts)) for window in self._drafter.windows)


def _sequences(shape: StepShape) -> int:
    """Sequences that yield tokens: each samples one more than it has drafts."""
    return shape.num_sampled - shape.num_draft_tokens


def _attention_flops(model: ModelProfile, degree: int) -> float:
    """Operations of one query on one cached token, per layer and GPU."""
    heads, mla = model.num_attention_heads // degree, model.mla
    if mla is None:
        return 4.0 * heads * model.head_dim
    return 2.0 * heads * (2 * mla.kv_lora_rank + mla.qk_rope_head_dim)


class _Products:
    """``factor`` times the roofline of the drafter's small matrix products, at the GPU's bf16 efficiency."""

    def __init__(self, gpu: GpuProfile, factor: float) -> None:
        law = gpu.efficiency.gemm["bf16"]
        self._launch_s = factor * law.launch_s
        peak = gpu.peak_flops_per_s["bf16"] / factor
        self._flops_per_s = peak * law.compute
        self._bytes_per_s = gpu.hbm_bandwidth_bytes_per_s / factor * law.memory
        self.attention_flops_per_s = peak * gpu.efficiency.prefill_attention["bf16"].compute

    def seconds(self, rows: int, n: int, k: int) -> float:
        """Time of (rows x k) times (k x n); nothing without rows."""
        if not rows:
            return 0.0
        moved = _BYTES * (n * k + rows * (n + k))
        return self._launch_s + max(2.0 * rows * n * k / self._flops_per_s, moved / self._bytes_per_s)
