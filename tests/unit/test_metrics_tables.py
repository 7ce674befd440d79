"""The log as tables and as CSV."""

from __future__ import annotations

import io

import numpy as np
import pandas as pd
import pytest

from handmade import POOL, handmade_log
from servesim.analysis.tables import kv_frame, requests_frame, steps_frame, to_csv
from servesim.analysis.timeline import KV_CLASSES


def test_requests_come_by_index_with_their_latencies():
    frame = requests_frame(handmade_log())
    assert frame["index"].tolist() == [0, 1, 2, 3, 4]
    assert frame["status"].tolist() == ["finished_stop"] * 3 + ["refused", "finished_stop"]
    np.testing.assert_allclose(frame["ttft_s"], [0.5, 0.5, 0.5, np.nan, 0.3])
    np.testing.assert_allclose(frame["e2e_s"], [0.72, 0.5, 0.7, np.nan, 0.3])


def test_steps_touch_or_leave_a_hole():
    frame = steps_frame(handmade_log())
    np.testing.assert_allclose(frame["end_s"], [0.5, 0.72, 1.0, 1.2, 2.3])
    assert (frame["steps"] * frame["outputs"]).sum() == 7
    assert "kv_tokens" not in frame


def test_kv_classes_add_up_to_the_pool():
    frame = kv_frame(handmade_log())
    for prefix in ("", "end_"):
        assert set(sum(frame[f"{prefix}{name}"] for name in KV_CLASSES)) == {POOL}


@pytest.mark.parametrize("make", [requests_frame, steps_frame, kv_frame])
def test_csv_has_the_same_bytes_again_and_reads_back(make):
    frame = make(handmade_log())
    text = to_csv(frame)
    assert text == to_csv(make(handmade_log()))
    assert "\r" not in text
    pd.testing.assert_frame_equal(pd.read_csv(io.StringIO(text)), frame, check_dtype=False, rtol=1e-11)


def test_csv_keeps_a_nanosecond_of_a_long_run():
    text = to_csv(pd.DataFrame({"time_s": [3500.123456789, 1.5e-9]}))
    assert text.splitlines()[1:] == ["3500.12345679", "1.5e-09"]
