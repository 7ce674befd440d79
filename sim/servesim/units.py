"""Units of the numbers that people read: byte sizes, and numbers written with the unit they are read in."""

from __future__ import annotations

import math

__all__ = [
    "GB",
    "GIB",
    "KIB",
    "MIB",
    "TB",
    "format_bytes",
    "format_count",
    "format_rate",
    "format_seconds",
    "format_share",
]

KIB = 2**10
MIB = 2**20
GIB = 2**30
GB = 1e9
TB = 1e12

_BINARY = ((2**40, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB"))
_DECIMAL = ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB"))


def format_bytes(size_bytes: float, decimal: bool = False) -> str:
    """``12.34 GiB``; with ``decimal`` the marketing unit, ``13.25 GB``."""
    if not math.isfinite(size_bytes):
        return "-"
    for unit_bytes, unit in _DECIMAL if decimal else _BINARY:
        if abs(size_bytes) >= 0.999995 * unit_bytes:  # else it would be rounded to 1,024.00 of the next
            return f"{size_bytes / unit_bytes:,.2f} {unit}"
    return f"{size_bytes:,.0f} B"


def format_seconds(time_s: float) -> str:
    """``12.3 us``, ``4.56 ms``, ``1.23 s``, ``3 min 20 s``, ``1 h 05 min``."""
    if not math.isfinite(time_s):
        return "-"
    size = abs(time_s)
    if size >= 59.995:
        sign, whole = ("-" if time_s < 0 else ""), round(size)
        minutes, seconds = divmod(whole, 60)
        if minutes < 60:
            return f"{sign}{minutes} min {seconds:02} s"
        hours, minutes = divmod(round(size / 60), 60)
        return f"{sign}{hours:,} h {minutes:02} min"
    for unit_s, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if size >= unit_s * 0.9995:
            return f"{_three_digits(time_s / unit_s)} {unit}"
    return f"{time_s * 1e6:.3g} us" if size else "0 s"


def format_count(count: float) -> str:
    """``19,366``; a number that is not whole keeps two decimals."""
    if not math.isfinite(count):
        return "-"
    return f"{count:,.0f}" if float(count).is_integer() else f"{count:,.2f}"


def format_rate(rate_per_s: float, what: str) -> str:
    """``1,234.57 tok/s``."""
    return f"{rate_per_s:,.2f} {what}/s" if math.isfinite(rate_per_s) else "-"


def format_share(share: float) -> str:
    """A share of one as ``12.3 %``."""
    return f"{100 * share:.1f} %" if math.isfinite(share) else "-"


def _three_digits(value: float) -> str:
    size = abs(value)
    return f"{value:.0f}" if size >= 99.95 else f"{value:.1f}" if size >= 9.995 else f"{value:.2f}"
