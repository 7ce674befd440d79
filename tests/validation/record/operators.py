"""Times of single operators of a model on a CPU, from the modules of a running engine.

On a CPU a module's call is its time, so every product and every attention can be timed where it runs. The
rows have the columns of hardware/measurements; `servesim fit` makes a hardware file's efficiency of them.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

__all__ = ["OperatorTimes"]

Key = tuple[Any, ...]
_PER_LAYER = {"RMSNorm": 2, "RotaryEmbedding": 1, "SiluAndMul": 1}
_TIMED = ("Linear", "LogitsProcessor", "MoERunner", *_PER_LAYER)
_MOVED = {"RMSNorm": 4, "RotaryEmbedding": 2, "SiluAndMul": 1.5}
"""Values read and written per value of the input: a norm also adds the residual, the activation halves."""


class OperatorTimes:
    """While open, collects how long every module of interest takes."""

    def __init__(self, model: Any, sampler: Any, vllm: str) -> None:
        self._model, self._sampler, self._vllm = model, sampler, vllm
        self._hooks: list[Any] = []
        self._times: defaultdict[Key, list[float]] = defaultdict(list)
        self._open: list[list[float]] = []
        self._inside_s = 0.0
        self.batch: tuple[int, int, bool] = (0, 0, True)
        self.on = True
        self.first = False

    def __enter__(self) -> OperatorTimes:
        for module in (self._sampler, *self._model.modules()):
            kind = type(module).__name__
            whole = module is self._model or module is self._sampler
            if whole or kind.endswith(_TIMED) or kind == "Attention":
                self._hooks.append(module.register_forward_pre_hook(self._before))
                self._hooks.append(module.register_forward_hook(self._after, with_kwargs=True))
        return self

    def __exit__(self, *exception: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _before(self, module: Any, inputs: Any) -> None:
        self._open.append([time.thread_time(), 0.0])

    def _after(self, module: Any, inputs: Any, named: dict[str, Any], output: Any) -> None:
        """A router may be called by the experts that it chooses; its time is its own."""
        begin_s, within_s = self._open.pop()
        seconds = time.thread_time() - begin_s
        if self._open:
            self._open[-1][1] += seconds
        else:
            self._inside_s += seconds
        if self.on and module is not self._model and module is not self._sampler:
            self._times[self._key(module, inputs or tuple(named.values()))].append(seconds - within_s)

    def stepped(self, seconds: float) -> None:
        """A step of decodes is over: what neither model nor sampler took is the host's."""
        host_s, self._inside_s = seconds - self._inside_s, 0.0
        if self.on:
            self._times["host", self.batch[0]].append(host_s)

    def _key(self, module: Any, inputs: Any) -> Key:
        kind = type(module).__name__
        batch, context, decoding = self.batch
        if kind == "Attention":
            op = "generation_attention" if decoding else "context_attention"
            return op, batch, context, module.num_heads, module.num_kv_heads, module.head_size
        if kind.endswith("LogitsProcessor"):
            head, hidden = inputs[0], inputs[1]
            return "gemm", hidden.shape[0], head.weight.shape[0], head.weight.shape[1]
        if kind.endswith("Linear"):
            out, inner = module.output_size, module.input_size
            return "gemm", inputs[0].shape[0], out, inner
        if kind == "MoERunner":
            moe = module.moe_config
            width, hidden = moe.intermediate_size_per_partition, moe.hidden_dim
            return "moe", inputs[0].shape[0], width, hidden, moe.num_experts, moe.experts_per_token
        name = next(each for each in _PER_LAYER if kind.endswith(each))
        values = inputs[1:3] if name == "RotaryEmbedding" else inputs[:1]  # positions, query, key
        return "elementwise", name, inputs[0].shape[0], sum(each.shape[-1] for each in values)

    def rows(self) -> Iterator[list[object]]:
        """The median time of every operator and size, as rows of kernels.csv."""
        medians = {key: 1e6 * statistics.median(times) for key, times in self._times.items()}
        if self.first:
            yield from self._first_rows(medians)
            return
        moving: defaultdict[int, list[tuple[int, float]]] = defaultdict(list)
        for (op, *sizes), latency_us in medians.items():
            if op == "gemm":
                yield self._row(op, ["", *sizes, *[""] * 7], "torch", latency_us)
            elif op == "host":
                yield self._row(op, ["", "", "", "", *sizes, *[""] * 6], "engine", latency_us)
            elif op == "moe":
                rows, width, hidden, *chosen = sizes
                # Random weights route at random: the recorder looked, and the law's expectation was met.
                yield self._row(
                    op,
                    ["", rows, width, hidden, *[""] * 7],
                    "cpu_fused_moe",
                    latency_us,
                    [*chosen, "uniform"],
                )
            elif op == "elementwise":
                kind, rows, width = sizes
                count = _PER_LAYER[kind]
                moving[rows] += [(rows * width * _MOVED[kind], latency_us)] * count
            else:
                yield self._row(op, ["bfloat16", "", "", "", *sizes, "", ""], "cpu_attn", latency_us)
        for rows, kernels in moving.items():  # the law knows the kernels of a layer by their mean
            elements, latency_us = (sum(column) / len(kernels) for column in zip(*kernels, strict=True))
            sizes = ["", rows, "", "", "", "", "", "", "", "", round(elements)]
            yield self._row("elementwise", sizes, "mean of a layer", latency_us)

    def _first_rows(self, medians: dict[Key, float]) -> Iterator[list[object]]:
        """By how much the first call of a product was longer than the later ones: those of other layers."""
        for (op, *sizes), later_us in medians.items():
            times = self._times[(op, *sizes)]
            if op == "gemm" and len(times) > 2:
                extra_us = max(1e6 * times[0] - later_us, 1.0)
                yield self._row("gemm_first", ["", *sizes, *[""] * 7], "torch", extra_us)

    def _row(
        self, op: str, sizes: list[object], kernel: str, latency_us: float, experts: Sequence[object] = ()
    ) -> list[object]:
        routed = experts or ["", "", ""]
        return ["cpu-core", "vllm", self._vllm, op, "bfloat16", *sizes, *routed, kernel, f"{latency_us:.2f}"]
