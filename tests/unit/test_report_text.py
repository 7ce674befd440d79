"""The result as plain text and as JSON."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from handmade import handmade_log, handmade_run
from servesim.analysis.comparison import compare_summaries
from servesim.analysis.metrics import summarise
from servesim.engine.events import Log
from servesim.report.as_json import comparison_json, to_json
from servesim.report.terminal import comparison_text, result_text, warnings_text

RESULT = """\
============ Serving Benchmark Result ============
Successful requests:                     4
Failed requests:                         1
Request rate configured (RPS):           2.00
Benchmark duration (s):                  2.30
Total input tokens:                      180
Total generated tokens:                  7
Request throughput (req/s):              1.74
Request goodput (req/s):                 0.43
Output token throughput (tok/s):         3.04
Peak output token throughput (tok/s):    4.00
Peak concurrent requests:                3.00
Total token throughput (tok/s):          81.30
---------------Time to First Token----------------
Mean TTFT (ms):                          450.00
Median TTFT (ms):                        500.00
P90 TTFT (ms):                           500.00
P99 TTFT (ms):                           500.00
-----Time per Output Token (excl. 1st token)------
Mean TPOT (ms):                          155.00
Median TPOT (ms):                        155.00
P90 TPOT (ms):                           191.00
P99 TPOT (ms):                           199.10
---------------Inter-token Latency----------------
Mean ITL (ms):                           140.00
Median ITL (ms):                         120.00
P90 ITL (ms):                            184.00
P99 ITL (ms):                            198.40
----------------End-to-end Latency----------------
Mean E2EL (ms):                          555.00
Median E2EL (ms):                        600.00
P90 E2EL (ms):                           714.00
P99 E2EL (ms):                           719.40
SLO P99 TTFT <= 400 ms:                  missed (25.0 % within)
SLO P99 TPOT <= 150 ms:                  missed (75.0 % within)
===================== Engine =====================
Mean queue time (ms):                    55.00
P99 queue time (ms):                     213.40
Running requests, mean:                  0.87
Running requests, peak:                  2
Waiting requests, mean:                  0.10
Waiting requests, peak:                  1
Time with a queue (%):                   9.57
Steps:                                   6
Mean step time (ms):                     250.00
Mean tokens per step:                    30.50
Preemptions:                             0
Prefix cache hit rate (%):               25.00
================ KV-cache memory =================
KV pool per GPU (GiB):                   56.00
KV pool (tokens):                        458752
Requests of max_model_len that fit:      28.00
KV use, mean (%):                        5.30
KV use, peak (%):                        16.00
-------------- Where the pool goes ---------------
                      mean GiB  mean %  % in queue
Token states              2.64     4.7        10.2
Reserved                  0.00     0.0         0.0
Internal waste            0.33     0.6         1.0
Round-up                  0.00     0.0         0.0
Holes                     0.00     0.0         0.0
Cached prefixes           5.37     9.6         4.8
Free                     47.66    85.1        84.0
-------- Each GPU's memory at start (GiB) --------
Weights:                                 15.00
Activation peak:                         1.50
CUDA graphs:                             0.60
Outside PyTorch:                         0.50
KV cache:                                56.00
Left to others:                          6.40
Total:                                   80.00
==================================================
"""

VLLM_KEYS = [
    "num_prompts",
    "request_rate",
    "burstiness",
    "max_concurrency",
    "duration",
    "completed",
    "failed",
    "total_input_tokens",
    "total_output_tokens",
    "request_throughput",
    "request_goodput",
    "output_throughput",
    "total_token_throughput",
    "max_output_tokens_per_s",
    "max_concurrent_requests",
    *(
        f"{figure}_{metric}_ms"
        for metric in ("ttft", "tpot", "itl", "e2el")
        for figure in ("mean", "median", "std", "p50", "p90", "p95", "p99")
    ),
]


def test_the_result_block_is_vllms_and_then_ours():
    assert result_text(summarise(handmade_run())) == RESULT


def test_a_warning_ends_in_the_next_thing_to_do():
    assert warnings_text(summarise(handmade_run())) == (
        "Warning: 1 of 5 requests were refused: longer than max_model_len 16384"
        " -> raise engine.max_model_len, or leave the long requests out\n"
        "Warning: only 4 requests were completed: P99 is not reliable below 1,000 -> run more requests\n"
        "Warning: a request lives for 24% of the run on average: filling and draining weigh on every mean"
        " -> run more requests, or a longer slice of the trace\n"
    )


def test_a_run_without_requests_prints_no_made_up_zeros():
    text = result_text(summarise(handmade_run(Log())))
    assert "Mean TTFT (ms):                          n/a\n" in text
    assert "nan" not in text


def test_json_has_vllms_keys_in_vllms_order_and_then_ours():
    result = json.loads(to_json(summarise(handmade_run())))
    assert [key for key in result if key in VLLM_KEYS] == VLLM_KEYS
    assert result["mean_ttft_ms"] == pytest.approx(450)
    assert result["p99_tpot_ms"] == pytest.approx(199.1)
    assert result["median_e2el_ms"] == result["p50_e2el_ms"] == pytest.approx(600)
    assert result["total_output_tokens"] == 7
    assert result["kv_cache"]["classes_add_up_to_pool"] is True
    assert sum(result["kv_cache"]["mean_share"].values()) == pytest.approx(1)
    assert sum(result["gpu_memory_bytes"].values()) == 80 * 2**30
    assert [warning["kind"] for warning in result["warnings"]] == ["refused", "few_completions", "edges"]
    assert result["provenance"]["seed"] == 7


def test_json_has_null_for_what_does_not_exist_and_inf_as_vllm_writes_it():
    workload = {
        "arrivals": {"process": "burst"},
        "prompt_tokens": {"law": "fixed", "tokens": 50},
        "output_tokens": {"law": "fixed", "tokens": 3},
        "num_requests": 5,
    }
    result = json.loads(to_json(summarise(handmade_run(Log(), workload=workload, slo={}))))
    assert result["request_rate"] == "inf"
    assert result["mean_ttft_ms"] is None
    assert result["request_goodput"] is None


def test_text_and_json_are_the_same_bytes_for_the_same_run():
    one, other = summarise(handmade_run()), summarise(handmade_run())
    assert result_text(one) == result_text(other)
    assert to_json(one) == to_json(other)


def _two_runs():
    slower = handmade_log()
    slower.steps.columns["first_s"][4] = 0.6
    slower.requests.columns["finish_s"][4] = 2.6
    slower.requests.columns["first_token_s"][4] = 2.6
    return summarise(handmade_run()), summarise(handmade_run(slower, name="slower"))


def test_comparison_gives_ratios_and_for_shares_differences():
    rows = {row.label: row for row in compare_summaries(*_two_runs())}
    assert rows["Benchmark duration (s)"].ratio == pytest.approx(2.6 / 2.3)
    assert rows["Mean TTFT (ms)"].ratio == pytest.approx((0.5 * 3 + 0.6) / (0.5 * 3 + 0.3))
    assert rows["P99 ITL (ms)"].ratio == 1
    text = comparison_text(*_two_runs())
    assert "Benchmark duration (s)                      2.30          2.60    1.130x\n" in text
    assert "KV use, mean (%)                            5.30          5.06   -0.2 pp\n" in text
    assert "Failed requests                                1             1    1.000x\n" in text
    assert max(map(len, text.splitlines())) == 72


def test_comparison_leaves_out_what_neither_run_has():
    without_slo = summarise(handmade_run(slo={}))
    assert "Request goodput (req/s)" not in {row.label for row in compare_summaries(without_slo, without_slo)}


def test_comparison_as_json():
    document = json.loads(comparison_json(*_two_runs()))
    assert document["a"]["label"] == "by-hand"
    assert document["b"]["label"] == "slower"
    assert {"group", "label", "a", "b", "ratio"} == set(document["differences"][0])


def test_the_text_result_needs_neither_pandas_nor_plotly():
    code = "import sys, servesim.analysis.metrics, servesim.report.terminal, servesim.report.as_json\n"
    code += "print(sorted({'pandas', 'plotly', 'jinja2', 'rich'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"
