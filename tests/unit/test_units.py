"""Numbers as people read them."""

from __future__ import annotations

import math

import pytest

from servesim.units import GIB, MIB, format_bytes, format_count, format_rate, format_seconds, format_share


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1,023 B"),
        (1024, "1.00 KiB"),
        (1.5 * MIB, "1.50 MiB"),
        (79.65 * GIB, "79.65 GiB"),
        (MIB - 1, "1.00 MiB"),
        (2.25 * 1024 * GIB, "2.25 TiB"),
        (5000 * 1024 * GIB, "5,000.00 TiB"),
        (-3 * GIB, "-3.00 GiB"),
        (math.nan, "-"),
    ],
)
def test_bytes(size: float, text: str) -> None:
    assert format_bytes(size) == text


def test_bytes_in_powers_of_ten() -> None:
    assert [format_bytes(size, decimal=True) for size in (999, 1e3, 80e9, 999.999e9, 3.35e12)] == [
        *("999 B", "1.00 kB", "80.00 GB", "1.00 TB", "3.35 TB"),
    ]


@pytest.mark.parametrize(
    ("time_s", "text"),
    [
        (0, "0 s"),
        (2.5e-6, "2.50 us"),
        (12.34e-6, "12.3 us"),
        (4.567e-3, "4.57 ms"),
        (0.123, "123 ms"),
        (0.99996, "1.00 s"),
        (1.234, "1.23 s"),
        (59.96, "60.0 s"),
        (59.999, "1 min 00 s"),
        (200, "3 min 20 s"),
        (3599.7, "1 h 00 min"),
        (3900, "1 h 05 min"),
        (360_000, "100 h 00 min"),
        (4e-9, "0.004 us"),
        (-0.5, "-500 ms"),
        (-200, "-3 min 20 s"),
        (math.nan, "-"),
        (math.inf, "-"),
    ],
)
def test_seconds(time_s: float, text: str) -> None:
    assert format_seconds(time_s) == text


def test_counts_rates_and_shares() -> None:
    assert [format_count(count) for count in (0, 19366, 1234.5, -1000, math.nan)] == [
        *("0", "19,366", "1,234.50", "-1,000", "-"),
    ]
    assert format_rate(1234.567, "tok") == "1,234.57 tok/s"
    assert format_rate(math.nan, "tok") == "-"
    assert [format_share(share) for share in (0.1234, 1, math.nan)] == ["12.3 %", "100.0 %", "-"]
