"""A small scenario that is right, for the tests that make it wrong."""

from __future__ import annotations

from pathlib import Path

SCENARIO = """\
name: example
model: llama-3.1-8b
hardware: {gpu: h100-sxm}
engine:
  block_size: 16
  max_num_seqs: 256
workload:
  arrivals: {process: gamma, rate_per_s: 10, burstiness: 0.5}
  prompt_tokens: {law: fixed, tokens: 100}
  output_tokens: {law: lognormal, median_tokens: 50, sigma: 1}
  num_requests: 20
slo: {ttft_p99_s: 0.5}
"""


def write(folder: Path, text: str, name: str = "scenario.yaml") -> Path:
    """The text as a file."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path
