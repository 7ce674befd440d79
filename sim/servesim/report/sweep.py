"""A sweep as text, JSON, table and page: the points, their figures, and which of them are told apart."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from servesim.analysis.intervals import LEVEL, paired_interval
from servesim.analysis.quantities import QUANTITIES, Quantity
from servesim.analysis.run_folder import json_text
from servesim.errors import ConfigError, Problem, did_you_mean
from servesim.report.html import study_page
from servesim.report.sections import Table
from servesim.report.words import figure_text, percent

__all__ = ["check_figures", "sweep_html", "sweep_json", "sweep_rows", "sweep_text"]

Points = Sequence[Mapping[str, Any]]
_USUAL = (
    "output_throughput",
    "median_ttft_ms",
    "p99_ttft_ms",
    "p99_tpot_ms",
    "usd_per_million_output_tokens",
)
_DIGITS = 6  # of the page's numbers


def check_figures(keys: Sequence[str]) -> None:
    """Raise ConfigError for a figure that does not exist."""
    for key in keys:
        if key not in QUANTITIES:
            hint = did_you_mean(key, QUANTITIES)
            raise ConfigError(Problem("no such figure", "--figure", got=key, hint=hint))


def sweep_rows(manifest: Mapping[str, Any], points: Points) -> list[dict[str, Any]]:
    """A row per point: what varies, every figure, the ends of its interval, and why there is no result."""
    keys = _known(points)
    rows = []
    for point in points:
        row = {path: point["values"][path] for path in manifest["vary"]}
        row |= {key: _value(point, key) for key in keys}
        if manifest["replications"] > 1:
            for key in keys:
                low, high = point.get("intervals", {}).get(key, (math.nan, math.nan))
                row |= {f"{key}_low": low, f"{key}_high": high}
        rows.append({**row, "refused": point.get("error", "")})
    return rows


def sweep_text(manifest: Mapping[str, Any], points: Points, figures: Sequence[str] = ()) -> str:
    """A line per point; with replications also which points cannot be told from the best one."""
    check_figures(figures)
    known = _known(points)
    chosen = [QUANTITIES[key] for key in figures or _USUAL if figures or key in known]
    replicated = manifest["replications"] > 1
    head = [*_short_paths(manifest["vary"]), *(one.label for one in chosen)]
    rows = [head, *(_row(manifest, point, chosen, replicated) for point in points)]
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(len(head))]
    about = f"{manifest['scenario']}: {len(points)} points"
    if replicated:
        about += f", {manifest['replications']} replications each, {percent(LEVEL)} intervals"
    lines = [about, *("  ".join(map(str.rjust, row, widths)).rstrip() for row in rows)]
    refused = [point for point in points if "error" in point]
    if refused:
        lines.append(f"{len(refused)} points cannot be simulated; the first: {refused[0]['error']}")
    if replicated:
        lines += (line for one in chosen if one.better for line in _ranking(manifest, points, one))
    return "\n".join(lines) + "\n"


def sweep_json(manifest: Mapping[str, Any], points: Points) -> str:
    """The manifest and every point."""
    return json_text({**manifest, "results": list(points)})


def sweep_html(manifest: Mapping[str, Any], points: Points) -> str:
    """The page: sliders, a chart along one value, a map over two, the chosen point, the whole table."""
    keys = _known(points)
    chosen = [QUANTITIES[key] for key in _USUAL if key in keys]
    replicated = manifest["replications"] > 1
    paths = list(manifest["vary"])
    rows = tuple(tuple(_row(manifest, point, chosen, replicated)) for point in points)
    data = {
        "axes": [{"path": path, "values": _distinct(points, path)} for path in paths],
        "latin": manifest["latin"] is not None,
        "figures": [
            {"key": key, "label": QUANTITIES[key].label, "group": QUANTITIES[key].group} for key in keys
        ],
        "points": [_brief(point, paths, keys) for point in points],
    }
    start = _USUAL[0] if _USUAL[0] in keys else next(iter(keys), "")
    return study_page(
        "sweep.html.j2",
        data | {"start": start},
        title=f"{manifest['scenario']}: sweep",
        subtitle=_subtitle(manifest, points),
        axes=paths,
        latin=manifest["latin"] is not None,
        points_table=Table("All points", (*paths, *(one.label for one in chosen)), rows),
        rankings=[
            line for one in chosen if replicated and one.better for line in _ranking(manifest, points, one)
        ],
        provenance=Table(
            "Provenance",
            ("What", "Value"),
            (
                ("servesim", manifest["servesim"]),
                ("Digest of all scenarios and files", manifest["digest"]),
                ("Replications of each point", str(manifest["replications"])),
            ),
            "words",
        ),
    )


def _subtitle(manifest: Mapping[str, Any], points: Points) -> str:
    kind = "points of a Latin hypercube" if manifest["latin"] else "points of a grid"
    return f"{len(points)} {kind} over {', '.join(manifest['vary'])}"


def _short_paths(paths: Iterable[str]) -> list[str]:
    """The last words of paths where these tell them apart, else the whole paths."""
    full = list(paths)
    short = [path.rsplit(".", 1)[-1] for path in full]
    return short if len(set(short)) == len(short) else full


def _known(points: Points) -> list[str]:
    """Keys of the figures that some point has."""
    return [
        key for key in QUANTITIES if any(point.get("figures", {}).get(key) is not None for point in points)
    ]


def _value(point: Mapping[str, Any], key: str) -> float:
    value = point.get("figures", {}).get(key)
    return math.nan if value is None else float(value)


def _distinct(points: Points, path: str) -> list[str]:
    return list(dict.fromkeys(point["values"][path] for point in points))


def _row(
    manifest: Mapping[str, Any], point: Mapping[str, Any], chosen: Sequence[Quantity], replicated: bool
) -> list[str]:
    cells = [point["values"][path] for path in manifest["vary"]]
    if "error" in point:
        return [*cells, *["refused"] * len(chosen)]
    for one in chosen:
        text = figure_text(_value(point, one.key))
        if replicated and one.key in point["intervals"]:
            low, high = point["intervals"][one.key]
            text += f" +- {figure_text((high - low) / 2)}"
        cells.append(text)
    return cells


def _ranking(manifest: Mapping[str, Any], points: Points, one: Quantity) -> Iterator[str]:
    """The best point of a figure and all that cannot be told from it.

    Paired differences over common random numbers; with many points each test is the stricter (Bonferroni).
    """
    known = [point for point in points if one.key in point.get("replications", {})]
    if len(known) < 2:
        return
    samples = [np.array(point["replications"][one.key]) for point in known]
    best = max(range(len(known)), key=lambda i: one.better * float(samples[i].mean()))
    alike = [
        i
        for i, sample in enumerate(samples)
        if i != best and paired_interval(samples[best], sample, len(known) - 1).is_zero_inside
    ]
    yield f"Best {one.label}: {_named(manifest, known[best])}"
    if alike:
        names = "; ".join(_named(manifest, known[i]) for i in alike[:5])
        more = f"; and {len(alike) - 5} more" if len(alike) > 5 else ""
        yield f"  not told apart from it: {names}{more}"


def _named(manifest: Mapping[str, Any], point: Mapping[str, Any]) -> str:
    paths = manifest["vary"]
    return ", ".join(
        f"{short}={point['values'][path]}" for short, path in zip(_short_paths(paths), paths, strict=True)
    )


def _brief(point: Mapping[str, Any], paths: Sequence[str], keys: Sequence[str]) -> dict[str, Any]:
    """A point as the page needs it: lists in the order of the axes and figures."""
    brief: dict[str, Any] = {"values": [point["values"][path] for path in paths]}
    if "error" in point:
        return brief | {"error": point["error"]}
    intervals = point.get("intervals", {})
    brief["figures"] = [_short(point["figures"].get(key)) for key in keys]
    if intervals:
        brief["half"] = [
            _short((intervals[key][1] - intervals[key][0]) / 2) if key in intervals else None for key in keys
        ]
        brief["refused"] = [point["refused"].get(key, "") for key in keys]
    return brief


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.{_DIGITS}g}")
