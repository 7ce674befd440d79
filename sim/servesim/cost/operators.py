"""Step time as the sum of the operations that one step runs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from servesim.config.kv_formats import KV_FORMATS
from servesim.config.profiles import GpuProfile, ModelProfile
from servesim.config.scenario import EngineConfig, OperatorStepTime
from servesim.config.weight_formats import WEIGHT_FORMATS
from servesim.cost.attention import AttentionKernel, DecodeAttention, LatentKernels, PrefillAttention
from servesim.cost.collectives import ALL_REDUCE_BYTES, AllReduce, PipelineSend
from servesim.cost.cuda_graphs import GraphModes
from servesim.cost.experts import GroupedExperts, Routing
from servesim.cost.host import host_profile
from servesim.cost.layers import Experts, Linear, shard
from servesim.cost.ops import Elementwise, Gemm
from servesim.cost.sampling import SAMPLERS
from servesim.cost.step_time import UNLIMITED_STEPS, AffineSteps, StepShape

__all__ = ["OperatorLaw"]

_ACTIVATION_BYTES = 2.0
_LOOKUP_BLOCK = 16  # block size that paging_overhead speaks of
_PAGE = 256  # counts of rows that are worked out together
_SENT_TENSORS = 2  # vLLM hands hidden states and residual to the next pipeline stage


class OperatorLaw:
    """Sum over layers of matrix products, attention, all-reduces and elementwise kernels; LM head; sampling.

    Products see all tokens of the step as one batch, padded to the captured CUDA-graph size; attention is
    separate for decodes and for prompt chunks and adds up; the LM head sees sampled rows only.  Without a
    full graph a step takes no less than launching its kernels.  Pipeline stages run one after another.
    ``engine`` must be resolved (config.defaults.resolve_engine).  Raises ConfigError when the GPU lacks
    coefficients that it needs.

    What depends on token counts only is computed once per count, so that a step costs a few dictionary
    look-ups and one multiplication per attention window.
    """

    def __init__(self, model: ModelProfile, gpu: GpuProfile, engine: EngineConfig) -> None:
        degree, stages = engine.tensor_parallel_size, engine.pipeline_parallel_size
        self._shard = part = shard(model, degree, engine.enable_expert_parallel)
        self._tensor_parallel_size, self._num_sends = degree, stages - 1
        options = engine.step_time if isinstance(engine.step_time, OperatorStepTime) else OperatorStepTime()
        weights = WEIGHT_FORMATS[engine.quantization]
        self._gemm = Gemm(gpu, WEIGHT_FORMATS["none"])
        self._quantised_gemm = Gemm(gpu, weights)
        if part.experts is not None:
            bits = part.experts.weight_bits  # as published, whatever the engine's format
            form = weights if bits is None else WEIGHT_FORMATS["mxfp4"]._replace(bits=bits)
            name = engine.quantization if bits is None else "mxfp4"
            self._experts = GroupedExperts(gpu, name, form, engine.version)
            self._routing = Routing(
                part.experts.num_experts,
                part.experts.experts_per_token,
                part.experts.num_ranks,
                options.expert_popularity_skew,
            )
        self._all_reduce = AllReduce(gpu, degree)
        self._send = PipelineSend(gpu, degree * stages)
        self._elementwise = Elementwise(gpu)
        self._latent_kernels = LatentKernels(gpu, part.attention)
        # torch.compile makes the norms of queries and keys one kernel with their rotation.
        self._num_head_norms = 2 * part.num_layers if model.qk_norm and engine.enforce_eager else 0
        self._sampler = SAMPLERS[options.sampler]
        stored = KV_FORMATS[engine.kv_cache_dtype]
        kib = options.shared_memory_per_sm_kib
        kernel = AttentionKernel(options.attention_kernel, None if kib is None else kib * 1024)
        self._decode = DecodeAttention(gpu, stored.kernel, part.attention, kernel, stored)
        self._prefill = PrefillAttention(gpu, stored.kernel, part.attention, kernel, stored)
        paging = 1.0
        if engine.allocator == "paged":  # a lookup per block, whatever its size
            paging += options.paging_overhead * _LOOKUP_BLOCK / engine.block_size
        alone_s, mixed_s = self._decode.per_context_token_s, self._decode.mixed_per_context_token_s
        self._slopes_s = tuple(layers * alone_s * paging for layers in part.window_layers)
        self._mixed_slopes_s = tuple(layers * mixed_s * paging for layers in part.window_layers)
        self._window_layers = tuple(zip(part.windows, part.window_layers, strict=True))
        self._slopes_by_window_s = tuple(enumerate(self._slopes_s))
        self._mixed_slopes_by_window_s = tuple(enumerate(self._mixed_slopes_s))
        self._graphs = GraphModes(gpu, engine, part.num_layers)
        self._host = host_profile(engine)
        self._row_s: dict[int, float] = {}
        self._token_s: dict[int, float] = {}
        self._sampled_s: dict[int, float] = {}
        self._decode_base_s: dict[int, float] = {}
        self._decode_laws: dict[int, tuple[float, float, float]] = {}

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The distinct attention windows of the model's layers (None: full attention)."""
        return self._shard.windows

    @property
    def context_slopes_s(self) -> tuple[float, ...]:
        """Seconds that one more KV token of context adds to a step of decodes only, by attention window."""
        return self._slopes_s

    def step_s(self, shape: StepShape) -> float:
        """Seconds of one step, host time included."""
        least_s, extra_s = self._host.beside_gpu(shape.num_decodes + len(shape.chunks))
        gpu_s = self.gpu_s(shape)
        return (gpu_s if gpu_s > least_s else least_s) + extra_s

    def gpu_s(self, shape: StepShape) -> float:
        """Seconds that the GPU works on one step."""
        num_decodes, contexts, chunks, num_sampled, _, _ = shape
        num_tokens = shape.num_tokens
        seconds = self._fixed_s(num_tokens, num_decodes, num_sampled)
        slopes_s = self._mixed_slopes_by_window_s if chunks else self._slopes_by_window_s
        for i, slope_s in slopes_s:
            seconds += contexts[i] * slope_s
        if chunks:
            seconds += self._prefill_attention_s(chunks)
            if self._shard.prefill_linears:
                seconds += sum(self._expansion_parts(chunks).values())
        floor_s = self._graphs.launch_floor_s(num_tokens, not chunks)
        return seconds if seconds > floor_s else floor_s

    def decode_steps(
        self, num_decodes: int, context_tokens: tuple[int, ...], context_growth: tuple[int, ...]
    ) -> AffineSteps:
        """Durations of a run of pure decode steps; ends where the GPU overtakes the host or the launches."""
        law = self._decode_laws.get(num_decodes)
        if law is None:
            law = self._decode_laws[num_decodes] = self._decode_law(num_decodes)
        seconds, least_s, extra_s = law
        growth_s = 0.0
        for i, slope_s in self._slopes_by_window_s:
            seconds += context_tokens[i] * slope_s
            growth_s += context_growth[i] * slope_s
        if seconds >= least_s:
            return AffineSteps(seconds + extra_s, growth_s, UNLIMITED_STEPS)
        steps = int((least_s - seconds) / growth_s) + 1 if growth_s > 0.0 else UNLIMITED_STEPS
        return AffineSteps(least_s + extra_s, 0.0, min(steps, UNLIMITED_STEPS))

    def _decode_law(self, num_decodes: int) -> tuple[float, float, float]:
        """Of a pure decode step: GPU seconds without context, the least that it takes, what comes on top."""
        fixed_s = self._fixed_s(num_decodes, num_decodes, num_decodes)
        least_s, extra_s = self._host.beside_gpu(num_decodes)
        return fixed_s, max(least_s, self._graphs.launch_floor_s(num_decodes, is_decode=True)), extra_s

    def breakdown(self, shape: StepShape) -> dict[str, float]:
        """GPU seconds of one step by kind of operation; they add up to ``gpu_s``.

        ``launch`` is what the GPU waits for kernels to be launched when no CUDA graph replays them.
        """
        parts = self._token_parts(shape.num_tokens)
        parts.update(self._sampling_parts(shape.num_sampled))
        groups = list[dict[str, float]]()
        if shape.chunks:
            groups += [
                {"prefill_attention": self._prefill_attention_s(shape.chunks)},
                self._expansion_parts(shape.chunks),
            ]
        if shape.num_decodes:
            groups.append(self._decode_base_parts(shape.num_decodes))
            slopes_s = self._mixed_slopes_s if shape.chunks else self._slopes_s
            contexts = zip(shape.decode_context_tokens, slopes_s, strict=True)
            groups.append({"decode_attention": sum(context * slope_s for context, slope_s in contexts)})
        for group in groups:
            for name, seconds in group.items():
                parts[name] = parts.get(name, 0.0) + seconds
        idle_s = self._graphs.launch_floor_s(shape.num_tokens, not shape.chunks) - sum(parts.values())
        return {**parts, "launch": max(0.0, idle_s)}

    def _fixed_s(self, num_tokens: int, num_decodes: int, num_sampled: int) -> float:
        """Everything but prompt chunks' attention and the context-dependent part of decode attention."""
        seconds = self._token_s.get(num_tokens)
        if seconds is None:
            seconds = self._token_s[num_tokens] = self._tokens_s(num_tokens)
        sampling_s = self._sampled_s.get(num_sampled)
        if sampling_s is None:
            sampling_s = self._sampled_s[num_sampled] = sum(self._sampling_parts(num_sampled).values())
        decode_s = self._decode_base_s.get(num_decodes)
        if decode_s is None:
            decode_s = self._decode_base_s[num_decodes] = sum(self._decode_base_parts(num_decodes).values())
        return seconds + sampling_s + decode_s

    def _tokens_s(self, num_tokens: int) -> float:
        """The sum of _token_parts, those of rows worked out for many counts at a time."""
        if not num_tokens:
            return 0.0
        rows = self._graphs.rows(num_tokens)
        if rows not in self._row_s:
            page = np.arange(_PAGE) + rows // _PAGE * _PAGE
            self._row_s.update(zip(page.tolist(), sum(self._row_parts(page).values()).tolist(), strict=True))
        experts = self._shard.experts
        if experts is None:
            return self._row_s[rows]
        return self._row_s[rows] + self._experts_s(experts, num_tokens, self._experts.seconds)

    def _token_parts(self, num_tokens: int) -> dict[str, float]:
        """Products, communication and elementwise kernels of a step's tokens, summed over layers."""
        if not num_tokens:
            return {}
        parts = self._row_parts(self._graphs.rows(num_tokens))
        if self._shard.experts is not None:
            whole_s = self._experts_s(self._shard.experts, num_tokens, self._experts.seconds)
            parts["experts"] = self._experts_s(self._shard.experts, num_tokens, self._experts.reading_s)
            parts["expert_rows"] = whole_s - parts["experts"]
        return parts

    def _row_parts(self, rows: Any) -> dict[str, Any]:
        """What depends on the rows of the step's products, which a CUDA graph pads; a number or an array."""
        part = self._shard
        parts = self._linear_parts(part.linears, rows)
        activation_bytes = rows * part.hidden_size * ALL_REDUCE_BYTES
        if self._tensor_parallel_size > 1:
            # Two per layer, and one for the embedding, whose rows are split over the GPUs.
            parts["all_reduce"] = (2 * part.num_layers + 1) * self._all_reduce.seconds(activation_bytes)
        if self._num_sends:
            parts["pipeline_send"] = self._num_sends * self._send.seconds(_SENT_TENSORS * activation_bytes)
        parts["elementwise"] = self._elementwise_s(rows)
        return parts

    def _linear_parts(self, linears: Iterable[Linear], rows: Any) -> dict[str, Any]:
        parts: defaultdict[str, Any] = defaultdict(float)
        for linear in linears:
            gemm = self._quantised_gemm if linear.quantised else self._gemm
            parts[linear.name] += linear.num_layers * gemm.seconds(rows, linear.n, linear.k)
        return dict(parts)

    def _experts_s(self, experts: Experts, num_tokens: int, law: Callable[..., float]) -> float:
        """Routed experts; the rows that pad a CUDA graph are taken to reach no expert that others do not."""
        load = self._routing.load(num_tokens)
        seconds = law(load, experts.up, experts.width, self._shard.hidden_size)
        return experts.num_layers * seconds

    def _elementwise_s(self, rows: Any) -> Any:
        """Four kernels per layer: two norms with residual, rotation, activation or the choice of experts.

        Run eagerly, two more where queries and keys are normed. Latent attention has kernels of its own. On a
        CPU also what lies between them all.
        """
        part, scale, of = self._shard, rows * _ACTIVATION_BYTES, self._elementwise.seconds
        norm_s = of("norm", 4 * part.hidden_size * scale)
        rotate_s = of("rotation", 2 * part.rotated_elements * scale)
        seconds = part.num_layers * (2 * norm_s + rotate_s + self._latent_kernels.seconds(rows))
        if self._num_head_norms:
            seconds += self._num_head_norms * of("head_norm", part.rotated_elements * scale)
        for count, width in part.activations:
            seconds += count * of("activation", 3 * width * scale)
        if part.experts is not None:
            choice_s = of("choice", 2 * part.experts.num_experts * scale)
            seconds += part.experts.num_layers * choice_s
        if self._elementwise.is_measured:
            seconds += part.num_layers * of("layer", 2 * part.hidden_size * scale)
        return seconds

    def _sampling_parts(self, num_sampled: int) -> dict[str, float]:
        if not num_sampled:
            return {}
        part, whole_vocab = self._shard, self._shard.vocab_size * self._tensor_parallel_size
        passes_s = self._elementwise.seconds(
            "sampling", self._sampler.passes * num_sampled * whole_vocab * 4.0
        )
        launches_s = 0.0 if self._elementwise.is_measured else self._sampler.launches_s
        parts = {
            "lm_head": self._gemm.seconds(num_sampled, part.vocab_size, part.hidden_size),
            "sampling": launches_s + passes_s,
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

    def _prefill_attention_s(self, chunks: tuple[tuple[int, int], ...]) -> float:
        """Attention of the prompt chunks, summed over layers."""
        chunk_s, longest, seconds = self._prefill.chunk_s, 0, 0.0
        for new, cached in chunks:
            if new + cached > longest:
                longest = new + cached
        for window, layers in self._window_layers:
            layer_s = self._prefill.base_s(longest if window is None else min(longest, window))
            for new, cached in chunks:
                layer_s += chunk_s(new, cached, window)
            seconds += layers * layer_s
        return seconds

    def _expansion_parts(self, chunks: tuple[tuple[int, int], ...]) -> dict[str, float]:
        """With MLA, the expansion of the latent of all tokens that the prompt chunks attend to."""
        return self._linear_parts(self._shard.prefill_linears, sum(new + cached for new, cached in chunks))
