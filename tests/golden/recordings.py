"""The recorded workloads and the steps that vLLM made of them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

__all__ = ["CASES", "TRACES", "recorded_steps", "settings_of"]

TRACES = Path(__file__).parent / "vllm_traces"
CASES = sorted(folder.name for folder in TRACES.iterdir() if folder.is_dir())


def settings_of(case: str) -> dict[str, Any]:
    """The scheduler's settings in a recorded workload."""
    settings: dict[str, Any] = json.loads((TRACES / case / "settings.json").read_text())
    return settings


def recorded_steps(case: str, version: str) -> list[dict[str, Any]]:
    """The steps vLLM made, without the empty ones after the last finish."""
    with gzip.open(TRACES / case / f"trace-{version}.jsonl.gz", "rt") as lines:
        steps = [json.loads(line) for line in lines]
    return [s for s in steps if "sched" in s and (s["total_tokens"] or s["preempted"])]
