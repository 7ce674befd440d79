"""Which beams go on: the same however much is drawn at a time, in little memory."""

from __future__ import annotations

import tracemalloc

import pytest

from servesim.engine import beams
from servesim.engine.state import RequestState
from servesim.workload.request import Request


def parents_of(width: int, num_tokens: int) -> list[list[int]]:
    """For each token of a request the beams that its beams continue."""
    search = beams.BeamSearch(width, 0.4, 1)
    request = RequestState(Request(3, "r3", 0.0, 10, num_tokens), None, 1 << 20)
    found = []
    for request.num_output_tokens in range(1, num_tokens + 1):
        found.append(search.parents(request))
    return found


@pytest.mark.parametrize("width", [1, 3, 8])
def test_the_search_does_not_depend_on_how_much_is_drawn_at_a_time(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = parents_of(width, 200)
    assert whole[0] == [0] * width, "a prompt is one beam"
    assert all(0 <= parent < width for step in whole for parent in step)
    for pieces in (1, 1000):
        monkeypatch.setattr(beams, "_PIECES", pieces)
        assert parents_of(width, 200) == whole


def test_a_long_answer_of_many_beams_takes_little_memory() -> None:
    """All that is drawn for it would be 32 MB, several times over."""
    search = beams.BeamSearch(32, 0.4, 1)
    request = RequestState(Request(0, "r0", 0.0, 10, 2000), None, 1 << 20)
    request.num_output_tokens = 1
    tracemalloc.start()
    search.parents(request)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 8e6
