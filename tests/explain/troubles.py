"""Small deployments with one trouble each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import NamedTuple

__all__ = ["TROUBLES", "Trouble", "write_trouble"]


class Trouble(NamedTuple):
    """A scenario, and what must be said of it."""

    metric: str
    cause: str
    remedies: tuple[str, ...]
    """One of these settings must be among the few that help most."""
    scenario: str


def _lognormal(median: int, most: int, sigma: float = 0.5) -> str:
    return f"{{law: lognormal, median_tokens: {median}, sigma: {sigma}, max_tokens: {most}}}"


def _poisson(requests: int, rate_per_s: float, prompts: str, outputs: str) -> str:
    return f"""\
workload:
  num_requests: {requests}
  arrivals: {{process: poisson, rate_per_s: {rate_per_s}}}
  prompt_tokens: {prompts}
  output_tokens: {outputs}
"""


_H100 = "model: llama-3.1-8b\nhardware: {gpu: h100-sxm}\n"

TROUBLES = {
    "KV-starved": Trouble(
        "ttft", "kv", ("engine.kv_cache_dtype", "engine.quantization"),
        "model: llama-3.1-8b\nhardware: {gpu: rtx-4090}\n"
        "engine: {max_model_len: 4096, enable_prefix_caching: false}\n"
        + _poisson(600, 2.2, _lognormal(1500, 3000, 0.4), _lognormal(300, 800)),
    ),
    "slot-capped": Trouble(
        "ttft", "slots", ("engine.max_num_seqs",),
        _H100 + "engine: {max_model_len: 4096, max_num_seqs: 8}\n"
        + _poisson(600, 6, _lognormal(300, 2000), _lognormal(200, 800)),
    ),
    "prefill interference": Trouble(
        "tpot", "interference", ("engine.max_num_batched_tokens", "engine.long_prefill_token_threshold"),
        _H100 + "engine: {max_model_len: 16384, enable_prefix_caching: false}\n"
        + _poisson(600, 2.5, _lognormal(6000, 12000, 0.3), _lognormal(60, 200)),
    ),
    "host-bound": Trouble(
        "tpot", "host", ("engine.async_scheduling",),
        "model: llama-3.2-1b\nhardware: {gpu: h100-sxm}\n"
        'engine: {max_model_len: 4096, version: "0.6"}\n'
        + _poisson(600, 5, _lognormal(200, 1000), _lognormal(150, 600)),
    ),
    "bandwidth-bound": Trouble(
        "tpot", "bandwidth", ("engine.quantization",),
        "model: llama-3.1-8b\nhardware: {gpu: rtx-4090}\nengine: {max_model_len: 4096}\n"
        + _poisson(400, 0.5, _lognormal(100, 500), _lognormal(200, 600)),
    ),
    "link-bound": Trouble(
        "tpot", "link", ("hardware.gpu", "engine.tensor_parallel_size"),
        "model: llama-3.1-8b\nhardware: {gpu: a100-80gb-pcie}\n"
        "engine: {max_model_len: 8192, tensor_parallel_size: 8}\n"
        + _poisson(400, 2, _lognormal(200, 1000), _lognormal(200, 600)),
    ),
    "cold cache": Trouble(
        "ttft", "cold_cache", ("engine.enable_prefix_caching",),
        _H100 + "engine: {max_model_len: 16384, enable_prefix_caching: false}\n"
        + _poisson(600, 8, _lognormal(100, 500), _lognormal(50, 200))
        + "  shared_prefixes: {num_prefixes: 3, tokens: 3000}\n",
    ),
    "bursty": Trouble(
        "ttft", "bursty", ("engine.quantization", "hardware.gpu", "engine.tensor_parallel_size"),
        _H100 + "engine: {max_model_len: 4096, enable_prefix_caching: false}\n"
        + _poisson(800, 12, _lognormal(1000, 3000, 0.3), _lognormal(60, 200)).replace(
            "process: poisson,", "process: gamma, burstiness: 0.05,"
        ),
    ),
    "oversize prompts": Trouble(
        "tpot", "oversize", ("engine.max_num_batched_tokens", "engine.long_prefill_token_threshold"),
        _H100 + "engine: {max_model_len: 65536, enable_prefix_caching: false}\n"
        "workload: {trace: {file: oversize.csv, format: csv}}\n",
    ),
    "failed replica": Trouble(
        "ttft", "failure", ("hardware.replicas",),
        "model: llama-3.1-8b\nhardware: {gpu: h100-sxm, replicas: 2, router: least-outstanding}\n"
        "fleet: {failures: [{replica: 1, at_s: 20, down_s: 30}]}\n"
        "engine: {max_model_len: 4096, enable_prefix_caching: false}\n"
        + _poisson(1500, 20, _lognormal(1500, 3000, 0.3), _lognormal(100, 300)),
    ),
    "slow KV link": Trouble(
        "ttft", "kv_link", ("fleet.kv_link", "engine.kv_cache_dtype"),
        "model: llama-3.1-8b\nhardware: {gpu: h100-sxm}\n"
        "fleet:\n  kv_link: ethernet-100g\n"
        "  pools: {prompts: {serves: prefill, replicas: 4}, outputs: {serves: decode}}\n"
        "engine: {max_model_len: 16384, enable_prefix_caching: false, async_scheduling: false}\n"
        + _poisson(800, 11, _lognormal(6000, 12000, 0.3), _lognormal(60, 200)),
    ),
    "uneven router": Trouble(
        "ttft", "router", ("hardware.router",),
        "model: llama-3.1-8b\nhardware: {gpu: h100-sxm, replicas: 2, router: round-robin}\n"
        "engine: {max_model_len: 16384, enable_prefix_caching: false}\n"
        "workload: {trace: {file: alternating.csv, format: csv}}\n",
    ),
}  # fmt: skip


def write_trouble(name: str, folder: Path, seed: int = 1) -> Path:
    """The scenario's file, and the traces."""
    random = Random(seed)

    def short() -> int:
        return random.randint(100, 400)

    _write_trace(folder / "oversize.csv", 5, lambda i: 30_000 if i % 40 == 20 else short(), random)
    _write_trace(folder / "alternating.csv", 11, lambda i: 7000 if i % 2 else short(), random)
    file = folder / "trouble.yaml"
    file.write_text(f"name: {name}\nseed: {seed}\n{TROUBLES[name].scenario}")
    return file


def _write_trace(file: Path, rate_per_s: float, prompt_tokens: Callable[[int], int], random: Random) -> None:
    time_s, rows = 0.0, ["arrival_s,prompt_tokens,output_tokens"]
    for number in range(800):
        time_s += random.expovariate(rate_per_s)
        rows.append(f"{time_s:.4f},{prompt_tokens(number)},{random.randint(50, 150)}")
    file.write_text("\n".join(rows) + "\n")
