"""Which workloads a scenario may describe, and what is said about the others."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from servesim.config.workload import WorkloadConfig

SYNTHETIC: dict[str, Any] = {
    "arrivals": {"process": "poisson", "rate_per_s": 10},
    "prompt_tokens": {"law": "fixed", "tokens": 100},
    "output_tokens": {"law": "geometric", "mean_tokens": 20},
    "num_requests": 50,
}
AZURE = {"file": "a.csv", "format": "azure"}
MOONCAKE = {"file": "m.jsonl", "format": "mooncake"}
LENGTHS = {"file": "l.csv", "format": "lengths"}
PREFIXES = {"num_prefixes": 3, "tokens": 64}
SESSIONS = {"turns": 4, "think_time_s": 5}


@pytest.mark.parametrize(
    "given",
    [
        SYNTHETIC,
        {**SYNTHETIC, "shared_prefixes": PREFIXES},
        {**SYNTHETIC, "sessions": SESSIONS},
        {**SYNTHETIC, "sessions": SESSIONS, "shared_prefixes": PREFIXES},
        {"trace": AZURE},
        {"trace": {**AZURE, "start_s": 60, "duration_s": 600, "rate_scale": 2, "skip_requests": 5}},
        {"trace": MOONCAKE},
        {"trace": {**MOONCAKE, "jitter": False, "max_requests": 10}},
        {"trace": LENGTHS, "arrivals": SYNTHETIC["arrivals"]},
        {"trace": LENGTHS, "arrivals": {"process": "burst"}, "shared_prefixes": PREFIXES},
    ],
)
def test_valid_combinations_are_accepted(given: dict[str, Any]) -> None:
    config = WorkloadConfig.model_validate(given)
    assert {name for name in WorkloadConfig.model_fields if getattr(config, name) is not None} == set(given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "a workload without trace needs arrivals, prompt_tokens, output_tokens, num_requests"),
        ({k: v for k, v in SYNTHETIC.items() if k != "num_requests"}, "without trace needs num_requests"),
        ({"trace": LENGTHS}, "trace.format lengths needs arrivals"),
        (
            {"trace": AZURE, "arrivals": SYNTHETIC["arrivals"]},
            "does not go with arrivals (it has its own times",
        ),
        ({"trace": AZURE, "num_requests": 3}, "does not go with num_requests (trace.max_requests limits"),
        ({"trace": MOONCAKE, "sessions": SESSIONS}, "trace.format mooncake does not go with sessions"),
        ({"trace": LENGTHS, **SYNTHETIC}, "does not go with prompt_tokens, output_tokens, num_requests"),
        (
            {"trace": LENGTHS, "sessions": SESSIONS},
            "needs arrivals; trace.format lengths does not go with sessions",
        ),
    ],
)
def test_other_combinations_are_refused_plainly(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        WorkloadConfig.model_validate(given)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("arrivals", {"process": "poisson", "rate_per_s": -1}),
        ("arrivals", {"process": "poisson", "rate_per_s": 0}),
        ("arrivals", {"process": "poisson", "rate_per_s": float("inf")}),
        ("arrivals", {"process": "poisson", "rate_per_s": 1, "burstiness": 2}),
        ("arrivals", {"process": "gamma", "rate_per_s": 1}),
        ("arrivals", {"process": "gamma", "rate_per_s": 1, "burstiness": 0}),
        ("arrivals", {"process": "closed_loop", "concurrency": 0}),
        ("arrivals", {"process": "closed_loop", "concurrency": 1, "think_time_s": -1}),
        ("arrivals", {"process": "posson", "rate_per_s": 1}),
        ("prompt_tokens", {"law": "fixed", "tokens": 0}),
        ("prompt_tokens", {"law": "uniform", "mean_tokens": 10, "range_ratio": 1}),
        (
            "prompt_tokens",
            {"law": "lognormal", "median_tokens": 9, "sigma": 1, "min_tokens": 9, "max_tokens": 8},
        ),
        ("output_tokens", {"law": "geometric", "mean_tokens": 0.5}),
        ("num_requests", 0),
        ("shared_prefixes", {"tokens": 5, "zipf_exponent": 2}),
        ("sessions", {"turns": 0}),
    ],
)
def test_impossible_values_are_refused_where_they_stand(path: str, value: object) -> None:
    with pytest.raises(ValidationError) as caught:
        WorkloadConfig.model_validate({**SYNTHETIC, path: value})
    assert {error["loc"][0] for error in caught.value.errors()} == {path}


@pytest.mark.parametrize("key", ["start_s", "duration_s", "rate_scale", "jitter"])
def test_a_trace_without_times_has_no_keys_about_time(key: str) -> None:
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        WorkloadConfig.model_validate({"trace": {**LENGTHS, key: 1}, "arrivals": {"process": "burst"}})
