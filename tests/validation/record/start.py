"""What a recording says about itself: where it ran, what was served, how much memory there was."""

from __future__ import annotations

import datetime
import json
import os
import platform
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from record.engine import Engine
from record.folder import Folder
from record.plans import Job
from record.shapes import model_yaml

__all__ = ["start_folder"]

_SCENARIO = """\
# yaml-language-server: $schema=../../../../scenarios/scenario.schema.json
name: {name}
description: {shape} as recorded; the recorded runs bring their own requests
model: {shape}
hardware: {{gpu: {gpu}}}
engine:
{engine}
workload:
  num_requests: 100
  arrivals: {{process: poisson, rate_per_s: {rate}}}
  prompt_tokens: {{law: fixed, tokens: 150}}
  output_tokens: {{law: fixed, tokens: 50}}
"""
_ENGINE = (
    "max_model_len", "max_num_seqs", "max_num_batched_tokens", "block_size", "enable_prefix_caching",
    "enable_chunked_prefill", "async_scheduling", "enforce_eager",
)  # fmt: skip


def start_folder(folder: Folder, job: Job, engine: Engine, gpu: str) -> Job:
    """Write the files that stand beside the runs, unless they are there.

    Returns the job, its overrides with all in which this engine differs from the one that wrote the scenario.
    """
    facts = engine.facts()
    version = ".".join(str(facts["vllm"]).split(".")[:2])
    folder.write_json("meta.json", _meta(job, facts, gpu))
    folder.write_json("memory.json", engine.memory())
    folder.write_once(f"hardware/models/{job.shape}.yaml", model_yaml(job.shape))
    lines = [f'  version: "{version}"']
    lines += [f"  {name}: {str(facts[name]).lower()}" for name in _ENGINE]
    if facts.get("runner") == "CPUModelRunner":
        lines.append("  step_time: {host: v1-cpu}")
    if "kv_cache_memory_bytes" in job.settings:
        lines.append(f"  kv_cache_memory_bytes: {job.settings['kv_cache_memory_bytes']}")
    else:
        lines.append(f"  num_gpu_blocks_override: {facts['num_gpu_blocks']} # recorded")
    text = _SCENARIO.format(name=folder.path.name, shape=job.shape, gpu=gpu, engine="\n".join(lines), rate=2)
    folder.write_once("scenario.yaml", text)
    return replace(job, overrides=(*_differences(folder, facts), *job.overrides))


def _differences(folder: Folder, facts: dict[str, Any]) -> Iterator[str]:
    first = json.loads((folder.path / "meta.json").read_text(encoding="utf-8"))["machine"]
    for name in (*_ENGINE, "num_gpu_blocks"):
        if facts[name] != first[name]:
            setting = "num_gpu_blocks_override" if name == "num_gpu_blocks" else name
            yield f"engine.{setting}={str(facts[name]).lower()}"


def _meta(job: Job, facts: dict[str, Any], gpu: str) -> dict[str, Any]:
    return {
        "title": f"{job.shape}, random weights, on {Path(gpu).stem}",
        "engine": f"vLLM {facts['vllm']}",
        "recorded": datetime.date.today().isoformat(),
        "source": "recorded for servesim with tests/validation/record",
        "license": "Apache-2.0",
        "calibration": "none",
        "notes": "",
        "machine": {**_machine(), "clock": job.clock, **facts},
    }


def _machine() -> dict[str, Any]:
    """The processor, and how busy the machine was; of single runs runs.csv says that."""
    name = platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {
        "processor": name,
        "cores": os.cpu_count(),
        "cores_used": len(os.sched_getaffinity(0)),
        "threads": int(os.environ.get("OMP_NUM_THREADS", "0")),
        "python": platform.python_version(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }
