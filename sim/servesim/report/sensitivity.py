"""A sensitivity study as text, JSON and page: tornadoes, and where the uncertainty comes from."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

from servesim.analysis.intervals import LEVEL, Interval
from servesim.analysis.quantities import QUANTITIES
from servesim.analysis.sensitivity import Effect, Odds, Sensitivity
from servesim.report.html import figure_page
from servesim.report.replicated import interval_json, replications_about, replications_notes
from servesim.report.sections import Table
from servesim.report.tornado import tornado
from servesim.report.words import figure_text, percent
from servesim.units import format_share

__all__ = ["USUAL_FIGURES", "sensitivity_html", "sensitivity_json", "sensitivity_text"]

USUAL_FIGURES = ("p99_ttft_ms", "mean_ttft_ms", "p99_tpot_ms", "mean_tpot_ms", "output_throughput")
_WIDTH = 96
_LABEL = 32
_EXPLAINED = {
    "seeds": "another draw of the same random laws; more requests make it smaller",
    "workload": "other traffic of the kind that was recorded; a longer trace makes it smaller",
    "model": "the simulation against recorded servers; a calibration makes it smaller",
}


def sensitivity_text(of: Sensitivity, keys: Sequence[str] = ()) -> str:
    """The tornado of every figure, then the three sources of uncertainty, then the odds of the SLO."""
    lines = [*replications_about(of.base, " Sensitivity ", _WIDTH)]
    for key in keys or known_figures(of):
        lines += _tornado(of, key)
    lines += _sources(of, keys or known_figures(of))
    lines += _odds(of.odds())
    lines += ["=" * _WIDTH, *replications_notes(of.base)]
    return "\n".join(lines) + "\n"


def known_figures(of: Sensitivity) -> list[str]:
    """The usual figures that the replications have."""
    return [key for key in USUAL_FIGURES if of.base.estimate(key).interval is not None]


def sensitivity_json(of: Sensitivity) -> str:
    """Every figure's effects, sources of uncertainty and odds."""
    figures = {}
    for estimate in of.base.estimates():
        if estimate.interval is None:
            continue
        key = estimate.quantity.key
        figures[key] = {
            "base": _interval(estimate.interval),
            "effects": {one.input.key: _effect(one) for one in of.effects(key)},
            **_source_values(of, key),
        }
    return json.dumps(_finite({
        "label": of.base.scenario.scenario.name,
        "change": of.change,
        "replications": len(of.base.seeds),
        "resampled": of.base.resampled,
        "level": LEVEL,
        "load": of.load,
        "figures": figures,
        "slo": [
            {
                "limits_s": one.limits_s,
                ("workload" if of.base.resampled else "seeds"): _interval(one.chance),
                "model": _interval(one.model),
                "both": one.both,
            }
            for one in of.odds()
        ],
        "provenance": {"servesim": version("servesim"), "seeds": list(of.base.seeds)},
    }), indent=2, allow_nan=False) + "\n"  # fmt: skip


def sensitivity_html(of: Sensitivity, keys: Sequence[str] = ()) -> str:
    """The study as one offline page."""
    shown = list(keys or known_figures(of))
    figures = {key: tornado(of.effects(key), of.change) for key in shown}
    charts = [
        (key, QUANTITIES[key].label, figure_text(_base(of, key).value), _elasticities(of, key))
        for key in shown
    ]
    source_rows = tuple((QUANTITIES[key].label, *_source_cells(of, key)) for key in shown)
    odds = of.odds()
    return figure_page(
        "sensitivity.html.j2",
        figures,
        title=f"{of.base.scenario.scenario.name}: sensitivity",
        subtitle=". ".join(replications_about(of.base, "", 0)),
        percent=percent(of.change),
        charts=charts,
        sources=Table("Uncertainty by source", ("Figure", "Mean", *_source_names(of)), source_rows),
        explained=tuple((name, _EXPLAINED[name]) for name in ("seeds", "workload", "model")),
        odds=Table("The SLO", ("Limit", *_odds_head(of)), tuple(_odds_cells(one) for one in odds)),
        notes=tuple(replications_notes(of.base)),
    )


def _base(of: Sensitivity, key: str) -> Interval:
    interval = of.base.estimate(key).interval
    assert interval is not None
    return interval


def _tornado(of: Sensitivity, key: str) -> Iterator[str]:
    estimate = of.base.estimate(key)
    title = f" {estimate.quantity.label} "
    yield f"{title:-^{_WIDTH}}"
    if estimate.interval is None:
        yield f"n/a: {estimate.refused}"
        return
    yield f"Base: {figure_text(estimate.interval.value)} +- {figure_text(estimate.interval.half_width)}"
    yield f"{'':<{_LABEL}}{f'-{percent(of.change)}':>20}{f'+{percent(of.change)}':>20}{'elasticity':>20}"
    for one in of.effects(key):
        cells = (_percent(one.down), _percent(one.up), _number(one.elasticity))
        yield f"{one.input.label:<{_LABEL}}" + "".join(f"{cell:>20}" for cell in cells)


def _percent(interval: Interval | None) -> str:
    if interval is None:
        return "-"
    return f"{percent(interval.value, 1, '+')} +- {percent(interval.half_width, 1)}"


def _number(interval: Interval | None) -> str:
    return "-" if interval is None else f"{interval.value + 0.0:+.2f} +- {interval.half_width:.2f}"


def _elasticities(of: Sensitivity, key: str) -> Table:
    rows = tuple(
        (one.input.label, _percent(one.down), _percent(one.up), _number(one.elasticity))
        for one in of.effects(key)
    )
    head = ("Input", f"-{percent(of.change)}", f"+{percent(of.change)}", "Elasticity")
    return Table(QUANTITIES[key].label, head, rows)


# ---- sources of uncertainty ------------------------------------------------------------------------


def _source_names(of: Sensitivity) -> tuple[str, str, str, str]:
    return ("Seeds", "Workload", f"Model ({of.load})", "Real over simulated")


def _spread(of: Sensitivity, key: str) -> tuple[float, float]:
    """Where 95 % of single replications lie, as Student's law of prediction has it."""
    values = of.base.values(QUANTITIES[key])
    mean = _base(of, key)
    half = mean.half_width * math.sqrt(len(values) + 1)
    return mean.value - half, mean.value + half


def _source_values(of: Sensitivity, key: str) -> dict[str, Any]:
    errors = of.model_error(key)
    spread = list(_spread(of, key))
    found: dict[str, Any] = {
        "seeds": None if of.base.resampled else spread,
        "workload": spread if of.base.resampled else None,
        "model": None,
    }
    if errors is not None:
        real = errors.real(_base(of, key).value)
        low, high = np.quantile(real, (0.025, 0.975))
        found["model"] = [float(low), float(high)]
        found["model_recorded_at"] = errors.recorded_at
        found["model_runs"] = len(errors.errors)
        found["model_ratio"] = _interval(errors.ratio)
    return found


def _source_cells(of: Sensitivity, key: str) -> tuple[str, ...]:
    values = _source_values(of, key)
    cells = [figure_text(_base(of, key).value)]
    for name, missing in (("seeds", "nothing drawn"), ("workload", "laws given")):
        cells.append(_range(values[name]) if values[name] else missing)
    if values["model"] is None:
        return (*cells, "not recorded", "")
    where = "" if values["model_recorded_at"] == of.load else ", any load"
    ratio = values["model_ratio"]
    typical = f"{figure_text(ratio['mean'])} ({_range((ratio['low'], ratio['high']))})"
    return (*cells, f"{_range(values['model'])} ({values['model_runs']} runs{where})", typical)


def _range(ends: Sequence[float]) -> str:
    return f"{figure_text(ends[0])} to {figure_text(ends[1])}"


def _sources(of: Sensitivity, keys: Sequence[str]) -> Iterator[str]:
    yield f"{' Where 95 % of the results would lie, by what is doubted ':-^{_WIDTH}}"
    for name, text in _EXPLAINED.items():
        yield f"{name}: {text}"
    yield _source_line("", "mean", "seeds", "workload", "model", "real over simulated")
    for key in keys:
        if of.base.estimate(key).interval is not None:
            yield _source_line(QUANTITIES[key].label, *_source_cells(of, key))


def _source_line(label: str, mean: str, seeds: str, workload: str, model: str, ratio: str = "") -> str:
    return f"{label:<{_LABEL}}{mean:>9}{seeds:>20}{workload:>20}  {model:<42}{ratio}".rstrip()


# ---- the SLO ---------------------------------------------------------------------------------------


def _odds_head(of: Sensitivity) -> tuple[str, str, str]:
    return ("P by workload" if of.base.resampled else "P by seeds", "P by model", "P by both")


def _odds_cells(one: Odds) -> tuple[str, str, str, str]:
    [(metric, limit_s), *others] = one.limits_s.items()
    limit = "All at once" if others else f"P99 {metric.upper()} <= {limit_s * 1e3:g} ms"
    model = "not recorded" if one.model is None else _share(one.model)
    both = "n/a" if math.isnan(one.both) else format_share(one.both)
    return limit, _share(one.chance), model, both


def _share(one: Interval) -> str:
    return f"{format_share(one.value)} ({format_share(one.low)} to {format_share(one.high)})"


def _odds(odds: Sequence[Odds]) -> Iterator[str]:
    if not odds:
        return
    yield f"{' Probability that the SLO is met ':-^{_WIDTH}}"
    yield f"{'':<26}{'by chance':>28}{'by the model':>28}{'by both':>10}"
    for one in odds:
        limit, chance, model, both = _odds_cells(one)
        yield f"{limit:<26}{chance:>28}{model:>28}{both:>10}"


# ---- JSON ------------------------------------------------------------------------------------------


def _effect(one: Effect) -> dict[str, Any]:
    return {
        "down": _interval(one.down),
        "up": _interval(one.up),
        "elasticity": _interval(one.elasticity),
    }


def _interval(one: Interval | None) -> dict[str, float] | None:
    return None if one is None else interval_json(one)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
