"""Synthetic workloads: arrivals, lengths, system prompts, sessions, closed loops.

The statistical bounds are |z| < 4.5 (99.999 %), on fixed seeds.
"""

from __future__ import annotations

import heapq
import math
import tracemalloc
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from servesim.config.workload import WorkloadConfig
from servesim.workload.build import build_workload
from servesim.workload.request import Request, Segment, Workload

N = 100_000
Z_LIMIT = 4.5
POISSON = {"process": "poisson", "rate_per_s": 8.0}
FIXED = {"law": "fixed", "tokens": 10}


def workload(seed: int = 1, folder: Path = Path(), **given: Any) -> Workload:
    base = {"arrivals": POISSON, "prompt_tokens": FIXED, "output_tokens": FIXED, "num_requests": 1000}
    return build_workload(WorkloadConfig.model_validate(base | given), seed, lambda name: folder / name)


def serve(source: Workload, service_s: float = 1.0) -> list[tuple[Request, float]]:
    """Every request with its finish, each served in the same time, in order of finish."""
    arrivals = [(request.arrival_s + service_s, request.index, request) for request in source.arrivals()]
    heapq.heapify(arrivals)
    finished = []
    while arrivals:
        finish_s, _, request = heapq.heappop(arrivals)
        finished.append((request, finish_s))
        released = source.follow_up(request, finish_s)
        if released is not None:
            assert released.arrival_s >= finish_s
            heapq.heappush(arrivals, (released.arrival_s + service_s, released.index, released))
    return finished


def times(count: int = N, seed: int = 1, **arrivals: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    source = workload(seed, arrivals=arrivals, num_requests=count)
    return np.array([request.arrival_s for request in source.arrivals()])


def lengths(law: dict[str, Any], folder: Path = Path()) -> np.ndarray[Any, np.dtype[np.int64]]:
    source = workload(2, folder, output_tokens=law, num_requests=N)
    return np.array([request.output_tokens for request in source.arrivals()])


def assert_mean(values: np.ndarray[Any, Any], mean: float, deviation: float) -> None:
    assert abs(values.mean() - mean) < Z_LIMIT * deviation / math.sqrt(len(values))


class TestArrivals:
    def test_poisson_gaps_have_mean_and_deviation_of_one_over_rate(self) -> None:
        gaps = np.diff(times(**POISSON), prepend=0.0)
        assert_mean(gaps, 1 / 8, 1 / 8)
        assert_mean((gaps - 1 / 8) ** 2, 1 / 64, math.sqrt(8) / 64)  # E[(X - 1)^4] - 1 = 8 for mean 1

    def test_poisson_counts_are_as_variable_as_their_mean(self) -> None:
        arrivals = times(**POISSON)
        counts = np.histogram(arrivals, bins=np.arange(0, math.floor(arrivals[-1])))[0]
        assert_mean(counts, 8, math.sqrt(8))
        assert abs(counts.var() / 8 - 1) < Z_LIMIT * math.sqrt((2 + 1 / 8) / len(counts))

    @pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
    def test_gamma_gaps_have_the_burstiness_as_shape(self, burstiness: float) -> None:
        gaps = np.diff(times(process="gamma", rate_per_s=8, burstiness=burstiness), prepend=0.0) * 8
        assert_mean(gaps, 1, burstiness**-0.5)
        assert_mean((gaps - 1) ** 2, 1 / burstiness, math.sqrt(2 + 6 / burstiness) / burstiness)

    def test_constant_and_burst(self) -> None:
        assert times(4, process="constant", rate_per_s=8).tolist() == [0, 0.125, 0.25, 0.375]
        assert times(3, process="burst").tolist() == [0, 0, 0]

    @pytest.mark.parametrize("process", [POISSON, {"process": "gamma", "rate_per_s": 8, "burstiness": 0.3}])
    def test_another_rate_is_the_same_stream_on_another_clock(self, process: dict[str, Any]) -> None:
        faster = process | {"rate_per_s": 32}
        assert (times(20_000, **faster) * 4).tolist() == times(20_000, **process).tolist()

    @pytest.mark.parametrize("burstiness", [1e-3, 0.5, 1.0])
    def test_exact_rate_puts_the_last_request_where_vllm_bench_does(self, burstiness: float) -> None:
        law = {"process": "gamma", "rate_per_s": 8, "burstiness": burstiness}
        plain, exact = times(20_000, **law), times(20_000, **law, exact_rate=True)
        assert exact[-1] == pytest.approx(20_000 / 8, rel=1e-12)
        assert exact == pytest.approx(plain * (exact[-1] / plain[-1]), rel=1e-12)

    def test_exact_rate_of_one_request_without_gap(self) -> None:
        law = {"process": "gamma", "rate_per_s": 8, "burstiness": 1e-3}
        assert times(1, **law).tolist() == [0.0] == times(1, **law, exact_rate=True).tolist()


class TestLengths:
    @pytest.mark.parametrize(
        ("mean", "ratio", "low", "high"), [(100, 0.0, 100, 100), (101, 0.25, 75, 127), (3, 0.9, 1, 6)]
    )
    def test_uniform_takes_every_length_of_its_range(
        self, mean: int, ratio: float, low: int, high: int
    ) -> None:
        drawn = lengths({"law": "uniform", "mean_tokens": mean, "range_ratio": ratio})
        counts = np.bincount(drawn)[low:]
        assert (drawn.min(), drawn.max(), len(counts)) == (low, high, high - low + 1)
        share = 1 / len(counts)
        assert np.abs(counts / N - share).max() <= Z_LIMIT * math.sqrt(share * (1 - share) / N)

    def test_lognormal_moments(self) -> None:
        drawn = lengths({"law": "lognormal", "median_tokens": 500, "sigma": 0.8})
        mean = 500 * math.exp(0.32)
        assert_mean(drawn, mean, mean * math.sqrt(math.expm1(0.64)))
        assert_mean(np.log(drawn), math.log(500), 0.8)

    def test_lognormal_is_cut_off_at_its_bounds(self) -> None:
        drawn = lengths(
            {"law": "lognormal", "median_tokens": 100, "sigma": 1, "min_tokens": 50, "max_tokens": 300}
        )
        assert (drawn.min(), drawn.max()) == (50, 300)
        below = 0.5 * (1 + math.erf(math.log(50.5 / 100) / math.sqrt(2)))
        assert_mean(drawn == 50, below, math.sqrt(below * (1 - below)))

    @pytest.mark.parametrize("mean", [1.0, 1.5, 200.0])
    def test_geometric_moments_and_tail(self, mean: float) -> None:
        drawn = lengths({"law": "geometric", "mean_tokens": mean})
        assert drawn.min() == 1
        stop = 1 / mean
        assert_mean(drawn, mean, math.sqrt(1 - stop) / stop + 1e-12)
        tail = (1 - stop) ** 3
        assert_mean(drawn > 3, tail, math.sqrt(tail * (1 - tail)) + 1e-12)

    @pytest.mark.parametrize("shape", [0.5, 1.29, 20.0])
    def test_gamma_moments(self, shape: float) -> None:
        drawn = lengths({"law": "gamma", "mean_tokens": 5000, "shape": shape})
        assert_mean(drawn, 5000, 5000 / math.sqrt(shape))
        assert drawn.std() == pytest.approx(5000 / math.sqrt(shape), rel=0.05)
        assert drawn.min() >= 1
        assert lengths({"law": "gamma", "mean_tokens": 5000, "shape": shape, "max_tokens": 60}).max() == 60

    def test_an_empirical_column_is_rescaled_to_a_mean_and_then_cut(self, tmp_path: Path) -> None:
        (tmp_path / "l.csv").write_text("a\n1\n10\n10\n19\n")
        law = {"law": "empirical", "file": "l.csv", "column": "a", "mean_tokens": 4}
        assert set(lengths(law, tmp_path).tolist()) == {1, 4, 8}
        assert set(lengths(law | {"max_tokens": 5}, tmp_path).tolist()) == {1, 4, 5}

    def test_empirical_draws_each_row_alike(self, tmp_path: Path) -> None:
        (tmp_path / "l.csv").write_text("a,b\n7,1\n7,2\n9,3\n11,4\n")
        drawn = lengths({"law": "empirical", "file": "l.csv", "column": "a"}, tmp_path)
        assert set(drawn.tolist()) == {7, 9, 11}
        assert_mean(drawn == 7, 0.5, 0.5)

    def test_prompt_and_output_are_drawn_apart(self) -> None:
        law = {"law": "lognormal", "median_tokens": 500, "sigma": 0.5}
        source = workload(prompt_tokens=law, output_tokens=law, num_requests=N)
        pairs = np.log([(r.prompt_tokens, r.output_tokens) for r in source.arrivals()])
        assert abs(np.corrcoef(pairs.T)[0, 1]) < Z_LIMIT / math.sqrt(N)


class TestCommonRandomNumbers:
    LAWS: ClassVar[dict[str, Any]] = {
        "prompt_tokens": {"law": "lognormal", "median_tokens": 500, "sigma": 1},
        "output_tokens": {"law": "geometric", "mean_tokens": 100},
        "shared_prefixes": {"num_prefixes": 5, "tokens": 32},
    }

    def test_more_requests_extend_the_same_workload(self) -> None:
        few, many = workload(**self.LAWS, num_requests=9000), workload(**self.LAWS, num_requests=20_000)
        assert list(few.arrivals()) == list(islice(many.arrivals(), 9000))

    def test_one_law_changes_nothing_else(self) -> None:
        plain = list(workload(**self.LAWS).arrivals())
        changed = list(workload(**(self.LAWS | {"output_tokens": FIXED})).arrivals())
        assert [r._replace(output_tokens=10) for r in plain] == changed

    def test_a_workload_can_be_read_again_and_a_seed_matters(self) -> None:
        source = workload(**self.LAWS)
        assert list(source.arrivals()) == list(source.arrivals()) != list(workload(2, **self.LAWS).arrivals())


class TestSharedPrefixes:
    def test_each_request_begins_with_a_system_prompt(self) -> None:
        for request in workload(shared_prefixes={"num_prefixes": 2, "tokens": 64}).arrivals():
            system, user = request.prompt
            assert system in (Segment(("system", 0), 64), Segment(("system", 1), 64))
            assert user == Segment(None, 10)
            assert (request.prompt_tokens, request.output_name) == (74, None)

    @pytest.mark.parametrize(("popularity", "weights"), [("uniform", [1, 1, 1, 1]), ("zipf", [12, 6, 4, 3])])
    def test_popularity(self, popularity: str, weights: list[int]) -> None:
        prefixes = {"num_prefixes": 4, "tokens": 1, "popularity": popularity}
        source = workload(shared_prefixes=prefixes, num_requests=N)
        counts = Counter(request.prompt[0].name for request in source.arrivals())
        for k, weight in enumerate(weights):
            share = weight / sum(weights)
            assert abs(counts[("system", k)] / N - share) < Z_LIMIT * math.sqrt(share * (1 - share) / N)


class TestSessions:
    GIVEN: ClassVar[dict[str, Any]] = {
        "sessions": {"turns": 3, "think_time_s": 5.0},
        "prompt_tokens": {"law": "uniform", "mean_tokens": 100, "range_ratio": 0.5},
        "num_requests": 3000,
    }

    def test_every_turn_repeats_the_talk_so_far_and_adds_to_it(self) -> None:
        served = {request.index: (request, finish_s) for request, finish_s in serve(workload(**self.GIVEN))}
        assert sorted(served) == list(range(3000))
        for index, (request, _) in served.items():
            assert sum(part.num_tokens for part in request.prompt) == request.prompt_tokens
            assert request.request_id == f"session-{index // 3}-turn-{index % 3}"
            if index % 3:
                last, finish_s = served[index - 1]
                assert request.arrival_s == finish_s + 5.0
                assert request.prompt[:-1] == (*last.prompt, Segment(last.output_name, last.output_tokens))
                assert last.output_name is not None
                assert None not in [part.name for part in request.prompt[:-1]]
            else:
                assert len(request.prompt) == 1
            if index % 3 == 2:
                assert (request.output_name, request.prompt[-1].name) == (None, None)

    def test_no_two_texts_share_a_name(self) -> None:
        names = Counter(
            name
            for request, _ in serve(workload(**self.GIVEN))
            for name in (request.prompt[-1].name, request.output_name)
            if name is not None
        )
        assert set(names.values()) == {1}
        assert len(names) == 2 * 2000

    def test_the_system_prompt_belongs_to_the_session(self) -> None:
        given = self.GIVEN | {"shared_prefixes": {"num_prefixes": 4, "tokens": 50}}
        by_session: dict[int, set[Segment]] = {}
        for request, _ in serve(workload(**given)):
            by_session.setdefault(request.index // 3, set()).add(request.prompt[0])
        assert {len(prompts) for prompts in by_session.values()} == {1}
        assert len(set.union(*by_session.values())) == 4

    def test_the_last_session_is_cut_at_num_requests(self) -> None:
        served = serve(workload(**(self.GIVEN | {"num_requests": 8})))
        assert sorted(request.index for request, _ in served) == list(range(8))
        last = next(request for request, _ in served if request.index == 7)
        assert (last.output_name, last.prompt[-1].name) == (None, None)

    def test_what_is_asked_does_not_depend_on_how_fast_it_is_served(self) -> None:
        given = self.GIVEN | {"sessions": {"turns": 3, "think_time_s": 5.0, "think_time_law": "exponential"}}

        def asked(service_s: float) -> dict[int, tuple[Any, ...]]:
            served = serve(workload(**given), service_s)
            thinks = {r.index: r.arrival_s for r, _ in served}
            ends = {r.index: finish_s for r, finish_s in served}
            return {
                r.index: (r.prompt, r.output_tokens, round(thinks[r.index] - ends[r.index - 1], 6))
                for r, _ in served
                if r.index % 3
            }

        assert asked(1.0) == asked(30.0)

    def test_exponential_think_time_has_its_mean(self) -> None:
        think = {"turns": 2, "think_time_s": 5.0, "think_time_law": "exponential"}
        served = serve(workload(sessions=think, num_requests=40_000))
        ends = {request.index: finish_s for request, finish_s in served}
        gaps = np.array([r.arrival_s - ends[r.index - 1] for r, _ in served if r.index % 2])
        assert_mean(gaps, 5, 5)


class TestClosedLoop:
    def test_concurrency_is_kept_to_the_end(self) -> None:
        arrivals = {"process": "closed_loop", "concurrency": 7, "think_time_s": 2.0}
        served = serve(workload(arrivals=arrivals, num_requests=100))
        assert sorted(request.index for request, _ in served) == list(range(100))
        starts = sorted(request.arrival_s for request, _ in served)
        assert starts[:7] == [0.0] * 7
        # every user sends once per service (1 s) and think time (2 s)
        assert starts == [3.0 * (index // 7) for index in range(100)]

    def test_fewer_requests_than_users(self) -> None:
        arrivals = {"process": "closed_loop", "concurrency": 7}
        assert len(serve(workload(arrivals=arrivals, num_requests=3))) == 3

    def test_sessions_follow_one_another(self) -> None:
        arrivals = {"process": "closed_loop", "concurrency": 2, "think_time_s": 10.0}
        source = workload(arrivals=arrivals, sessions={"turns": 3, "think_time_s": 1.0}, num_requests=12)
        served = {request.index: request.arrival_s for request, _ in serve(source)}
        assert served == {0: 0, 1: 2, 2: 4, 3: 0, 4: 2, 5: 4, 6: 15, 7: 17, 8: 19, 9: 15, 10: 17, 11: 19}

    def test_a_second_simulation_starts_afresh(self) -> None:
        source = workload(arrivals={"process": "closed_loop", "concurrency": 5}, num_requests=50)
        assert serve(source) == serve(source)


def test_a_million_requests_stream_in_a_few_megabytes() -> None:
    law = {"law": "lognormal", "median_tokens": 500, "sigma": 1}
    source = workload(prompt_tokens=law, output_tokens=law, num_requests=1_000_000)
    tracemalloc.start()
    try:
        ordered = all(a.arrival_s <= b.arrival_s for a, b in pairwise(islice(source.arrivals(), 100_000)))
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert ordered
    assert peak_bytes < 5e6
