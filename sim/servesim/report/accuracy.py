"""The accuracy page: how far the simulation is from recorded servers, the worst first, nothing left out."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from servesim.analysis.coverage import Cell, Gap, cells_of, gaps_of, sorted_cells
from servesim.analysis.figures import METRICS
from servesim.analysis.validate import FITTED_TO, Finding, Validation
from servesim.report.accuracy_steps import RUNS, SCHEDULES, STEPS, runs_table, schedules_table, steps_table
from servesim.report.html import plain_page
from servesim.report.sections import Table
from servesim.report.shown import figure_value, signed_error, size_of_error

__all__ = ["accuracy_html", "accuracy_json", "accuracy_markdown", "accuracy_text", "residuals_csv"]

_EXPLAINED = (
    "Every error is ln(simulated / real): +0.100 reads as ten percent too much, -0.100 as ten percent too "
    "little, +0.693 is twice and -0.693 half. "
    "Bias is the mean of the signed errors, median and p90 are of their sizes. An interval is a 95 % "
    "bootstrap: over the recorded runs of a cell (of the median size), or over the requests of a single run "
    "(of the signed error). Load is told from the simulation: latency-bound, at most four requests at once; "
    "saturated, requests waited for more than half of the time; KV-limited, requests were preempted or "
    "waited for a full pool; middle, the rest. Calibrated rows are judged on what calibration did not see."
)
_WORST = 12


@dataclass(frozen=True, slots=True)
class Section:
    """A heading, a paragraph, a table."""

    title: str
    text: str
    table: Table
    text_columns: int = 4
    """Columns of words, to the left of those of numbers."""


def accuracy_markdown(validations: Sequence[Validation]) -> str:
    """The page as Markdown."""
    lines = [
        "# Accuracy",
        "",
        "Written by `servesim validate`; a test fails when it is stale.",
        "",
        _EXPLAINED,
    ]
    for section in _sections(validations):
        head = section.table.head
        lines += ["", f"## {section.title}", "", section.text, ""]
        lines += [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
        lines += [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in section.table.rows]
    return "\n".join(lines) + "\n"


def residuals_csv(validations: Sequence[Validation]) -> str:
    """The errors of every figure of a run, a row each: what `servesim sensitivity` takes for model error."""
    head = "recording,row,gpu,load,figure,calibrated,error"
    rows = (
        f"{one.source},{one.row},{one.gpu},{one.regime},{one.metric},{_yes(one.calibrated)},{one.error:.4f}"
        for validation in validations
        for one in _counted(validation)
        if one.regime != "memory"
    )
    return "\n".join([head, *rows]) + "\n"


def accuracy_html(validations: Sequence[Validation]) -> str:
    """The page as one offline HTML file without scripts."""
    return plain_page(
        "accuracy.html.j2", title="Accuracy", explained=_EXPLAINED, sections=_sections(validations)
    )


def accuracy_text(validations: Sequence[Validation]) -> str:
    """The short table by source, then the worst cells and the number of gaps, as plain text."""
    findings = _findings(validations)
    summary = _summary(validations)
    worst = sorted_cells(cells_of(findings))[:_WORST]
    rows = [_cell_row(cell) for cell in worst]
    gaps = gaps_of(findings)
    refused = sum(len(one.refusals) for one in validations)
    lines = [*_aligned(summary.table), "", f"The {len(rows)} worst cells of {len(cells_of(findings))}:", ""]
    lines += _aligned(Table("", _CELL_HEAD, tuple(rows)))
    lines += ["", f"Not validated, no real run: {len(gaps)} GPUs and features; refused runs: {refused}."]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def accuracy_json(validations: Sequence[Validation]) -> str:
    """Every finding, refusal and gap as one JSON object."""
    findings = _findings(validations)
    plain = {
        "findings": [{**asdict(one), "error": one.error} for one in findings],
        "steps": [asdict(each) for one in validations if one.stepwise for each in one.stepwise.steps],
        "schedules": [asdict(each) for one in validations if one.stepwise for each in one.stepwise.schedules],
        "refusals": [asdict(refusal) for one in validations for refusal in one.refusals],
        "not_validated": [asdict(gap) for gap in gaps_of(findings)],
    }
    return json.dumps(_without_nan(plain), indent=2) + "\n"


def _sections(validations: Sequence[Validation]) -> list[Section]:
    findings = _findings(validations)
    return [
        _summary(validations),
        *_single_runs(validations),
        *_with_steps(validations),
        _all_cells(findings),
        _refusals(validations),
        _recordings(validations),
    ]


def _findings(validations: Sequence[Validation]) -> list[Finding]:
    return [finding for one in validations for finding in one.findings]


_HEADLINES = {
    "TTFT mean": ("mean_ttft_ms",),
    "TPOT mean": ("mean_tpot_ms",),
    "E2EL mean": ("mean_e2el_ms",),
    "E2EL p99": ("p99_e2el_ms",),
    "Throughput": ("output_throughput", "duration"),
    "KV pool": ("kv_cache_gib", "num_gpu_blocks"),
}
"""Columns of the first table: the first of these figures that a recording has."""
_SAME_RUNS = "no, same runs"


def _summary(validations: Sequence[Validation]) -> Section:
    """Errors over all loads by source, GPU and calibration, figures beside one another, the worst first."""
    rows = []
    for one in validations:
        fitted = {(finding.gpu, finding.row) for finding in _counted(one) if finding.calibrated}
        errors: dict[tuple[str, str], dict[str, list[float]]] = {}
        for finding in _counted(one):
            is_pair = not finding.calibrated and (finding.gpu, finding.row) in fitted
            for kind in (_yes(finding.calibrated), _SAME_RUNS)[: 1 + is_pair]:
                figures = errors.setdefault((finding.gpu, kind), {})
                figures.setdefault(finding.metric, []).append(abs(finding.error))
        for (gpu, kind), figures in errors.items():
            if kind == _SAME_RUNS and all(errors[gpu, "no"][each] == figures[each] for each in figures):
                continue  # they are all there is
            told = [
                next((figures[name] for name in names if name in figures), [])
                for names in _HEADLINES.values()
            ]
            if any(told):
                runs = str(max(map(len, told)))
                worst = max(float(np.median(sizes)) for sizes in told if sizes)
                rows.append((worst, (one.folder.name, gpu, kind, runs, *map(_median_and_p90, told))))
    worst_first = tuple(row for _, row in sorted(rows, key=lambda one: -one[0]))
    head = ("Recording", "GPU", "Calibrated", "Runs", *_HEADLINES)
    return Section(
        "In short",
        "All loads together: the median size of the error, and p90 of several runs. Calibrated figures, and "
        "the plain ones of single runs, are of the second half of the requests; those of several runs are of "
        "runs that no calibration was fitted to. Where the plain figures are of more runs than these, "
        f'"{_SAME_RUNS}" is of the very ones that the calibrated figures are of. Throughput is of output '
        "tokens, or the duration of a batch where nothing else was recorded. "
        "Below: every cell by load, the worst first, with its sign and interval.",
        Table("In short", head, worst_first),
        text_columns=3,
    )


def _median_and_p90(sizes: Sequence[float]) -> str:
    if not sizes:
        return ""
    median = size_of_error(float(np.median(sizes)))
    return median if len(sizes) == 1 else f"{median} ({size_of_error(float(np.percentile(sizes, 90)))})"


def _counted(one: Validation) -> Iterator[Finding]:
    """The findings that are evidence, every run once: nothing fitted to, and of halves the second alone."""
    halves = any(finding.judged_on == "second half" for finding in one.findings)
    left_out = (FITTED_TO, "all requests") if halves else (FITTED_TO,)
    return (finding for finding in one.findings if finding.judged_on not in left_out)


def _single_runs(validations: Sequence[Validation]) -> Iterator[Section]:
    for one in validations:
        if one.folder.run is None or not one.findings:
            continue
        rows = tuple(
            (
                METRICS[finding.metric].label,
                finding.judged_on,
                _yes(finding.calibrated),
                figure_value(finding.metric, finding.real),
                figure_value(finding.metric, finding.simulated),
                signed_error(finding.error),
                _range(finding.low, finding.high),
            )
            for finding in one.findings
        )
        head = ("Figure", "Judged on", "Calibrated", "Real", "Simulated", "Error", "Interval")
        regime = one.findings[-1].regime
        text = f"{one.folder.meta.title}; {one.folder.meta.engine}; load: {regime}. {one.folder.meta.notes}"
        yield Section(one.folder.name, text, Table(one.folder.name, head, rows), text_columns=3)


def _with_steps(validations: Sequence[Validation]) -> Iterator[Section]:
    """Recordings that hold every step: the schedules, the step times, then every recording's runs."""
    recorded = [one for one in validations if one.stepwise is not None]
    if not recorded:
        return
    yield Section("Schedules, step by step", SCHEDULES, schedules_table(recorded), text_columns=3)
    yield Section("Step times", STEPS, steps_table(recorded))
    for one in recorded:
        meta = one.folder.meta
        text = " ".join(part for part in (f"{meta.title}; {meta.engine}.", meta.notes, RUNS) if part)
        yield Section(one.folder.name, text, runs_table(one))


_CELL_HEAD = (
    "Recording",
    "GPU",
    "Load",
    "Figure",
    "Calibrated",
    "Runs",
    "Bias",
    "Median",
    "p90",
    "Interval",
)


def _all_cells(findings: Sequence[Finding]) -> Section:
    cells = sorted_cells(cells_of(findings))
    rows = [_cell_row(cell) for cell in cells] + [_gap_row(gap) for gap in gaps_of(findings)]
    text = (
        f"{len(cells)} cells, the largest median error first; then what no recorded run covers, whose "
        "error is unknown."
    )
    return Section("All cells, the worst first", text, Table("All cells", _CELL_HEAD, tuple(rows)))


_WHOLE = ("whole run", "other rows", "start-up")  # what calibration says already


def _cell_row(cell: Cell) -> tuple[str, ...]:
    gpu = cell.gpu if cell.num_gpus == 1 else f"{cell.num_gpus} x {cell.gpu}"
    part = "" if cell.judged_on in _WHOLE else f", {cell.judged_on}"
    return (
        cell.source,
        gpu,
        cell.regime,
        METRICS[cell.metric].label + part,
        _yes(cell.calibrated),
        str(len(cell.errors)),
        signed_error(cell.bias),
        size_of_error(cell.median),
        size_of_error(cell.p90),
        _range(cell.low, cell.high),
    )


def _gap_row(gap: Gap) -> tuple[str, ...]:
    gpu = gap.name if gap.kind == "GPU" else "any"
    load = "any" if gap.kind == "GPU" else gap.name
    return ("none", gpu, load, "all", "no", "0", "not validated", "unknown", "unknown", "")


def _refusals(validations: Sequence[Validation]) -> Section:
    rows = tuple((each.source, each.row, each.reason) for one in validations for each in one.refusals)
    text = "Recorded runs that the simulator does not serve." if rows else "None."
    return Section("Refused", text, Table("Refused", ("Recording", "Run", "Reason"), rows, "words"))


def _recordings(validations: Sequence[Validation]) -> Section:
    rows = tuple(
        (
            one.folder.name,
            one.folder.meta.title,
            one.folder.meta.engine,
            one.folder.meta.recorded,
            one.folder.meta.source,
            one.folder.meta.license,
            one.folder.meta.calibration,
        )
        for one in validations
    )
    head = ("Recording", "What", "Engine", "When", "Source", "License", "Calibration")
    return Section("Recordings", "Data and details: reports/validation/runs.", Table("", head, rows, "words"))


def _yes(calibrated: bool) -> str:
    return "yes" if calibrated else "no"


def _range(low: float, high: float) -> str:
    return "" if math.isnan(low) else f"{low + 0.0:.3f} to {high + 0.0:.3f}"


def _aligned(table: Table) -> list[str]:
    """A table as lines of text, columns as wide as their widest cell."""
    rows = [table.head, *table.rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(table.head))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def _without_nan(value: object) -> object:
    if isinstance(value, dict):
        return {key: _without_nan(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value
