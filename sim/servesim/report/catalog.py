"""What `servesim list` and `servesim show` print: the catalog of GPUs, links, models and scenarios."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from servesim.config.files import find_data, list_data
from servesim.config.link import load_link
from servesim.config.load import load_scenario, read_yaml
from servesim.config.profiles import GpuProfile, ModelProfile, load_gpu, load_model
from servesim.errors import ConfigError, Problem, did_you_mean
from servesim.units import GB, GIB, KIB, TB

__all__ = ["list_json", "list_text", "show_json", "show_text"]

_KINDS = ("gpus", "links", "models", "scenarios")
_WIDEST = 48  # a longer cell pushes the rest of its own line only


def list_text(kind: str) -> str:
    """One line per entry under a head line, columns aligned."""
    rows = _rows(kind)
    return _table([list(rows[0]), *([_cell(value) for value in row.values()] for row in rows)])


def list_json(kind: str) -> str:
    """The entries as a JSON list of objects."""
    return json.dumps(_rows(kind), indent=2) + "\n"


def show_text(name: str) -> str:
    """Everything about one entry, with the source of each value where there is one."""
    title, facts = _facts(name)
    rows = [[label, value, source] for label, value, source in facts]
    return f"{title}\n" + _table(rows, indent="  ")


def show_json(name: str) -> str:
    """The entry's profile or scenario as it is used, in SI units."""
    kind = _kind_of(name)
    if kind == "links":
        return json.dumps(asdict(load_link(find_data("links", name))), indent=2) + "\n"
    record = {"gpus": load_gpu, "models": load_model}[kind](name) if kind != "scenarios" else None
    plain = (record or load_scenario(name).scenario).model_dump(mode="json")
    if isinstance(record, ModelProfile):
        plain["num_parameters"] = record.num_parameters
        plain["kv_bytes_per_token"] = record.kv_bytes_per_token()
    return json.dumps(plain, indent=2) + "\n"


def _rows(kind: str) -> list[dict[str, Any]]:
    if kind not in _KINDS:
        raise ConfigError(Problem("no such list", got=f'"{kind}"', hint=did_you_mean(kind, _KINDS)))
    row = {"gpus": _gpu_row, "links": _link_row, "models": _model_row, "scenarios": _scenario_row}[kind]
    return [row(name) for name in list_data(kind)]


def _gpu_row(name: str) -> dict[str, Any]:
    gpu = load_gpu(name)
    return {
        "name": name,
        "memory_gib": round(gpu.memory_bytes / GIB, 1),
        "hbm_tb_per_s": round(gpu.hbm_bandwidth_bytes_per_s / TB, 2),
        "bf16_tflops": round(gpu.peak_flops_per_s["bf16"] / TB),
        "fp8_tflops": round(gpu.peak_flops_per_s["fp8"] / TB) if "fp8" in gpu.peak_flops_per_s else None,
        "sms": gpu.sm_count,
        "usd_per_hour": gpu.price_per_hour_usd,
        "label": gpu.label,
    }


def _link_row(name: str) -> dict[str, Any]:
    link = load_link(find_data("links", name))
    return {
        "name": name,
        "gb_per_s": link.bandwidth_bytes_per_s / GB,
        "latency_us": link.latency_s * 1e6,
        "per": "gpu" if link.per_gpu else "replica",
        "label": link.label,
    }


def _model_row(name: str) -> dict[str, Any]:
    model = load_model(name)
    return {
        "name": name,
        "params_billion": round(model.num_parameters / GB, 3),
        "bf16_gib": round(2 * model.num_parameters / GIB, 1),
        "kv_kib_per_token": round(model.kv_bytes_per_token() / KIB, 3),
        "layers": model.num_layers,
        "attention": _attention(model),
        "max_tokens": model.max_position_embeddings,
    }


def _scenario_row(name: str) -> dict[str, Any]:
    scenario = load_scenario(name).scenario
    return {
        "name": name,
        "model": scenario.model,
        "gpu": scenario.hardware.gpu,
        "description": scenario.description,
    }


def _attention(model: ModelProfile) -> str:
    if model.mla is not None:
        return "MLA"
    heads, groups = model.num_attention_heads, model.num_kv_heads
    kind = "MHA" if heads == groups else "MQA" if groups == 1 else f"GQA {heads}/{groups}"
    windows = [window for window in model.windows if window is not None]
    return f"{kind}, window {windows[0]} on {len(windows)}/{model.num_layers}" if windows else kind


def _kind_of(name: str) -> str:
    for kind in _KINDS:
        if name in list_data(kind):
            return kind
    if Path(name).is_file():
        keys = read_yaml(Path(name)).keys()
        marks = {"memory_mib": "gpus", "num_layers": "models", "latency_us": "links"}
        return next((kind for key, kind in marks.items() if key in keys), "scenarios")
    known = [each for kind in _KINDS for each in list_data(kind)]
    problem = Problem("no such GPU, link, model or scenario", got=f'"{name}"', hint=did_you_mean(name, known))
    raise ConfigError(problem)


def _facts(name: str) -> tuple[str, Sequence[tuple[str, str, str]]]:
    kind = _kind_of(name)
    if kind == "gpus":
        gpu = load_gpu(name)
        return gpu.label, _gpu_facts(gpu)
    if kind == "links":
        tree = read_yaml(find_data("links", name))
        facts = [(key, value, "") for key, value in tree.items() if not isinstance(value, dict)]
        facts += [(key, _cell(of["value"]), of["source"]) for key, of in tree.items() if isinstance(of, dict)]
        return load_link(find_data("links", name)).label, facts
    if kind == "models":
        model = load_model(name)
        return model.label or model.name, _model_facts(model)
    file = find_data("scenarios", name)
    scenario = load_scenario(name).scenario
    values = _leaves(scenario.model_dump(mode="json", exclude_defaults=True))
    return f"{scenario.name} ({file.name}); values that differ from the defaults", values


def _gpu_facts(gpu: GpuProfile) -> list[tuple[str, str, str]]:
    plain = gpu.model_dump(mode="json", exclude={"sources", "name", "label"})
    return [
        (path, value, gpu.sources.get(path, gpu.sources.get(path.split(".")[0], "")))
        for path, value, _ in _leaves(plain)
    ]


def _model_facts(model: ModelProfile) -> list[tuple[str, str, str]]:
    computed = [
        ("parameters", f"{model.num_parameters:,}", "computed from the configuration"),
        ("bf16 weights", f"{2 * model.num_parameters / GIB:.2f} GiB", "computed"),
        (
            "KV per token (bf16)",
            f"{model.kv_bytes_per_token():,.0f} B",
            "computed; whole sequence, all layers",
        ),
        ("attention", _attention(model), ""),
    ]
    return [*_leaves(model.model_dump(mode="json", exclude_none=True, exclude={"name"})), *computed]


def _leaves(tree: dict[str, Any], path: str = "") -> list[tuple[str, str, str]]:
    found: list[tuple[str, str, str]] = []
    for key, value in tree.items():
        here = f"{path}.{key}" if path else str(key)
        if isinstance(value, dict):
            found += _leaves(value, here)
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for number, item in enumerate(value):
                found += _leaves(item, f"{here}[{number}]")
        elif value is not None:
            found.append((here, _cell(value), ""))
    return found


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _table(rows: list[list[str]], indent: str = "") -> str:
    widths = [max(min(len(row[i]), _WIDEST) for row in rows) for i in range(len(rows[0]))]
    lines = (indent + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows)
    return "".join(line.rstrip() + "\n" for line in lines)
