"""Recorded requests: strict readers of the trace formats, each into columns of numbers.

A reader takes the whole file or refuses it: up to ten bad rows are listed, each with file and line.
"""

from __future__ import annotations

import csv
import gzip
import json
import math
import re
import zlib
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

import numpy as np

from servesim.errors import Problem, TraceError, did_you_mean
from servesim.workload.streams import FloatArray, IntArray

__all__ = ["Trace", "read_azure", "read_column", "read_csv", "read_lengths", "read_mooncake"]

_MOST_PROBLEMS = 10
_MOST_TOKENS = 1_000_000_000
_TOKENS_HINT = "needs a whole number of tokens, at least 1"
_AZURE_TIME = re.compile(r"(20\d\d-\d\d-\d\d[ T]\d\d:\d\d:\d\d(?:\.\d{1,9})?)(?:Z|\+00:00)?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Trace:
    """Columns of a trace in the order of its file.

    ``times_s`` counts from the first row, without decrease, and is empty for a trace of lengths only.
    Row r has the prefix blocks ``block_ids[block_starts[r]:block_starts[r + 1]]``; both are empty for a
    format without them.  ``lines`` holds each row's line in the file.
    """

    times_s: FloatArray
    prompt_tokens: IntArray
    output_tokens: IntArray
    lines: IntArray
    block_ids: IntArray
    block_starts: IntArray


def read_azure(path: Path) -> Trace:
    """Azure LLM inference trace: UTC times of up to 9 fractional digits, with or without +00:00."""
    times: list[str] = []
    prompt_tokens, output_tokens, lines = array("q"), array("q"), array("q")
    faults = _Faults(path)
    with _opened(path) as file:
        for line, (time, prompt, output) in _csv_rows(
            path, file, ("TIMESTAMP", "ContextTokens", "GeneratedTokens"), faults
        ):
            match = _AZURE_TIME.fullmatch(time)
            if match is None:
                faults.add(line, "TIMESTAMP", "is not a UTC time like 2023-11-16 18:15:46.6805900", time)
                continue
            times.append(match[1])
            prompt_tokens.append(faults.tokens(line, "ContextTokens", prompt))
            output_tokens.append(faults.tokens(line, "GeneratedTokens", output))
            lines.append(line)
    faults.raise_if_any()
    try:
        stamps = np.array(times, dtype="datetime64[ns]").astype(np.int64)
    except ValueError:
        stamps = np.array([_nanoseconds(*row, faults) for row in zip(times, lines, strict=True)])
    faults.raise_if_any()
    _refuse_decrease(stamps, lines, "TIMESTAMP", times, faults)
    return _trace(path, _seconds(stamps, 1e9), prompt_tokens, output_tokens, lines)


def read_csv(path: Path, arrival_column: str, prompt_column: str, output_column: str) -> Trace:
    """A CSV with a column of arrival times in seconds, counted from anywhere, and two of lengths."""
    times_s, prompt_tokens, output_tokens, lines = array("d"), array("q"), array("q"), array("q")
    faults = _Faults(path)
    with _opened(path) as file:
        columns = (arrival_column, prompt_column, output_column)
        for line, (time, prompt, output) in _csv_rows(path, file, columns, faults):
            times_s.append(faults.seconds(line, arrival_column, time))
            prompt_tokens.append(faults.tokens(line, prompt_column, prompt))
            output_tokens.append(faults.tokens(line, output_column, output))
            lines.append(line)
    faults.raise_if_any()
    stamps = np.array(times_s)
    _refuse_decrease(stamps, lines, arrival_column, times_s, faults)
    return _trace(path, _seconds(stamps, 1.0), prompt_tokens, output_tokens, lines)


def read_lengths(path: Path, prompt_column: str, output_column: str) -> Trace:
    """A CSV with a column of prompt lengths and one of output lengths, and no use made of any other."""
    (prompt_tokens, output_tokens), lines = _lengths(path, (prompt_column, output_column))
    return _trace(path, np.empty(0), prompt_tokens, output_tokens, lines)


def read_column(path: Path, column: str) -> IntArray:
    """One column of lengths of a CSV."""
    (tokens,), lines = _lengths(path, (column,))
    return _trace(path, np.empty(0), tokens, tokens, lines).prompt_tokens


def _lengths(path: Path, columns: Sequence[str]) -> tuple[list[array[int]], array[int]]:
    """The numbers of tokens in each of the columns, and the line of each row."""
    found, lines = [array("q") for _ in columns], array("q")
    faults = _Faults(path)
    with _opened(path) as file:
        for line, row in _csv_rows(path, file, columns, faults):
            for tokens, column, text in zip(found, columns, row, strict=True):
                tokens.append(faults.tokens(line, column, text))
            lines.append(line)
    faults.raise_if_any()
    return found, lines


def read_mooncake(path: Path, block_tokens: int) -> Trace:
    """Mooncake trace: JSON lines with times in ms and one hash id per ``block_tokens`` of the prompt."""
    times_ms, block_starts = array("d"), array("q", [0])
    prompt_tokens, output_tokens, lines, block_ids = array("q"), array("q"), array("q"), array("q")
    faults = _Faults(path)
    with _opened(path) as file:
        for line, text in enumerate(file, start=1):
            if not text.strip():
                continue
            row = _json_object(text)
            fault = _mooncake_fault(row, block_tokens)
            if fault is not None:
                faults.add(line, *fault)
                continue
            times_ms.append(row["timestamp"])
            prompt_tokens.append(row["input_length"])
            output_tokens.append(row["output_length"])
            lines.append(line)
            block_ids.extend(row["hash_ids"])
            block_starts.append(len(block_ids))
    faults.raise_if_any()
    stamps = np.array(times_ms)
    _refuse_decrease(stamps, lines, "timestamp", times_ms, faults)
    return _trace(path, _seconds(stamps, 1e3), prompt_tokens, output_tokens, lines, block_ids, block_starts)


class _Faults:
    """The bad rows of a file; reading stops at the tenth."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._problems: list[Problem] = []

    def add(self, line: int, column: str, problem: str, got: object) -> None:
        shown = "nothing" if got is None or got == "" else f"{got!r:.60}"
        self._problems.append(
            Problem(
                problem,
                file=str(self._path),
                line=line,
                path=column,
                got=shown,
                next_step="mend or remove the row",
            )
        )
        if len(self._problems) >= _MOST_PROBLEMS:
            self.raise_if_any()

    def tokens(self, line: int, column: str, text: str) -> int:
        """The text as a number of tokens; 0, with a fault noted, when it is none."""
        if (
            text.isascii()
            and text.isdigit()
            and len(text) <= 10
            and 1 <= (number := int(text)) <= _MOST_TOKENS
        ):
            return number
        self.add(line, column, _TOKENS_HINT, text)
        return 0

    def seconds(self, line: int, column: str, text: str) -> float:
        """The text as a finite number; 0, with a fault noted, when it is none."""
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            self.add(line, column, "needs a time in seconds", text)
            return 0.0
        return number

    def raise_if_any(self) -> None:
        if self._problems:
            raise TraceError(self._problems)


@contextmanager
def _opened(path: Path) -> Iterator[IO[str]]:
    """The text of a plain or gzip file; every way in which reading can fail becomes a TraceError."""
    try:
        with path.open("rb") as raw:
            zipped = raw.read(2) == b"\x1f\x8b"
        with (
            gzip.open(path, "rt", encoding="utf-8-sig", newline="")
            if zipped
            else path.open(encoding="utf-8-sig", newline="") as text
        ):
            yield text
    except FileNotFoundError:
        _refuse(path, "the trace file does not exist", "check its name in the workload section")
    except EOFError:
        _refuse(path, "the gzip file ends too early", "copy it again: the download or copy was cut off")
    except (gzip.BadGzipFile, zlib.error) as error:
        _refuse(path, f"the gzip file is damaged ({error})", "copy it again")
    except UnicodeDecodeError:
        _refuse(path, "is not UTF-8 text", "give a CSV or JSON-lines file, plain or gzip")
    except csv.Error as error:
        _refuse(path, f"is not a CSV file ({error})", "give a comma-separated file with a header line")
    except OSError as error:
        _refuse(path, f"cannot be read ({error.strerror or error})", "check the file and its permissions")


def _refuse(path: Path, problem: str, next_step: str, line: int = 0) -> NoReturn:
    raise TraceError(Problem(problem, file=str(path), line=line, next_step=next_step)) from None


def _csv_rows(
    path: Path, file: IO[str], columns: Sequence[str], faults: _Faults
) -> Iterator[tuple[int, list[str]]]:
    """Line number and the named columns of every row that is not blank."""
    rows = csv.reader(file, strict=True)
    header = [name.strip() for name in next(rows, [])]
    if not header:
        _refuse(path, "is empty", f"give a CSV file with the columns {', '.join(columns)}")
    if len(header) == 1 and any(sign in header[0] for sign in ";\t|"):
        _refuse(path, "has no commas between its columns", "separate the columns by commas", line=1)
    missing = [
        Problem(
            "the column is missing",
            file=str(path),
            line=1,
            path=name,
            hint=did_you_mean(name, header),
            next_step="check workload.trace.format or name the right column",
        )
        for name in dict.fromkeys(columns)
        if name not in header
    ]
    if missing:
        raise TraceError(missing)
    positions = [header.index(name) for name in columns]
    for row in rows:
        if len(row) == len(header):
            yield rows.line_num, [row[position] for position in positions]
        elif row:
            problem = f"the row has {len(row)} columns instead of {len(header)}"
            faults.add(rows.line_num, "", problem, ",".join(row))


def _json_object(text: str) -> dict[str, Any]:
    """The object of a line; empty when the line holds anything else, which then lacks every key."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _mooncake_fault(row: dict[str, Any], block_tokens: int) -> tuple[str, str, object] | None:
    """Key, problem and found value of a row that cannot be used."""
    missing = {"timestamp", "input_length", "output_length", "hash_ids"} - row.keys()
    if missing:
        return "", f"the line is no JSON object with {', '.join(sorted(missing))}", row or None
    time_ms, ids = row["timestamp"], row["hash_ids"]
    if type(time_ms) not in (int, float) or not 0 <= time_ms < 1e15:
        return "timestamp", "needs milliseconds, at least 0", time_ms
    for key in ("input_length", "output_length"):
        if type(row[key]) is not int or not 1 <= row[key] <= _MOST_TOKENS:
            return key, _TOKENS_HINT, row[key]
    if type(ids) is not list or {type(entry) for entry in ids} != {int} or not _fits_int64(ids):
        return "hash_ids", "needs a list of whole numbers of 64 bits", ids
    needed = -(-row["input_length"] // block_tokens)
    if len(ids) != needed:
        problem = (
            f"holds {len(ids)} ids instead of {needed}, one for every {block_tokens} tokens of input_length"
        )
        return "hash_ids", problem, ids
    return None


def _fits_int64(values: list[int]) -> bool:
    return min(values) >= -(2**63) and max(values) < 2**63


def _nanoseconds(text: str, line: int, faults: _Faults) -> int:
    try:
        return int(np.datetime64(text, "ns").astype(np.int64))
    except ValueError:
        faults.add(line, "TIMESTAMP", "is not a time that exists", text)
        return 0


def _seconds(stamps: FloatArray | IntArray, per_second: float) -> FloatArray:
    """Time since the first stamp, subtracted first: no float holds 54 years in steps of 100 ns."""
    seconds: FloatArray = np.divide(stamps - stamps[:1], per_second)
    return seconds


def _refuse_decrease(
    stamps: FloatArray | IntArray, lines: Sequence[int], column: str, shown: Sequence[object], faults: _Faults
) -> None:
    """Rows are refused, not sorted: a step back in time means a damaged or concatenated file."""
    for row in (np.flatnonzero(np.diff(stamps) < 0) + 1).tolist():
        faults.add(lines[row], column, f"is earlier than the row before ({shown[row - 1]})", shown[row])
    faults.raise_if_any()


def _trace(
    path: Path,
    times_s: FloatArray,
    prompt_tokens: array[int],
    output_tokens: array[int],
    lines: array[int],
    block_ids: array[int] | None = None,
    block_starts: array[int] | None = None,
) -> Trace:
    if not lines:
        _refuse(path, "holds no requests", "give a trace with at least one row")
    columns = (prompt_tokens, output_tokens, lines, block_ids or array("q"), block_starts or array("q"))
    return Trace(times_s, *(np.array(column, dtype=np.int64) for column in columns))
