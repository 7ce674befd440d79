"""What `servesim fit` prints and writes: errors, rows set aside, and the efficiency block of a GPU's file."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from servesim.analysis.kernel_fit import KernelFit
from servesim.analysis.kernel_table import RULES
from servesim.errors import ConfigError, OutputError, Problem

__all__ = ["block_text", "fit_json", "fit_text", "write_block"]

_SHAPE = (
    "num_gpus",
    "m",
    "n",
    "k",
    "num_experts",
    "experts_per_token",
    "batch",
    "seq",
    "heads",
    "kv_heads",
    "elements",
)
_LONGEST_LIST = 12  # rows of one rule that are listed; --json lists all


def fit_text(fit: KernelFit) -> str:
    """A table of errors, the rows that were set aside, and the block."""
    lines = [f"{fit.gpu}: |ln(law / measured)| in percent", ""]
    lines.append(f"{'operation':24}{'mean':>7}{'p90':>7}{'rows':>7}{'aside':>7}{'mean with those aside':>23}")
    for name, error in fit.efficiency.errors.items():
        aside = error.mean_with_dropped_percent
        lines.append(
            f"{name:24}{error.mean_percent:7.1f}{error.p90_percent:7.1f}{error.rows:7}{error.dropped:7}"
            + ("" if aside is None else f"{aside:23.1f}")
        )
    for rule, meaning in RULES.items():
        rows = _dropped(fit, rule)
        if rows:
            lines += ["", *textwrap.wrap(f"{len(rows)} rows set aside: {meaning}", 110)]
            lines += [f"  {_words(row)}" for row in rows[:_LONGEST_LIST]]
            if len(rows) > _LONGEST_LIST:
                lines.append(f"  and {len(rows) - _LONGEST_LIST} more (--json lists them)")
    return "\n".join([*lines, "", block_text(fit)])


def fit_json(fit: KernelFit) -> str:
    """Coefficients in the file's units, errors, and every row that was set aside."""
    rows = [row for rule in RULES for row in _dropped(fit, rule)]
    return json.dumps({"gpu": fit.gpu, **fit.efficiency.model_dump(), "set_aside": rows}, indent=2) + "\n"


def block_text(fit: KernelFit) -> str:
    """The ``efficiency`` section of a GPU's file."""
    block = fit.efficiency.model_dump(exclude_none=True)
    lines = ["efficiency:", "  measured:", "    provenance: >-"]
    wrapped = textwrap.wrap(block["provenance"], 110, break_long_words=False, break_on_hyphens=False)
    lines += [f"      {line}" for line in wrapped]
    comments = {
        "experts": " # a layer's routed experts; the key is the format of their weights",
        "decode_attention": " # head_dim 128; the key is the type of the KV cache",
    }
    for name in ("gemm", "experts", "decode_attention", "prefill_attention", "all_reduce"):
        if not block[name]:
            continue
        lines.append(f"    {name}:{comments.get(name, '')}")
        lines += [f"      {key}: {_flow(values)}" for key, values in block[name].items()]
    if elementwise := block["elementwise"]:
        lines.append("    elementwise: # kernels that only move data; layer: what lies between all of them")
        lines += [f"      {kind}: {_flow(values)}" for kind, values in elementwise.items()]
    else:
        lines.append(f"    elementwise_launch_us: {block['elementwise_launch_us']:g} # estimate")
    if first_call := block.get("first_call"):
        lines.append(f"    first_call: {_flow(first_call)} # of a product with a new count of rows, on top")
    lines.append("    errors: # percent of |ln(law / measured)|; see docs/model.md")
    lines += [f"      {key}: {_flow(values)}" for key, values in block["errors"].items()]
    return "\n".join(lines) + "\n"


def write_block(fit: KernelFit, path: Path) -> None:
    """Put the block into a GPU's file in place of its efficiency section, which must be its last one.

    Raises ConfigError when it is not, OutputError when the file cannot be written.
    """
    text = path.read_text(encoding="utf-8")
    head, found, tail = text.partition("\nefficiency:")
    if not found or re.search(r"^\S", tail.split("\n", 1)[-1], re.MULTILINE):
        raise ConfigError(
            Problem(
                "efficiency must be the last section of the file",
                str(path),
                next_step="move it there, or paste the printed block yourself",
            )
        )
    try:
        path.write_text(f"{head}\n{block_text(fit)}", encoding="utf-8", newline="\n")
    except OSError as error:
        raise OutputError(
            Problem("the file cannot be written", str(path), got=error.strerror or "")
        ) from error


def _flow(values: Mapping[str, Any]) -> str:
    return "{" + ", ".join(f"{key}: {_number(value)}" for key, value in values.items()) + "}"


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.10g}"


def _dropped(fit: KernelFit, rule: str) -> list[dict[str, Any]]:
    rows = fit.dropped[fit.dropped["dropped"] == rule]
    return [
        {
            "rule": rule,
            "op": row["op"],
            "type": row["kind"],
            **{name: int(row[name]) for name in _SHAPE if row[name] == row[name]},
            "latency_us": row["latency_us"],
        }
        for row in rows.to_dict("records")
    ]


def _words(row: Mapping[str, Any]) -> str:
    sizes = " ".join(f"{name}={row[name]}" for name in _SHAPE if name in row)
    return f"{row['op']} {row['type']} {sizes}: {row['latency_us']:g} us"
