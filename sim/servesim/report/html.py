"""The offline HTML pages: one file each, with everything in it and nothing asked from the network."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from plotly.offline import get_plotlyjs

from servesim.analysis.attribution import Attribution
from servesim.analysis.caveats import Warned
from servesim.analysis.fragmentation import fragmentation
from servesim.analysis.lab import Entry
from servesim.analysis.run import Run
from servesim.analysis.series import latency_curves, time_series
from servesim.analysis.summary import Summary
from servesim.config.files import shipped
from servesim.report import charts, sections
from servesim.report.fleet import fleet_table
from servesim.report.fragmentation import account_table, account_words, consequences
from servesim.report.fragmentation_charts import bars
from servesim.report.latency_parts import latency_parts
from servesim.report.words import LATENCY_TITLES, memory_parts

__all__ = ["comparison_html", "embedded", "figure_page", "plain_page", "report_html", "study_page"]


def report_html(run: Run, summary: Summary, attribution: Attribution | None = None) -> str:
    """The report of one run; ``attribution``: where the requests' time went, if that is known."""
    account = fragmentation(run, summary)
    curves = latency_curves(run.log)
    series = time_series(run)
    figures = {
        f"cdf-{name}": charts.latency(name, {summary.name: curves[name]}, summary.slo) for name in curves
    }
    if series.bin_s:
        figures["throughput"] = charts.throughput(series)
        figures["load"] = charts.load({summary.name: series})
        figures["kv"] = charts.kv_over_time(series, summary.kv, summary.memory.kv_cache_bytes)
    figures["memory"] = charts.memory_bar(memory_parts(summary.memory))
    parts = latency_parts(attribution) if attribution else None
    if parts:
        figures["parts"] = parts[0]
    return figure_page(
        "report.html.j2",
        figures,
        title=summary.name,
        subtitle=sections.subtitle(run, summary),
        description=run.scenario.description,
        warnings=summary.warnings,
        cards=sections.headlines(summary),
        latencies=sections.latencies(summary),
        parts=parts[1] if parts else None,
        slo=sections.slo(summary),
        fleet=fleet_table(summary.fleet) if summary.fleet else None,
        kv_classes=sections.kv_classes(summary),
        account=account_table(account) if account else None,
        account_words=account_words(account) if account else "",
        memory=sections.memory(summary),
        configuration=sections.configuration(run),
        provenance=sections.provenance(run, summary),
        sources=sections.sources(run),
        bin_s=series.bin_s,
    )


def comparison_html(a: tuple[Run, Summary], b: tuple[Run, Summary], warnings: Sequence[Warned] = ()) -> str:
    """Two runs in one page: differences, KV pools side by side, latencies and running requests overlaid."""
    pairs = {
        f"{letter}: {summary.name}": (run, summary)
        for letter, (run, summary) in zip("AB", (a, b), strict=True)
    }
    curves = {name: latency_curves(run.log) for name, (run, _) in pairs.items()}
    horizon_s = max(summary.load.horizon_s for _, summary in pairs.values())
    series = {name: time_series(run, horizon_s) for name, (run, _) in pairs.items()}
    figures: dict[str, charts.Figure] = {}
    for metric in LATENCY_TITLES:
        named = {name: of[metric] for name, of in curves.items() if metric in of}
        if named:
            figures[f"cdf-{metric}"] = charts.latency(metric, named, a[1].slo)
    if all(one.bin_s for one in series.values()):
        figures["load"] = charts.load(series)
    entries = []
    for name, (run, summary) in pairs.items():
        account = fragmentation(run, summary, name)
        entries += [Entry(run, summary, account, None)] if account else []
    if entries:
        figures["bars"] = bars([entry.account for entry in entries])
    figures["kv-bars"] = charts.kv_bars({name: summary.kv for name, (_, summary) in pairs.items()})
    return figure_page(
        "compare.html.j2",
        figures,
        title=f"{a[1].name} against {b[1].name}",
        warnings=warnings,
        runs=tuple((name, sections.subtitle(*pair), pair[1].warnings) for name, pair in pairs.items()),
        tables=sections.comparison_tables(a[1], b[1]),
        fragmentation=consequences(entries) if entries else None,
        kv_tables=tuple((name, sections.kv_classes(summary)) for name, (_, summary) in pairs.items()),
        provenance=tuple((name, sections.provenance(*pair)) for name, pair in pairs.items()),
        changes=_changes(a[0], b[0]),
        bin_s=max(one.bin_s for one in series.values()),
    )


def _changes(a: Run, b: Run) -> sections.Table:
    """The settings in which two scenarios differ."""
    values_a, values_b = ({row[0]: row[1] for row in sections.configuration(run).rows} for run in (a, b))
    rows = tuple(
        (path, values_a.get(path, "not set"), values_b.get(path, "not set"))
        for path in dict.fromkeys((*values_a, *values_b))
        if values_a.get(path) != values_b.get(path) and path not in ("name", "description")
    )
    return sections.Table("Settings that differ", ("Setting", "A", "B"), rows, "paths")


def study_page(template: str, data: Mapping[str, Any], **values: Any) -> str:
    """A page whose script draws ``data`` itself, as the reader asks for it."""
    return figure_page(template, {}, data=embedded(data), **values)


def plain_page(template: str, **values: Any) -> str:
    """A page of tables only, without scripts."""
    return _environment().get_template(template).render(**values)


def figure_page(template: str, figures: Mapping[str, charts.Figure], **values: Any) -> str:
    """A page with Plotly figures, each drawn into the element of its name, and the values of its template."""
    return (
        _environment()
        .get_template(template)
        .render(
            figures=embedded(figures),
            drawn=frozenset(figures),
            colours=charts.KV_COLOURS,
            plotly_js=get_plotlyjs(),
            **values,
        )
    )


def embedded(data: Any) -> str:
    """JSON for a script element: no "<" in it, so that no text of it can end the element."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(shipped("reports/templates")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
