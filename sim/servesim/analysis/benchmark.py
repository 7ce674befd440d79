"""The detailed result of `vllm bench serve`, as measured requests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from servesim.analysis.measured import Latencies, MeasuredRequests
from servesim.errors import CalibrationError, Problem

__all__ = ["read_benchmark"]

_LISTS = ("input_lens", "output_lens", "ttfts", "itls")


def read_benchmark(path: Path) -> MeasuredRequests:
    """The requests of a result saved with --save-result --save-detailed, in the order of sending.

    TTFT is the client's: first streamed chunk minus send. The last token comes after the sum of the ITLs.
    Requests without output (failed ones) are left out. Older versions of vLLM save no start times; their
    requests are taken to have been sent at once, which is refused unless the request rate was infinite.
    """
    result = _read(path)
    missing = [name for name in _LISTS if not isinstance(result.get(name), list)]
    if missing:
        raise CalibrationError(
            Problem(
                f"has no {', '.join(missing)}: without single requests no scalar can be told",
                file=str(path),
                next_step="run `vllm bench serve` with --save-result --save-detailed",
            )
        )
    lengths = {len(result[name]) for name in _LISTS}
    if len(lengths) != 1:
        raise CalibrationError(Problem(f"lists of different length: {', '.join(_LISTS)}", file=str(path)))
    (count,) = lengths
    arrival_s = _start_times(path, result, count)
    ttft_s = np.array(result["ttfts"], dtype=np.float64)
    e2e_s = ttft_s + np.array([float(sum(gaps)) for gaps in result["itls"]])
    output_tokens = np.array(result["output_lens"], dtype=np.int64)
    prompt_tokens = np.array(result["input_lens"], dtype=np.int64)
    served = (output_tokens > 0) & (ttft_s > 0)
    order = np.flatnonzero(served)[np.argsort(arrival_s[served], kind="stable")]
    if not len(order):
        raise CalibrationError(Problem("no request of it was completed", file=str(path)))
    arrival_s = arrival_s[order] - arrival_s[order[0]]
    return MeasuredRequests(
        prompt_tokens[order], Latencies(arrival_s, output_tokens[order], ttft_s[order], e2e_s[order])
    )


def _read(path: Path) -> dict[str, Any]:
    step = "give a folder of recorded runs, or the JSON of `vllm bench serve --save-detailed`"
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        reason = error.strerror or str(error)
        raise CalibrationError(
            Problem("cannot be read", file=str(path), got=reason, next_step=step)
        ) from None
    except ValueError as error:
        raise CalibrationError(
            Problem("cannot be read as JSON", file=str(path), got=str(error).splitlines()[0], next_step=step)
        ) from None
    if not isinstance(result, dict):
        problem = Problem("is not a result of `vllm bench serve`", file=str(path), next_step=step)
        raise CalibrationError(problem)
    return result


def _start_times(path: Path, result: dict[str, Any], count: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    starts = result.get("start_times")
    if isinstance(starts, list) and len(starts) == count:
        return np.array(starts, dtype=np.float64)
    limited = result.get("max_concurrency")
    if result.get("request_rate") != "inf" or (limited is not None and int(limited) < count):
        raise CalibrationError(
            Problem(
                "has no start_times, and the requests were not all sent at once",
                file=str(path),
                got=f"request_rate {result.get('request_rate')}, max_concurrency {limited}",
                next_step="use vLLM 0.26 or newer, or --request-rate inf without --max-concurrency",
            )
        )
    return np.zeros(count)
