"""Step time as the sum of the operations that one step runs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from servesim.config.profiles import GpuProfile, ModelProfile
from servesim.config.scenario import EngineConfig
from servesim.cost.cuda_graphs import captured_sizes, padded_tokens
from servesim.cost.host import host_profile
from servesim.cost.layers import Linear, shard
from servesim.cost.ops import (
    ALL_REDUCE_BYTES,
    AllReduce,
    DecodeAttention,
    Dtype,
    Elementwise,
    Gemm,
    PrefillAttention,
    expected_distinct_experts,
)
from servesim.cost.step_time import UNLIMITED_STEPS, AffineSteps, StepShape

__all__ = ["OperatorLaw"]

_ACTIVATION_BYTES = 2.0
_SAMPLING_PASSES = 2  # over fp32 logits: greedy reads them about twice
_SAMPLING_LAUNCHES_S = 0.1e-3  # low end of 0.1 to 0.3 ms, estimate
_EAGER_KERNELS_PER_LAYER = 11  # 10 to 12, estimate
_EAGER_LAUNCH_S = 6.5e-6  # 5 to 8 us a kernel without CUDA graphs, estimate


class OperatorLaw:
    """Sum over layers of matrix products, attention, all-reduces and elementwise kernels; LM head; sampling.

    Products see all tokens of the step as one batch, padded to the captured CUDA-graph size; attention is
    separate for decodes and for prompt chunks and adds up; the LM head sees sampled rows only.  Without a
    graph a step takes no less than launching its kernels one by one.  ``engine`` must be resolved
    (config.defaults.resolve_engine).  Raises ConfigError when the GPU lacks coefficients that it needs.

    What depends on token counts only is computed once per count, so that a step costs a few dictionary
    look-ups and one multiplication per attention window.
    """

    def __init__(self, model: ModelProfile, gpu: GpuProfile, engine: EngineConfig) -> None:
        self._shard = part = shard(model, engine.tensor_parallel_size)
        kv_dtype: Dtype = "fp8" if engine.kv_cache_dtype == "fp8" else "bf16"
        self._gemm = Gemm(gpu, "bf16")
        self._quantised_gemm = Gemm(gpu, "fp8") if engine.quantization == "fp8" else self._gemm
        published = part.experts is not None and part.experts.bytes_per_weight is not None
        self._expert_gemm = self._gemm if published else self._quantised_gemm
        self._all_reduce = AllReduce(gpu, engine.tensor_parallel_size)
        self._tensor_parallel_size = engine.tensor_parallel_size
        self._elementwise = Elementwise(gpu)
        self._decode = DecodeAttention(
            gpu,
            kv_dtype,
            num_kv_heads=part.num_kv_heads,
            kv_elements=part.kv_elements,
            flops_per_context_token=part.decode_flops_per_context_token,
            latent=part.latent,
        )
        self._prefill = PrefillAttention(
            gpu, kv_dtype, kv_elements=part.kv_elements, flops_per_pair=part.prefill_flops_per_pair
        )
        self._slopes_s = tuple(layers * self._decode.per_context_token_s for layers in part.window_layers)
        self._captured = captured_sizes(gpu, engine)
        self._host = host_profile(engine)
        collectives = 2 if engine.tensor_parallel_size > 1 else 0
        self._eager_s = _EAGER_LAUNCH_S * (_EAGER_KERNELS_PER_LAYER + collectives) * part.num_layers
        self._token_s: dict[int, float] = {}
        self._sampled_s: dict[int, float] = {}
        self._decode_base_s: dict[int, float] = {}

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The distinct attention windows of the model's layers (None: full attention)."""
        return self._shard.windows

    @property
    def context_slopes_s(self) -> tuple[float, ...]:
        """Seconds that one more KV token of context adds to a decode step, by attention window."""
        return self._slopes_s

    def step_s(self, shape: StepShape) -> float:
        """Seconds of one step, host time included."""
        return self._with_host(self.gpu_s(shape), shape.num_decodes + len(shape.chunks))

    def gpu_s(self, shape: StepShape) -> float:
        """Seconds that the GPU works on one step."""
        num_tokens = shape.num_tokens
        seconds = self._fixed_s(num_tokens, shape.num_decodes, shape.num_sampled)
        for context, slope_s in zip(shape.decode_context_tokens, self._slopes_s, strict=True):
            seconds += context * slope_s
        if shape.chunks:
            seconds += sum(self._chunk_parts(shape.chunks).values())
        return max(seconds, self._launch_floor_s(num_tokens))

    def decode_steps(
        self, num_decodes: int, context_tokens: tuple[int, ...], context_growth: tuple[int, ...]
    ) -> AffineSteps:
        """Durations of a run of pure decode steps; ends where the GPU overtakes the host or the launches."""
        seconds = self._fixed_s(num_decodes, num_decodes, num_decodes)
        growth_s = 0.0
        for context, growth, slope_s in zip(context_tokens, context_growth, self._slopes_s, strict=True):
            seconds += context * slope_s
            growth_s += growth * slope_s
        host = self._host
        least_s = self._launch_floor_s(num_decodes)
        if host.hidden:
            least_s = max(least_s, host.host_s(num_decodes))
            added_s = host.residual_s
        else:
            added_s = host.host_s(num_decodes)
        if seconds >= least_s:
            return AffineSteps(seconds + added_s, growth_s, UNLIMITED_STEPS)
        if growth_s <= 0.0:
            return AffineSteps(least_s + added_s, 0.0, UNLIMITED_STEPS)
        level_steps = int((least_s - seconds) / growth_s) + 1
        return AffineSteps(least_s + added_s, 0.0, min(level_steps, UNLIMITED_STEPS))

    def breakdown(self, shape: StepShape) -> dict[str, float]:
        """GPU seconds of one step by kind of operation; they add up to ``gpu_s``.

        ``launch`` is what the GPU waits for kernels to be launched when no CUDA graph replays them.
        """
        parts = self._token_parts(shape.num_tokens)
        parts.update(self._sampling_parts(shape.num_sampled))
        groups = [self._chunk_parts(shape.chunks)]
        if shape.num_decodes:
            groups.append(self._decode_base_parts(shape.num_decodes))
            contexts = zip(shape.decode_context_tokens, self._slopes_s, strict=True)
            groups.append({"decode_attention": sum(context * slope_s for context, slope_s in contexts)})
        for group in groups:
            for name, seconds in group.items():
                parts[name] = parts.get(name, 0.0) + seconds
        idle_s = self._launch_floor_s(shape.num_tokens) - sum(parts.values())
        return {**parts, "launch": max(0.0, idle_s)}

    def _with_host(self, gpu_s: float, num_sequences: int) -> float:
        host_s = self._host.host_s(num_sequences)
        if self._host.hidden:
            return max(gpu_s, host_s) + self._host.residual_s
        return gpu_s + host_s

    def _launch_floor_s(self, num_tokens: int) -> float:
        return 0.0 if self._captured and num_tokens <= self._captured[-1] else self._eager_s

    def _fixed_s(self, num_tokens: int, num_decodes: int, num_sampled: int) -> float:
        """Everything but prompt chunks' attention and the context-dependent part of decode attention."""
        seconds = self._token_s.get(num_tokens)
        if seconds is None:
            seconds = self._token_s[num_tokens] = sum(self._token_parts(num_tokens).values())
        sampling_s = self._sampled_s.get(num_sampled)
        if sampling_s is None:
            sampling_s = self._sampled_s[num_sampled] = sum(self._sampling_parts(num_sampled).values())
        decode_s = self._decode_base_s.get(num_decodes)
        if decode_s is None:
            decode_s = self._decode_base_s[num_decodes] = sum(self._decode_base_parts(num_decodes).values())
        return seconds + sampling_s + decode_s

    def _token_parts(self, num_tokens: int) -> dict[str, float]:
        """Products, all-reduces and elementwise kernels of a step's tokens, summed over layers."""
        if not num_tokens:
            return {}
        part, rows = self._shard, padded_tokens(num_tokens, self._captured)
        parts = self._linear_parts(part.linears, rows)
        if part.experts is not None:
            parts["experts"] = self._experts_s(num_tokens)
        if self._tensor_parallel_size > 1:
            # Two per layer, and one for the embedding, whose rows are split over the GPUs.
            one_s = self._all_reduce.seconds(rows * part.hidden_size * ALL_REDUCE_BYTES)
            parts["all_reduce"] = (2 * part.num_layers + 1) * one_s
        parts["elementwise"] = self._elementwise_s(rows)
        return parts

    def _linear_parts(self, linears: Iterable[Linear], rows: int) -> dict[str, float]:
        parts: defaultdict[str, float] = defaultdict(float)
        for linear in linears:
            gemm = self._quantised_gemm if linear.quantised else self._gemm
            parts[linear.name] += linear.num_layers * gemm.seconds(rows, linear.n, linear.k)
        return dict(parts)

    def _experts_s(self, num_tokens: int) -> float:
        """Routed experts; the rows that pad a CUDA graph are taken to reach no expert that others do not."""
        experts = self._shard.experts
        assert experts is not None
        touched = expected_distinct_experts(experts.num_experts, experts.experts_per_token, num_tokens)
        rows, size = num_tokens * experts.experts_per_token, experts.bytes_per_weight
        hidden = self._shard.hidden_size
        up_s = self._expert_gemm.grouped_seconds(rows, touched, experts.up, hidden, size)
        down_s = self._expert_gemm.grouped_seconds(rows, touched, hidden, experts.width, size)
        return experts.num_layers * (up_s + down_s)

    def _elementwise_s(self, rows: int) -> float:
        """Four kernels per layer (two norms with residual, rotation, activation), two more to route."""
        part, scale = self._shard, rows * _ACTIVATION_BYTES
        norm_s = self._elementwise.seconds(4 * part.hidden_size * scale)
        rotate_s = self._elementwise.seconds(2 * part.rotated_elements * scale)
        seconds = part.num_layers * (2 * norm_s + rotate_s)
        for count, width in part.activations:
            seconds += count * self._elementwise.seconds(3 * width * scale)
        experts = part.experts
        if experts is not None:
            routed = experts.experts_per_token
            act_s = self._elementwise.seconds(3 * experts.width * routed * scale)
            combine_s = self._elementwise.seconds((routed + 1) * part.hidden_size * scale)
            route_s = self._elementwise.seconds(2 * experts.num_experts * scale)
            seconds += experts.num_layers * (act_s + combine_s + route_s)
        return seconds

    def _sampling_parts(self, num_sampled: int) -> dict[str, float]:
        if not num_sampled:
            return {}
        part, whole_vocab = self._shard, self._shard.vocab_size * self._tensor_parallel_size
        passes = self._elementwise.seconds(_SAMPLING_PASSES * num_sampled * whole_vocab * 4.0)
        parts = {
            "lm_head": self._gemm.seconds(num_sampled, part.vocab_size, part.hidden_size),
            "sampling": _SAMPLING_LAUNCHES_S + passes,
        }
        if self._tensor_parallel_size > 1:
            logit_bytes = num_sampled * whole_vocab * _ACTIVATION_BYTES
            parts["logits_gather"] = self._all_reduce.gather_seconds(logit_bytes)
        return parts

    def _decode_base_parts(self, num_decodes: int) -> dict[str, float]:
        if not num_decodes:
            return {}
        parts = self._linear_parts(self._shard.decode_linears, num_decodes)
        parts["decode_attention"] = self._shard.num_layers * self._decode.base_s(num_decodes)
        return parts

    def _chunk_parts(self, chunks: tuple[tuple[int, int], ...]) -> dict[str, float]:
        """Attention of the prompt chunks, summed over layers; with MLA the expansion of the latent too."""
        if not chunks:
            return {}
        part, chunk_s = self._shard, self._prefill.chunk_s
        seconds = part.num_layers * self._prefill.launch_s
        for window, layers in zip(part.windows, part.window_layers, strict=True):
            seconds += layers * sum(chunk_s(new, cached, window) for new, cached in chunks)
        parts = {"prefill_attention": seconds}
        if part.prefill_linears:
            rows = sum(new + cached for new, cached in chunks)
            parts.update(self._linear_parts(part.prefill_linears, rows))
        return parts
