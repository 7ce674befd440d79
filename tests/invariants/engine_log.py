"""What every log must show, whatever was simulated.

 9  Causality: arrival <= scheduled < first token <= finish.
10  Every request that was not refused ends with the tokens it asked for, or where max_model_len cuts it.
11  Time: steps follow one another without overlap, and the engine is idle only when nobody is there.
12  Tokens: the steps yield every token once; every token but the first of a request has one inter-token gap.
13  Work: without preemptions the steps compute each request's tokens, less its prefix hit, exactly once.
14  Counts: rows, requests and counters tell the same steps, preemptions and KV slots.
"""

from __future__ import annotations

from math import isnan
from typing import Any

from engine_cases import Case

from servesim.engine.events import Log

__all__ = ["check_log", "rows_of"]

KV = ("kv_tokens", "kv_reserved", "kv_internal", "kv_round_up", "kv_holes", "kv_cached", "kv_free")


def rows_of(table: Any) -> list[dict[str, Any]]:
    """A table of a log as records."""
    columns = table.columns
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def check_log(case: Case, log: Log) -> None:
    """Check 9 to 14 on the log of a case; its times are exact."""
    requests, rows = rows_of(log.requests), rows_of(log.steps)
    served = [r for r in requests if Log.STATUSES[r["status"]] != "refused"]
    for row in requests:
        _check_request(case, row)
    _check_time(rows, served, log.end_s)
    _check_tokens(rows, served, log)
    _check_counts(case, rows, requests, log)


def _check_request(case: Case, row: dict[str, Any]) -> None:
    most = case.limits.max_model_len
    if Log.STATUSES[row["status"]] == "refused":
        assert row["prompt_tokens"] >= most
        assert row["generated_tokens"] == 0
        assert all(isnan(row[time]) for time in ("scheduled_s", "first_token_s", "finish_s"))
        return
    assert row["arrival_s"] <= row["scheduled_s"] < row["first_token_s"] <= row["finish_s"], "9: causality"
    assert (row["first_token_s"] == row["finish_s"]) == (row["generated_tokens"] == 1), "9: finish"
    complete = row["prompt_tokens"] + row["output_tokens"] <= most
    assert Log.STATUSES[row["status"]] == ("finished_stop" if complete else "finished_length"), "10: status"
    assert row["generated_tokens"] == min(row["output_tokens"], most - row["prompt_tokens"]), "10: output"
    assert 0 <= row["cached_tokens"] < row["prompt_tokens"], "10: hit"


def _check_time(rows: list[dict[str, Any]], served: list[dict[str, Any]], end_s: float) -> None:
    now_s = 0.0
    ends = set()
    for row in rows:
        assert row["start_s"] >= now_s, "11: steps overlap"
        if row["start_s"] > now_s:
            for request in served:
                assert request["arrival_s"] >= row["start_s"] or request["finish_s"] <= now_s, "11: idle"
        now_s = row["start_s"]
        for j in range(row["steps"]):
            now_s += row["first_s"] + j * row["growth_s"]
            ends.add(now_s)
    assert end_s == now_s
    for request in served:
        assert {request["first_token_s"], request["finish_s"]} <= ends, "11: tokens come at the end of steps"


def _check_tokens(rows: list[dict[str, Any]], served: list[dict[str, Any]], log: Log) -> None:
    def total(name: str) -> int:
        return sum(row["steps"] * row[name] for row in rows)

    generated = sum(request["generated_tokens"] for request in served)
    assert total("outputs") == generated, "12: tokens"
    assert total("itl_samples") + len(log.itl_gaps_s) == generated - len(served), "12: inter-token gaps"
    slots = sum(request["prompt_tokens"] + request["generated_tokens"] - 1 for request in served)
    if not log.counters["preemptions"]:
        hits = sum(request["cached_tokens"] for request in served)
        assert total("decodes") + total("prefill_tokens") == slots - hits, "13: work"


def _check_counts(case: Case, rows: list[dict[str, Any]], requests: list[dict[str, Any]], log: Log) -> None:
    counters = log.counters
    assert sorted(r["index"] for r in requests) == sorted(
        [r.index for r in case.starts] + [r.index for _, r in case.chains]
    ), "14: every request once"
    assert sum(row["steps"] for row in rows) == counters["steps"], "14: steps"
    assert sum(row["preemptions"] for row in rows) == counters["preemptions"], "14: preemptions"
    assert sum(r["preemptions"] for r in requests) == counters["preemptions"], "14: preemptions"
    assert counters["prefix_cache_hits"] <= counters["prefix_cache_queries"], "14: hits"
    assert sum(r["cached_tokens"] for r in requests) <= counters["prefix_cache_hits"], "14: hits"
    for row in rows:
        assert 0 <= row["running"] <= case.limits.max_num_seqs, "14: running"
        assert row["decodes"] + row["prefills"] <= row["running"], "14: more computed than running"
        for edge in ("", "end_"):
            classes = [row[edge + name] for name in KV]
            assert min(classes) >= 0, "14: a class is negative"
            assert sum(classes) == (case.num_blocks - 1) * case.block_size, "14: the classes add up"
