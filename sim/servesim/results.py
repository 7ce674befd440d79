"""What simulations and their comparisons give back: text, JSON, pages, tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from servesim.analysis.metrics import summarise
from servesim.analysis.run import Run
from servesim.analysis.summary import Summary

if TYPE_CHECKING:
    import pandas as pd

    from servesim.analysis.attribution import Attribution
    from servesim.analysis.calibrate import Calibration
    from servesim.analysis.expectations import Finding
    from servesim.analysis.finished import Finished
    from servesim.analysis.fragmentation import Fragmentation
    from servesim.analysis.lab import Lab
    from servesim.analysis.prefix_cache import CacheStudy
    from servesim.analysis.validate import Validation

__all__ = [
    "Accuracy",
    "Calibrations",
    "Comparison",
    "FinishedComparison",
    "FragmentationReport",
    "PrefixCacheReport",
    "Result",
]


@dataclass(frozen=True)
class Result:
    """A finished simulation; tables and files are made when they are asked for."""

    run: Run
    split: Callable[[], Attribution | None] = field(default=lambda: None, repr=False, compare=False)
    """Splits the latencies of the requests, where the simulation took notes for that."""

    @cached_property
    def summary(self) -> Summary:
        """Every figure of the run, in SI units."""
        return summarise(self.run)

    @cached_property
    def attribution(self) -> Attribution | None:
        """Every completed request's latency in parts; None where no notes were taken."""
        return self.split()

    @cached_property
    def fragmentation(self) -> Fragmentation | None:
        """Where the KV memory went, beside the closed form; None when nothing was ever scheduled."""
        from servesim.analysis.fragmentation import fragmentation

        return fragmentation(self.run, self.summary)

    @property
    def requests(self) -> pd.DataFrame:
        """One row per request."""
        from servesim.analysis.tables import requests_frame

        return requests_frame(self.run.log)

    @property
    def steps(self) -> pd.DataFrame:
        """One row per run of identical steps."""
        from servesim.analysis.tables import steps_frame

        return steps_frame(self.run.log)

    @property
    def kv(self) -> pd.DataFrame:
        """The KV pool by class over time, in token slots."""
        from servesim.analysis.tables import kv_frame

        return kv_frame(self.run.log)

    def __str__(self) -> str:
        from servesim.report.terminal import result_text

        return result_text(self.summary)

    @cached_property
    def expectations(self) -> tuple[Finding, ...]:
        """What the scenario expects, each beside its figure; raises ConfigError for an unknown metric."""
        from servesim.analysis.expectations import check_expectations
        from servesim.report.as_json import result

        return check_expectations(self.run.scenario.expect, result(self.summary))

    def to_json(self, *, expect: bool = False) -> str:
        """One JSON object: vLLM's benchmark keys, then ours, then what was expected, if asked for."""
        from servesim.report.as_json import to_json
        from servesim.report.fragmentation import account_json

        account = self.fragmentation
        told = account_json(account) if account else None
        return to_json(self.summary, self.expectations if expect else None, fragmentation=told)

    def finished(self) -> Finished:
        """The result as it is read back from its JSON, for comparisons with finished reports."""
        import json

        from servesim.analysis.finished import Finished

        return Finished(self.summary.name, json.loads(self.to_json()))

    def to_html(self) -> str:
        """The report as one offline page."""
        from servesim.report.html import report_html

        return report_html(self.run, self.summary, self.attribution)

    def files(self) -> dict[str, str]:
        """Everything that ``servesim run --out`` writes, by file name."""
        from servesim.analysis.tables import to_csv

        tables = {"requests": self.requests, "steps": self.steps, "kv": self.kv}
        return {
            "report.html": self.to_html(),
            "result.json": self.to_json(),
            **{f"{name}.csv": to_csv(table) for name, table in tables.items()},
        }


@dataclass(frozen=True)
class Comparison:
    """Two simulations of the same random numbers."""

    a: Result
    b: Result

    def __str__(self) -> str:
        from servesim.report.finished import fragmentation_text, traffic_text
        from servesim.report.terminal import comparison_text

        both = comparison_text(self.a.summary, self.b.summary)
        results = [self.a.finished(), self.b.finished()]
        return both + fragmentation_text(results) + traffic_text(results)

    def to_json(self) -> str:
        """Both results and the table of differences."""
        from servesim.analysis.finished import fragmentation_rows, other_traffic
        from servesim.report.as_json import comparison_json, warnings_json

        results = [self.a.finished(), self.b.finished()]
        rows, warnings = fragmentation_rows(results), warnings_json(other_traffic(results))
        fragmentation = [{"label": row.label, "a": row.values[0], "b": row.values[1]} for row in rows]
        return comparison_json(self.a.summary, self.b.summary, fragmentation=fragmentation, warnings=warnings)

    def to_html(self) -> str:
        """Both results in one offline page."""
        from servesim.analysis.finished import other_traffic
        from servesim.report.html import comparison_html

        warnings = other_traffic([self.a.finished(), self.b.finished()])
        return comparison_html((self.a.run, self.a.summary), (self.b.run, self.b.summary), warnings)

    def files(self) -> dict[str, str]:
        """Everything that ``servesim compare --out`` writes, by file name."""
        return {"compare.html": self.to_html(), "compare.json": self.to_json()}


@dataclass(frozen=True)
class FinishedComparison:
    """Two or more results side by side, read from finished reports or just simulated."""

    results: tuple[Finished, ...]

    def __str__(self) -> str:
        from servesim.report.finished import finished_text

        return finished_text(self.results)

    def to_json(self) -> str:
        """All results and the table."""
        from servesim.report.finished import finished_json

        return finished_json(self.results)

    def to_html(self) -> str:
        """The table and the shares of the pools as one offline page."""
        from servesim.report.finished import finished_html

        return finished_html(self.results)

    def files(self) -> dict[str, str]:
        """Everything that ``servesim compare --out`` writes, by file name."""
        return {"compare.html": self.to_html(), "compare.json": self.to_json()}


@dataclass(frozen=True)
class FragmentationReport:
    """Several allocators on the same requests."""

    lab: Lab

    def __str__(self) -> str:
        from servesim.report.fragmentation import lab_text

        return lab_text(self.lab)

    def to_json(self) -> str:
        """Every figure, without the memory maps."""
        from servesim.report.fragmentation import lab_json

        return lab_json(self.lab)

    def to_html(self) -> str:
        """The report with its memory maps as one offline page."""
        from servesim.report.fragmentation_page import lab_html

        return lab_html(self.lab)

    def files(self) -> dict[str, str]:
        """Everything that ``servesim fragmentation --out`` writes, by file name."""
        return {"fragmentation.html": self.to_html(), "fragmentation.json": self.to_json()}


@dataclass(frozen=True)
class PrefixCacheReport:
    """Hit rate of the prefix cache against its size."""

    study: CacheStudy

    def __str__(self) -> str:
        from servesim.report.prefix_cache import cache_text

        return cache_text(self.study)

    def to_json(self) -> str:
        """Every size, with its hit rate."""
        from servesim.report.prefix_cache import cache_json

        return cache_json(self.study)

    def files(self) -> dict[str, str]:
        """Everything that ``servesim prefix-cache --out`` writes, by file name."""
        from servesim.report.prefix_cache import cache_html

        return {"prefix-cache.html": cache_html(self.study), "prefix-cache.json": self.to_json()}


@dataclass(frozen=True)
class Accuracy:
    """Simulations of recorded runs beside what was recorded."""

    validations: tuple[Validation, ...]

    def __str__(self) -> str:
        from servesim.report.accuracy import accuracy_text

        return accuracy_text(self.validations)

    def to_json(self) -> str:
        """Every finding, refusal and gap."""
        from servesim.report.accuracy import accuracy_json

        return accuracy_json(self.validations)

    def files(self) -> dict[str, str]:
        """The accuracy page and the table of errors, by file name."""
        from servesim.report.accuracy import accuracy_html, accuracy_markdown, residuals_csv

        pages = {
            "accuracy.html": accuracy_html,
            "accuracy.md": accuracy_markdown,
            "residuals.csv": residuals_csv,
        }
        return {name: page(self.validations) for name, page in pages.items()}


@dataclass(frozen=True)
class Calibrations:
    """Engine profiles fitted to measurements, by file name."""

    by_file: dict[str, Calibration]

    def __str__(self) -> str:
        from servesim.report.calibration import calibration_text

        return "\n".join(calibration_text(one) for one in self.by_file.values())

    def to_json(self) -> str:
        """The profiles with their standard errors and held-out errors."""
        from servesim.report.calibration import calibrations_json

        return calibrations_json(self.by_file)

    def files(self) -> dict[str, str]:
        """The engine-profile files."""
        from servesim.report.calibration import profile_yaml

        return {name: profile_yaml(one) for name, one in self.by_file.items()}
