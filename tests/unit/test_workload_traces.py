"""Trace readers and replay: the shipped traces by their numbers, and every way a file can be wrong."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from servesim.config.workload import WorkloadConfig
from servesim.errors import TraceError
from servesim.workload.build import build_workload
from servesim.workload.request import Request, Segment, Workload
from servesim.workload.traces import read_azure, read_column, read_lengths, read_mooncake

SHIPPED = Path(__file__).parents[2] / "scenarios" / "traces"
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
ROW = "2023-11-16 18:15:46.6805900,374,44\r\n"
MOONCAKE_ROW = {"timestamp": 0, "input_length": 700, "output_length": 50, "hash_ids": [0, 1]}


def replay(folder: Path, file: str, form: str, seed: int = 1, **keys: Any) -> Workload:
    trace = {"file": file, "format": form, **keys}
    arrivals = {"arrivals": {"process": "burst"}} if form == "lengths" else {}
    config = WorkloadConfig.model_validate({"trace": trace, **arrivals})
    return build_workload(config, seed, lambda name: folder / name)


def shipped(file: str, form: str, **keys: Any) -> list[Request]:
    return list(replay(SHIPPED, file, form, **keys).arrivals())


def described(values: list[int]) -> tuple[float, ...]:
    return (
        round(float(np.mean(values)), 1),
        *np.percentile(values, [50, 95, 99]).round().tolist(),
        max(values),
    )


class TestShippedTraces:
    @pytest.mark.parametrize(
        ("file", "form", "count", "span_s", "cv", "prompt", "output"),
        [
            (
                "azure_llm_2023_code.csv.gz", "azure", 8819, 3435.948056, 13.15,
                (2047.8, 1469, 7303, 7436, 7437), (27.9, 13, 90, 251, 1899),
            ),
            (
                "azure_llm_2023_conv.csv.gz", "azure", 19366, 3501.721937, 1.09,
                (1154.7, 1020, 4083, 4142, 14050), (211.1, 129, 451, 601, 1000),
            ),
            (
                "mooncake_conversation.jsonl.gz", "mooncake", 12031, 3536.999, 3.03,
                (12035.1, 6909, 39550, 85400, 126195), (342.6, 350, 698, 1119, 2000),
            ),
        ],
    )  # fmt: skip
    def test_recorded(
        self, file: str, form: str, count: int, span_s: float, cv: float, prompt: Any, output: Any
    ) -> None:
        requests = shipped(file, form, **({"jitter": False} if form == "mooncake" else {}))
        arrivals = np.array([request.arrival_s for request in requests])
        gaps = np.diff(arrivals)
        assert len(requests) == count == replay(SHIPPED, file, form).num_requests
        assert arrivals[0] == 0
        assert arrivals[-1] == pytest.approx(span_s, abs=1e-9)
        assert round(gaps.std() / gaps.mean(), 2) == cv
        assert described([request.prompt_tokens for request in requests]) == prompt
        assert described([request.output_tokens for request in requests]) == output
        assert [request.index for request in requests] == list(range(count))
        assert [request.request_id for request in requests[:2]] == [
            f"line-{number}" for number in ([1, 2] if form == "mooncake" else [2, 3])
        ]

    @pytest.mark.parametrize(
        ("file", "count", "prompt", "output"),
        [
            (
                "vidur_arxiv_summarization.csv.gz", 28257,
                (2588.1, 2730, 3813, 3933, 4054), (291.4, 167, 736, 3271, 4056),
            ),
            (
                "sharegpt_lengths.csv.gz", 82814,
                (74.1, 20, 384, 780, 1023), (228.6, 217, 483, 607, 1046),
            ),
        ],
    )  # fmt: skip
    def test_lengths(self, file: str, count: int, prompt: Any, output: Any) -> None:
        requests = shipped(file, "lengths")
        assert len(requests) == count
        assert described([request.prompt_tokens for request in requests]) == prompt
        assert described([request.output_tokens for request in requests]) == output
        assert {request.arrival_s for request in requests} == {0.0}

    def test_arxiv_rows_stay_together(self) -> None:
        requests = shipped("vidur_arxiv_summarization.csv.gz", "lengths")
        assert max(request.prompt_tokens + request.output_tokens for request in requests) <= 4096
        assert requests[0][3:5] == (3772, 54)

    def test_mooncake_blocks_hit_as_recorded(self) -> None:
        requests = shipped("mooncake_conversation.jsonl.gz", "mooncake", jitter=False)
        assert len({request.arrival_s for request in requests}) == 1180
        names = [part.name for request in requests for part in request.prompt]
        assert round(100 * (1 - len(set(names)) / len(names)), 2) == 36.64
        for request in requests:
            *whole, last = request.prompt
            assert {part.num_tokens for part in whole} <= {512}
            assert sum(part.num_tokens for part in request.prompt) == request.prompt_tokens
            assert 1 <= last.num_tokens <= 512
            assert request.prompt[0].name == 0

    def test_azure_prompts_are_shared_with_nobody(self) -> None:
        assert {(r.prompt, r.output_name) for r in shipped("azure_llm_2023_code.csv.gz", "azure")} == {
            ((), None)
        }

    def test_the_readme_lists_every_file_with_its_checksums(self) -> None:
        rows = re.findall(
            r"^\| `(\S+)` \| `(\w{64})` \| `(\w{64})` \|$", (SHIPPED / "README.md").read_text(), re.M
        )
        assert {row[0] for row in rows} == {path.name for path in SHIPPED.iterdir()} - {"README.md"}
        for name, packed, content in rows:
            data = (SHIPPED / name).read_bytes()
            assert hashlib.sha256(data).hexdigest() == packed
            assert hashlib.sha256(gzip.decompress(data)).hexdigest() == content


class TestJitter:
    FILE = ("mooncake_conversation.jsonl.gz", "mooncake")

    def test_spreads_each_request_inside_its_bin(self) -> None:
        binned = {r.request_id: r for r in shipped(*self.FILE, jitter=False)}
        spread = shipped(*self.FILE)
        assert len({request.arrival_s for request in spread}) == len(spread)
        arrivals = np.array([request.arrival_s for request in spread])
        assert (np.diff(arrivals) > 0).all()
        moves = arrivals - np.array([binned[request.request_id].arrival_s for request in spread])
        moves -= moves.min()  # the clock starts at the first request
        assert moves.max() < 3.0
        # uniform on 3 s: |z| < 4.5 (99.999 %)
        assert abs(moves.mean() - 1.5) < 4.5 * 3 / np.sqrt(12 * len(moves)) + 0.001
        gaps = np.diff(arrivals)
        assert gaps.std() / gaps.mean() < 1.2  # against 3.03 in bins

    def test_changes_nothing_but_times_and_order_and_follows_the_seed(self) -> None:
        def content(requests: list[Request]) -> set[tuple[Any, ...]]:
            return {(r.request_id, *r[3:]) for r in requests}

        spread = shipped(*self.FILE)
        assert content(spread) == content(shipped(*self.FILE, jitter=False))
        assert spread == shipped(*self.FILE)
        assert spread != shipped(*self.FILE, seed=2)

    def test_a_slice_keeps_each_request_at_its_place(self) -> None:
        whole = {r.request_id: r.arrival_s for r in shipped(*self.FILE)}
        part = shipped(*self.FILE, start_s=600, duration_s=300)
        shifts = {round(whole[r.request_id] - r.arrival_s, 9) for r in part}
        assert len(shifts) == 1
        assert 600 - 3 < shifts.pop() < 601


class TestSlices:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        rows = "".join(
            f"2023-11-16 18:15:{second:02d}.0000000,{second + 1},1\n" for second in range(0, 60, 2)
        )
        (tmp_path / "a.csv").write_text(AZURE + rows)
        return tmp_path

    def kept(self, folder: Path, **keys: Any) -> list[tuple[float, int]]:
        return [
            (r.arrival_s, r.prompt_tokens - 1) for r in replay(folder, "a.csv", "azure", **keys).arrivals()
        ]

    def test_times_count_from_the_first_request_kept(self, folder: Path) -> None:
        assert self.kept(folder, start_s=10, duration_s=6) == [(0, 10), (2, 12), (4, 14)]
        assert self.kept(folder, start_s=11, duration_s=3) == [(0, 12)]
        assert self.kept(folder, skip_requests=27) == [(0, 54), (2, 56), (4, 58)]
        assert self.kept(folder, max_requests=2) == [(0, 0), (2, 2)]
        assert self.kept(folder, start_s=10, skip_requests=1, max_requests=1) == [(0, 12)]

    def test_rate_scale_speeds_the_clock_up(self, folder: Path) -> None:
        assert self.kept(folder, start_s=10, duration_s=6, rate_scale=4) == [(0, 10), (0.5, 12), (1, 14)]

    @pytest.mark.parametrize(
        "keys", [{"start_s": 59}, {"skip_requests": 30}, {"start_s": 11, "duration_s": 0.5}]
    )
    def test_nothing_left(self, folder: Path, keys: dict[str, Any]) -> None:
        with pytest.raises(
            TraceError, match=r"a\.csv  workload\.trace  no request of the trace is left .*-> lower"
        ):
            replay(folder, "a.csv", "azure", **keys)

    def test_lengths_are_sliced_by_row_and_named_by_column(self, tmp_path: Path) -> None:
        (tmp_path / "l.csv").write_text("in,x,out\n1,,5\n2,,6\n3,,7\n4,,8\n")
        source = replay(
            tmp_path,
            "l.csv",
            "lengths",
            prompt_column="in",
            output_column="out",
            skip_requests=1,
            max_requests=2,
        )
        assert [(r.index, r.prompt_tokens, r.output_tokens) for r in source.arrivals()] == [
            (0, 2, 6),
            (1, 3, 7),
        ]

    def test_no_lengths_left_speaks_of_what_lengths_have(self, tmp_path: Path) -> None:
        (tmp_path / "l.csv").write_text("num_prefill_tokens,num_decode_tokens\n1,5\n2,6\n")
        with pytest.raises(TraceError) as refused:
            replay(tmp_path, "l.csv", "lengths", skip_requests=2)
        assert str(refused.value).endswith("got 2 requests, skip_requests 2  -> lower skip_requests")


class TestGoodFiles:
    def test_plain_gzip_bom_zone_and_blank_lines(self, tmp_path: Path) -> None:
        path = tmp_path / "a.csv"
        text = "\ufeff" + AZURE + ROW + "\r\n" + "2023-11-16 18:15:46.6805901+00:00,1,2"
        for data in (text.encode(), gzip.compress(text.encode())):
            path.write_bytes(data)
            trace = read_azure(path)
            assert trace.times_s.tolist() == pytest.approx([0, 1e-7], rel=1e-12)  # 100 ns are not lost
            assert trace.lines.tolist() == [2, 4]

    def test_mooncake_blocks_of_another_size(self, tmp_path: Path) -> None:
        (tmp_path / "m.jsonl").write_text(json.dumps({**MOONCAKE_ROW, "input_length": 20}) + "\n")
        (request,) = replay(tmp_path, "m.jsonl", "mooncake", block_tokens=16).arrivals()
        assert request.prompt == (Segment(0, 16), Segment(1, 4))


TOKENS = "needs a whole number of tokens, at least 1"
NEXT = AZURE + ROW + "2023-11-16 18:15:47,"
BAD_CSV = {
    "": "a.csv  is empty  -> give a CSV file with the columns TIMESTAMP, ContextTokens, GeneratedTokens",
    AZURE: "a.csv  holds no requests  -> give a trace",
    AZURE.replace("ContextTokens", "ContextToken"): (
        "a.csv:1  ContextTokens  the column is missing  did you mean ContextToken?"
    ),
    NEXT + "5\r\n": "a.csv:3  the row has 2 columns instead of 3  got '2023-11-16 18:15:47,5'",
    AZURE + ROW + "yesterday,5,5\r\n": "a.csv:3  TIMESTAMP  is not a UTC time like",
    AZURE + ROW + "2023-13-16 18:15:47,5,5\r\n": "a.csv:3  TIMESTAMP  is not a time that exists  got",
    AZURE + ROW + "2023-11-16 18:15:45,5,5\r\n": (
        "a.csv:3  TIMESTAMP  is earlier than the row before (2023-11-16 18:15:46.6805900)"
    ),
    NEXT + "0,5\r\n": f"a.csv:3  ContextTokens  {TOKENS}  got '0'",
    NEXT + "-4,5\r\n": f"a.csv:3  ContextTokens  {TOKENS}  got '-4'",
    NEXT + "5,1.5\r\n": f"a.csv:3  GeneratedTokens  {TOKENS}  got '1.5'",
    NEXT + "5,\r\n": f"a.csv:3  GeneratedTokens  {TOKENS}  got nothing",
    NEXT + "5,99999999999\r\n": f"a.csv:3  GeneratedTokens  {TOKENS}  got '99999999999'",
    AZURE + '"2023': "a.csv  is not a CSV file (unexpected end of data)",
}


def changed(**keys: Any) -> str:
    return json.dumps(MOONCAKE_ROW | keys)


BAD_JSON = {
    "": "m.jsonl  holds no requests",
    "[1, 2]": "m.jsonl:2  the line is no JSON object with hash_ids, input_length, output_length, timestamp",
    '{"timestamp": 0,': "m.jsonl:2  the line is no JSON object",
    '{"timestamp": 0, "input_length": 1, "output_length": 1}': "no JSON object with hash_ids  got",
    changed(timestamp=-1): "m.jsonl:2  timestamp  needs milliseconds, at least 0  got -1",
    changed(timestamp=float("nan")): "m.jsonl:2  timestamp  needs milliseconds, at least 0  got nan",
    changed(input_length=0): f"m.jsonl:2  input_length  {TOKENS}  got 0",
    changed(output_length=True): f"m.jsonl:2  output_length  {TOKENS}  got True",
    changed(
        hash_ids=[0]
    ): "m.jsonl:2  hash_ids  holds 1 ids instead of 2, one for every 512 tokens of input_length",
    changed(hash_ids=[0, "a"]): "m.jsonl:2  hash_ids  needs a list of whole numbers",
    changed(hash_ids=[0, 2**63]): "m.jsonl:2  hash_ids  needs a list of whole numbers",
    changed(hash_ids=[]): "m.jsonl:2  hash_ids  needs a list of whole numbers",
}


class TestBadFiles:
    @pytest.mark.parametrize(("text", "message"), BAD_CSV.items())
    def test_csv(self, tmp_path: Path, text: str, message: str) -> None:
        (tmp_path / "a.csv").write_text(text)
        with pytest.raises(TraceError) as caught:
            read_azure(tmp_path / "a.csv")
        assert message in str(caught.value)
        assert "  -> " in str(caught.value)

    @pytest.mark.parametrize(("line", "message"), BAD_JSON.items())
    def test_json(self, tmp_path: Path, line: str, message: str) -> None:
        good = json.dumps(MOONCAKE_ROW) + "\n" if line else ""
        (tmp_path / "m.jsonl").write_text(good + line + "\n")
        with pytest.raises(TraceError) as caught:
            read_mooncake(tmp_path / "m.jsonl", 512)
        assert message in str(caught.value)
        assert len(caught.value.problems) == 1

    def test_json_times_do_not_decrease(self, tmp_path: Path) -> None:
        rows = [MOONCAKE_ROW | {"timestamp": 3000}, MOONCAKE_ROW]
        (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
        with pytest.raises(TraceError, match=r"m\.jsonl:2  timestamp  is earlier than the row before \(3000"):
            read_mooncake(tmp_path / "m.jsonl", 512)

    def test_ten_bad_rows_are_listed_at_once(self, tmp_path: Path) -> None:
        (tmp_path / "a.csv").write_text(AZURE + ROW + "x,1,1\n" * 50)
        with pytest.raises(TraceError) as caught:
            read_azure(tmp_path / "a.csv")
        assert [problem.line for problem in caught.value.problems] == list(range(3, 13))

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (None, "a.csv  the trace file does not exist  -> "),
            (
                gzip.compress((AZURE + ROW * 99).encode())[:-20],
                "a.csv  the gzip file ends too early  -> copy it again",
            ),
            (b"\x1f\x8b\x08\x00" + b"\x00" * 40, "a.csv  the gzip file is damaged"),
            (b"\x1f\x8bnonsense", "a.csv  the gzip file is damaged"),
            (AZURE.encode() + b"\xff\xfe\xff", "a.csv  is not UTF-8 text  -> "),
        ],
        ids=["missing", "truncated", "damaged", "not gzip", "binary"],
    )
    def test_files_that_cannot_be_read(self, tmp_path: Path, data: bytes | None, message: str) -> None:
        path = tmp_path / "a.csv"
        if data is not None:
            path.write_bytes(data)
        with pytest.raises(TraceError) as caught:
            read_azure(path)
        assert message in str(caught.value)

    def test_a_folder_is_no_trace(self, tmp_path: Path) -> None:
        with pytest.raises(TraceError, match=r"cannot be read \(Is a directory\)"):
            read_azure(tmp_path)

    def test_an_empirical_column_is_checked_as_strictly(self, tmp_path: Path) -> None:
        (tmp_path / "l.csv").write_text("a\n5\n0\n")
        law = {"law": "empirical", "file": "l.csv", "column": "a"}
        config = WorkloadConfig.model_validate(
            {"arrivals": {"process": "burst"}, "prompt_tokens": law, "output_tokens": law, "num_requests": 5}
        )
        with pytest.raises(TraceError, match=r"l\.csv:3  a  needs a whole number of tokens"):
            build_workload(config, 1, lambda name: tmp_path / name)


LINES = {
    "azure": AZURE + "".join(f"2023-11-16 18:15:{s:02d}.6805900,{s + 1},44\r\n" for s in range(9)),
    "lengths": "num_prefill_tokens,num_decode_tokens\n" + "".join(f"{k + 1},{k + 7}\n" for k in range(9)),
    "mooncake": "".join(json.dumps(MOONCAKE_ROW | {"timestamp": 3000 * k}) + "\n" for k in range(5)),
}


@pytest.mark.parametrize("form", LINES)
@pytest.mark.parametrize("packed", [False, True])
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_a_damaged_file_is_read_whole_or_refused(
    tmp_path_factory: pytest.TempPathFactory, form: str, packed: bool, data: st.DataObject
) -> None:
    """Any damage gives either a sound workload or a TraceError that names the file, and nothing else."""
    good = LINES[form].encode()
    content = bytearray(gzip.compress(good, mtime=0) if packed else good)
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(content)))
        stop = data.draw(st.integers(start, min(len(content), start + 30)))
        content[start:stop] = data.draw(
            st.binary(max_size=4) | st.sampled_from([b"-", b",", b"\n", b'"', b"9" * 30])
        )
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(content)
    refused = None
    try:
        source = replay(path.parent, path.name, form)
    except TraceError as error:
        refused = error
    if refused is not None:
        assert all(problem.file == str(path) and problem.problem for problem in refused.problems)
        return
    requests = list(source.arrivals())
    assert len(requests) == source.num_requests >= 1
    assert all(request.prompt_tokens >= 1 and request.output_tokens >= 1 for request in requests)
    assert all(
        sum(part.num_tokens for part in request.prompt) == request.prompt_tokens
        for request in requests
        if request.prompt
    )
    arrivals = [request.arrival_s for request in requests]
    assert arrivals == sorted(arrivals)
    assert arrivals[0] == 0


def test_a_column_tells_each_bad_row_once_up_to_ten(tmp_path: Path) -> None:
    path = tmp_path / "c.csv"
    path.write_text("x,tokens\n" + "1,7\n" + 12 * "1,none\n")
    with pytest.raises(TraceError) as refused:
        read_column(path, "tokens")
    assert [problem.line for problem in refused.value.problems] == list(range(3, 13))
    path.write_text("x,tokens\n1,7\n\n2,8\n")
    assert read_column(path, "tokens").tolist() == [7, 8]


def test_readers_give_columns_of_one_length() -> None:
    trace = read_lengths(SHIPPED / "sharegpt_lengths.csv.gz", "num_prefill_tokens", "num_decode_tokens")
    assert len(trace.prompt_tokens) == len(trace.output_tokens) == len(trace.lines) == 82814
    trace = read_mooncake(SHIPPED / "mooncake_conversation.jsonl.gz", 512)
    assert trace.block_starts[-1] == len(trace.block_ids) == 288_500
    assert Counter(trace.block_ids.tolist())[0] == 12031
