"""Expectations beside what came out, as a table and as JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from servesim.analysis.expectations import Finding

__all__ = ["expectations_json", "expectations_text"]

_WIDTH = 96


def expectations_text(findings: Sequence[Finding]) -> str:
    """One line for each expectation, its source and note below it, and a last line that sums up."""
    missed = sum(not finding.met for finding in findings)
    lines = [f"{' Expectations ':=^{_WIDTH}}"]
    lines.append(f"{'':<8}{'metric':<44}{'expected':>24}{'simulated':>12}")
    for finding in findings:
        of = finding.expectation
        verdict = "ok" if finding.met else "MISSED"
        lines.append(f"{verdict:<8}{of.metric:<44} {_expected(finding):>23}{_number(finding.figure):>12}")
        about = "; ".join(text for text in (of.unit, of.source, of.note) if text)
        if about:
            lines.append(f"{'':<8}{about}")
    verdict = f"{len(findings) - missed} of {len(findings)} expectations met"
    return "\n".join([*lines, f"{f' {verdict} ':=^{_WIDTH}}"]) + "\n"


def expectations_json(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    """Each expectation as it was written, with the figure and whether it was met."""
    return [
        {
            **finding.expectation.model_dump(mode="json", exclude_defaults=True),
            "simulated": finding.figure,
            "met": finding.met,
        }
        for finding in findings
    ]


def _expected(finding: Finding) -> str:
    of = finding.expectation
    if of.value is None:
        low, high = of.bounds
        if math.isinf(low):
            return f"at most {_number(high)}"
        return f"at least {_number(low)}" if math.isinf(high) else f"{_number(low)} to {_number(high)}"
    if of.tolerance_percent is not None:
        return f"{_number(of.value)} +- {of.tolerance_percent:g} %"
    return f"{_number(of.value)} +- {of.tolerance:g}"


def _number(value: float | None) -> str:
    if value is None:
        return "n/a"
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
