"""How figures and their errors are written on the accuracy page."""

from __future__ import annotations

import math

__all__ = ["figure_value", "noise_size", "signed_error", "size_of_error"]


def signed_error(error: float) -> str:
    """``+0.100``: ten percent too much."""
    return f"{error + 0.0:+.3f}"


def size_of_error(error: float) -> str:
    """The size of an error, or of several in the median."""
    return f"{error:.3f}"


def noise_size(noise: float) -> str:
    """The same of a noise floor; empty where nothing was repeated."""
    return "" if math.isnan(noise) else size_of_error(noise)


def figure_value(metric: str, value: float) -> str:
    """A figure with its unit, by its name in analysis.figures."""
    if metric.endswith("_ms"):
        return f"{value:,.1f} ms"
    if metric.endswith("_usage"):
        return f"{100 * value:.1f} %"
    return f"{value:,.1f}/s" if "throughput" in metric else f"{value:,.2f}"
