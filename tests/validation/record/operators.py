"""Times of single operators of a model on a CPU, from the modules of a running engine.

On a CPU a module's call is its time, so every product and every attention can be timed where it runs. The
rows have the columns of hardware/measurements; `servesim fit` makes a hardware file's efficiency of them.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from record.folder import KERNEL_COLUMNS

__all__ = ["OperatorTimes", "kernel_row"]

Key = tuple[Any, ...]
_KINDS = {"RMSNorm": "norm", "RotaryEmbedding": "rotation", "SiluAndMul": "activation"}
"""Kernels that only move data, and what the law calls them."""
_PACKED_BYTES = 2**20
"""Matrices up to this size run on other kernels (vLLM 0.32, layers/utils.py)."""
_TIMED = ("Linear", "LogitsProcessor", "MoERunner", *_KINDS)
_MOVED = {"norm": 4, "head_norm": 2, "rotation": 2, "activation": 1.5, "sampling": 4, "layer": 2}
"""Values of 2 bytes read and written per value of the input: a norm also adds the residual, the activation
halves, sampling reads logits of 4 bytes twice; what lies between operators is taken as one more of them."""


class OperatorTimes:
    """While open, collects how long every module of interest takes."""

    def __init__(self, model: Any, sampler: Any, vllm: str) -> None:
        self._model, self._sampler, self._vllm = model, sampler, vllm
        self._layers, self._hidden = model.config.num_hidden_layers, model.config.hidden_size
        self._hooks: list[Any] = []
        self._times: defaultdict[Key, list[float]] = defaultdict(list)
        self._new: defaultdict[Key, list[float]] = defaultdict(list)
        self._open: list[tuple[float, list[float]]] = []
        self._inside_s = self._hook_s = 0.0
        self.batch: tuple[int, int, bool] = (0, 0, True)
        self.on, self.is_new = True, False

    def __enter__(self) -> OperatorTimes:
        for module in (self._sampler, *self._model.modules()):
            kind = type(module).__name__
            whole = module is self._model or module is self._sampler
            if whole or kind.endswith(_TIMED) or kind == "Attention":
                self._watch(module)
        return self

    def _watch(self, module: Any) -> None:
        self._hooks.append(module.register_forward_pre_hook(self._before))
        self._hooks.append(module.register_forward_hook(self._after, with_kwargs=True))

    def correct(self, watched_s: float, plain_s: float) -> None:
        """The same step took so long watched and unwatched: the difference is in the callers' times."""
        self._times.clear()
        self._new.clear()
        self._hook_s = max(0.0, watched_s - plain_s) / max(1, len(self._hooks) // 2)

    def __exit__(self, *exception: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _before(self, module: Any, inputs: Any) -> None:
        self._open.append((time.thread_time(), []))

    def _after(self, module: Any, inputs: Any, named: dict[str, Any], output: Any) -> None:
        """A router may be called by the experts that it chooses; its time is its own."""
        begin_s, within = self._open.pop()
        seconds = time.thread_time() - begin_s
        inputs = inputs or tuple(named.values())
        if self._open:
            self._open[-1][1].append(seconds)
        else:
            self._inside_s += seconds
        if self.on:
            times = self._new if self.is_new else self._times
            times[self._key(module, inputs)].append(seconds - sum(within) - self._hook_s * len(within))

    def stepped(self, seconds: float) -> None:
        """A step of decodes is over: what neither model nor sampler took is the host's."""
        host_s, self._inside_s = seconds - self._inside_s, 0.0
        if self.on:
            self._times["host", self.batch[0]].append(host_s)

    def _key(self, module: Any, inputs: Any) -> Key:
        kind = type(module).__name__
        batch, context, decoding = self.batch
        if module is self._model:
            return "elementwise", "layer", batch if decoding else context, self._hidden
        if module is self._sampler:
            return "elementwise", "sampling", *inputs[0].shape
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
        name = _KINDS[next(each for each in _KINDS if kind.endswith(each))]
        values = inputs[1:3] if name == "rotation" else inputs[:1]  # positions, query, key
        width = values[0].shape[-1]
        if name == "norm" and values[0].dim() > 2:  # of every head
            return "elementwise", "head_norm", values[0].numel() // width, width
        return "elementwise", name, values[0].shape[0], sum(each.shape[-1] for each in values)

    def rows(self) -> Iterator[list[object]]:
        """The median time of every operator and size, as rows of kernels.csv."""
        medians = {key: 1e6 * statistics.median(times) for key, times in self._times.items()}
        yield from self._new_rows(medians)
        for (op, *sizes), latency_us in medians.items():
            if op == "gemm":
                named = dict(zip("mnk", sizes, strict=True))
                op, kernel = ("gemm_packed", "sgl") if _is_packed(*sizes[1:]) else ("gemm", "onednn")
                yield kernel_row(self._vllm, op, latency_us, kernel=kernel, **named)
            elif op == "moe":
                # Random weights route at random: the recorder looked, and the law's expectation was met.
                named = dict(zip(("m", "n", "k", "num_experts", "experts_per_token"), sizes, strict=True))
                yield kernel_row(
                    self._vllm, op, latency_us, kernel="cpu_fused_moe", routing="uniform", **named
                )
            elif op == "elementwise":
                kind, rows, width = sizes
                moved = round(rows * width * _MOVED[kind])
                each_us = latency_us / (self._layers if kind == "layer" else 1)
                yield kernel_row(self._vllm, op, each_us, kernel=kind, m=rows, n=width, elements=moved)
            elif op == "host":
                yield kernel_row(self._vllm, op, latency_us, kernel="engine", batch=sizes[0])
            else:
                named = dict(zip(("batch", "seq", "heads", "kv_heads", "head_dim"), sizes, strict=True))
                yield kernel_row(self._vllm, op, latency_us, kernel="cpu_attn", kv_dtype="bfloat16", **named)

    def _new_rows(self, medians: dict[Key, float]) -> Iterator[list[object]]:
        """By how much the first product with so many rows was longer than those of later steps."""
        for (op, *sizes), (first_s, *others_s) in self._new.items():
            if op == "gemm" and others_s and not _is_packed(*sizes[1:]):
                extra_us = max(1e6 * first_s - medians[op, *sizes], 1.0)
                named = dict(zip("mnk", sizes, strict=True))
                yield kernel_row(self._vllm, "gemm_first", extra_us, kernel="onednn", **named)


def _is_packed(n: int, k: int) -> bool:
    return 2 * n * k <= _PACKED_BYTES


def kernel_row(vllm: str, op: str, latency_us: float, **named: object) -> list[object]:
    """A row of kernels.csv."""
    cells: dict[str, object] = {
        "gpu": "cpu-core", "backend": "vllm", "backend_version": vllm, "op": op,
        "dtype": "bfloat16", "latency_us": f"{latency_us:.2f}", **named,
    }  # fmt: skip
    return [cells.get(column, "") for column in KERNEL_COLUMNS]
