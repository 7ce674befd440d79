"""A scenario's expectations against its result."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from servesim.config.expect import Expectation
from servesim.errors import ConfigError, Problem, did_you_mean

__all__ = ["Finding", "check_expectations", "metrics_of", "refuse_unknown_metrics"]


@dataclass(frozen=True, slots=True)
class Finding:
    """An expectation and the figure it speaks of; None when the run has no such figure."""

    expectation: Expectation
    figure: float | None

    @property
    def met(self) -> bool:
        """The figure exists and lies within the bounds."""
        (low, high), figure = self.expectation.bounds, self.figure
        if figure is None:
            return False
        return low <= figure <= high or math.isclose(figure, low) or math.isclose(figure, high)

    @property
    def difference(self) -> float | None:
        """Figure less expected value; None where there is no such pair."""
        value = self.expectation.value
        return None if value is None or self.figure is None else self.figure - value


def metrics_of(result: Mapping[str, Any]) -> dict[str, float | None]:
    """The numbers of a JSON result by path; None where the run has none, as for a mean over nothing."""
    found: dict[str, float | None] = {}
    for key, value in result.items():
        if isinstance(value, Mapping):
            found |= {f"{key}.{path}": number for path, number in metrics_of(value).items()}
        elif value is None or isinstance(value, bool | int | float):
            found[key] = None if value is None else float(value)
        elif value == "inf":
            found[key] = float("inf")
    return found


def check_expectations(expectations: Sequence[Expectation], result: Mapping[str, Any]) -> tuple[Finding, ...]:
    """Each expectation beside its figure; raises ConfigError for metrics that no result has."""
    metrics = metrics_of(result)
    refuse_unknown_metrics(expectations, metrics)
    return tuple(Finding(one, metrics[one.metric]) for one in expectations)


def refuse_unknown_metrics(
    expectations: Sequence[Expectation], metrics: Mapping[str, Any], file: str = ""
) -> None:
    """Raise ConfigError with every metric that is not among the known ones; ``file`` is named in it."""
    problems = [
        Problem(
            "unknown metric",
            file=file,
            path=f"expect[{number}].metric",
            got=one.metric,
            hint=_nearest(one.metric, metrics),
            next_step="take a path of the JSON result (servesim run --json)",
        )
        for number, one in enumerate(expectations)
        if one.metric not in metrics
    ]
    if problems:
        raise ConfigError(problems)


def _nearest(name: str, metrics: Mapping[str, Any]) -> str:
    """The closest path; of one that ends alike, since the last part is what people remember."""
    last = name.rsplit(".", 1)[-1]
    alike = [path for path in metrics if path.rsplit(".", 1)[-1] == last]
    if 1 <= len(alike) <= 3:
        return f"did you mean {' or '.join(alike)}?"
    hint = did_you_mean(name, metrics)
    return "" if hint.startswith("allowed") else hint
