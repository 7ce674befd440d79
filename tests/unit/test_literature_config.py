"""Allocators and schedulers of the literature in a scenario: what goes together, and what is said if not."""

from __future__ import annotations

import pytest

from servesim import api
from servesim.config.load import load_scenario
from servesim.errors import ConfigError, MemoryDoesNotFitError

FEW = "workload.trace.max_requests=30"


def overrides(*pairs: str) -> list[str]:
    return [FEW, *(f"engine.{pair}" for pair in pairs)]


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        (("batching=static",), "engine.batching  static needs a contiguous allocator"),
        (("contiguous_fit=buddy",), "engine.contiguous_fit  needs a contiguous allocator"),
        (("allocator=contiguous-max", "watermark=0.1"), "engine.watermark  needs allocator: paged"),
        (
            ("batching=orca", "async_scheduling=true"),
            "engine.async_scheduling  does not go with batching: orca",
        ),
        (("batching=orca", "max_num_batched_tokens=4096"), "engine.max_num_batched_tokens  does not go with"),
        (("batching=prefill-first", "long_prefill_token_threshold=9"), "does not go with batching: prefill"),
        (("batching=orca", "enable_chunked_prefill=true"), "engine.enable_chunked_prefill  does not go with"),
        (("batching=statics",), "did you mean static?"),
        (("allocator=contiguous-pow",), "did you mean contiguous-pow2?"),
        (("contiguous_fit=worst",), "did you mean first?"),
    ],
)
def test_what_does_not_go_together_is_refused(pairs: tuple[str, ...], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_scenario("chat-1000", overrides(*pairs))
    assert words in str(caught.value)
    assert "->" in str(caught.value) or "did you mean" in str(caught.value) or "allowed" in str(caught.value)


def test_a_longest_request_that_no_piece_of_the_pool_takes_is_refused() -> None:
    """40,000 slots: a buddy system's largest chunk has 32,768, a request of 33,000 would need 65,536."""
    given = overrides("allocator=contiguous-max", "max_model_len=33000", "kv_cache_memory_bytes=5242880000")
    assert api.simulate("chat-1000", overrides=given).summary.completed == 30
    with pytest.raises(MemoryDoesNotFitError, match="needs 65,536 slots, the next power of two") as caught:
        api.simulate("chat-1000", overrides=[*given, "engine.contiguous_fit=buddy"])
    assert "set engine.max_model_len to at most 32768" in str(caught.value)


@pytest.mark.parametrize("batching", ["continuous", "static", "orca", "prefill-first"])
@pytest.mark.parametrize("allocator", ["paged", "contiguous-max", "contiguous-pow2", "contiguous-oracle"])
def test_every_pair_that_is_allowed_serves_everybody(allocator: str, batching: str) -> None:
    if (allocator, batching) == ("paged", "static"):
        pytest.skip("refused")
    given = overrides(f"allocator={allocator}", f"batching={batching}", "kv_cache_memory_bytes=700000000")
    summary = api.simulate("chat-1000", overrides=given).summary
    assert summary.completed == 30
    assert summary.kv.adds_up
    assert summary.load.peak_waiting > 0
    assert sum(summary.load.admission_failures.values()) > 0


def test_the_reasons_for_waiting_are_told_apart() -> None:
    """Holes and too little memory keep reservations out, seats keep a static batch closed."""
    given = [*overrides("allocator=contiguous-oracle")[1:], "workload.trace.max_requests=300"]
    orca = api.simulate("chat-1000", overrides=[*given, "engine.batching=orca"]).summary.load
    assert orca.admission_failures["fit"] > 0
    assert orca.admission_failures["memory"] > 0
    assert orca.admission_failures["seats"] == 0
    static = api.simulate("chat-1000", overrides=[*given, "engine.batching=static"]).summary.load
    assert static.admission_failures["seats"] > 0


def test_old_schedulers_have_one_step_in_flight_and_whole_prompts() -> None:
    loaded = load_scenario("chat-1000", overrides("batching=orca", "allocator=contiguous-max"))
    engine = api.simulate(loaded).run.scenario.engine
    assert not engine.async_scheduling
    assert not engine.enable_chunked_prefill
