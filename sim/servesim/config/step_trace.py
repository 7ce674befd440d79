"""The two files behind a step trace: a scheduler's settings, and requests listed one by one."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from servesim.config.load import parse
from servesim.config.record import Record, RuleError
from servesim.config.speculative import Rate
from servesim.config.yaml_file import read_yaml
from servesim.errors import ConfigError, Problem, ServesimError, TraceError

__all__ = [
    "AffineStepTime",
    "KVGroup",
    "ListedRequest",
    "SpeculationSettings",
    "TraceSettings",
    "load_requests",
    "load_settings",
]

_MOST_PROBLEMS = 10


class AffineStepTime(Record):
    """A step takes a + b * scheduled tokens + c * context tokens, in seconds."""

    a: float = Field(default=0.0, ge=0)
    b: float = Field(default=0.0, ge=0)
    c: float = Field(default=0.0, ge=0)
    """Per token of context, those being computed included."""


class KVGroup(Record):
    """Layers that share a table of blocks."""

    type: Literal["full", "sliding"]
    window: int | None = Field(default=None, ge=1)
    """Tokens that a sliding window spans."""

    @model_validator(mode="after")
    def _window_goes_with_sliding(self) -> KVGroup:
        if (self.window is None) is (self.type == "sliding"):
            wrong = "is missing" if self.window is None else "goes with type: sliding only"
            raise RuleError(f"window {wrong}", next_step='write {"type": "sliding", "window": 64}, or "full"')
        return self


class SpeculationSettings(Record):
    """Speculative decoding whose drafts are accepted by chance, in order, until one is not."""

    num_tokens: int = Field(ge=1)
    """Drafts per request and step."""
    acceptance: Rate | list[Rate]
    """Probability that a draft is accepted when those before it were; one, or one per depth."""
    mode: Literal["ngram", "draft", "eagle"] = "ngram"
    seed: int = 0

    @model_validator(mode="after")
    def _one_rate_per_depth(self) -> SpeculationSettings:
        if isinstance(self.acceptance, list) and len(self.acceptance) != self.num_tokens:
            raise RuleError(
                f"needs one rate for each of the {self.num_tokens} drafts",
                path=("acceptance",),
                next_step="change the list, or num_tokens",
            )
        return self


class TraceSettings(Record):
    """A scheduler and its pool of blocks, in vLLM's names."""

    num_gpu_blocks: int = Field(ge=2)
    """Blocks of the pool, vLLM's null block included."""
    block_size: int = Field(default=16, ge=1)
    max_num_seqs: int = Field(default=128, ge=1)
    max_num_batched_tokens: int = Field(default=2048, ge=1)
    max_num_scheduled_tokens: int | None = Field(default=None, ge=1)
    """Most tokens in one step, when it is less than max_num_batched_tokens."""
    max_model_len: int = Field(default=4096, ge=1)
    enable_chunked_prefill: bool = True
    enable_prefix_caching: bool = True
    long_prefill_token_threshold: int = Field(default=0, ge=0)
    policy: Literal["fcfs", "priority"] = "fcfs"
    async_scheduling: bool = False
    watermark: float = Field(default=0.0, ge=0, lt=1)
    """Share of the blocks kept free at admission; versions that do not have it take no notice."""
    scheduler_reserve_full_isl: bool = True
    kv_groups: list[KVGroup] | None = Field(default=None, min_length=1)
    """Groups of layers that share the pool; empty means one with full attention."""
    spec: SpeculationSettings | None = None
    step_time: AffineStepTime = AffineStepTime(a=0.01, b=1e-5, c=1e-8)
    sched_overhead: float = Field(default=0.0, ge=0)
    """CPU seconds of one call of the scheduler."""

    @property
    def windows(self) -> list[int | None]:
        """Attention windows by group; None is full attention."""
        return [group.window for group in self.kv_groups] if self.kv_groups else [None]


class ListedRequest(Record):
    """One line of a request list.

    The prompt is given in one of three ways: token ids; segments, runs of tokens known by name, of which two
    with one name begin alike; or a shared prefix and a unique rest. The output of request R is the segment
    "out:R", so that a later prompt can continue it.
    """

    id: str | int
    output_len: int = Field(ge=1)
    arrival_step: int | None = Field(default=None, ge=0)
    """Number of the call of the scheduler before which the request is there."""
    arrival: float | None = Field(default=None, ge=0)
    """Seconds."""
    priority: int = 0
    n: int = Field(default=1, ge=1)
    """Parallel samples: as many requests of the same prompt, called 0_ID, 1_ID and so on."""
    prompt_token_ids: list[int] | None = None
    segments: list[tuple[str, int]] | None = None
    prefix_id: str | None = None
    prefix_len: int = Field(default=0, ge=0)
    unique_len: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _one_prompt(self) -> ListedRequest:
        given = self.model_fields_set
        forms = ({"prompt_token_ids"}, {"segments"}, {"prefix_id", "prefix_len", "unique_len"})
        if sum(bool(form & given) for form in forms) != 1:
            raise RuleError(
                "the prompt must be given in one way",
                next_step="give prompt_token_ids, or segments, or unique_len with or without a prefix",
            )
        if {"prefix_id", "prefix_len"} & given and not {"prefix_id", "prefix_len"} <= given:
            raise RuleError("prefix_id and prefix_len go together", next_step="give both or none")
        if any(length < 0 for _, length in self.segments or ()) or not self.num_prompt_tokens:
            raise RuleError("the prompt is empty", next_step="give it at least one token")
        if self.arrival is not None and self.arrival_step is not None:
            raise RuleError("arrives both by step and by time", next_step="give arrival_step or arrival")
        return self

    @property
    def parts(self) -> list[tuple[Any, int]]:
        """The prompt as (name, tokens); token ids are names of one token each."""
        if self.prompt_token_ids is not None:
            return [(token, 1) for token in self.prompt_token_ids]
        if self.segments is not None:
            return list(self.segments)
        shared = [(self.prefix_id, self.prefix_len)] if self.prefix_id is not None else []
        return [*shared, (f"u:{self.id}", self.unique_len)]

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return sum(length for _, length in self.parts)

    @property
    def arrives(self) -> float:
        """Step or second of arrival."""
        return float(self.arrival_step or self.arrival or 0)


def load_settings(source: str | Path | Mapping[str, Any]) -> TraceSettings:
    """Settings from a JSON or YAML file, or from what one holds. Raises ConfigError."""
    if isinstance(source, Mapping):
        return parse(TraceSettings, source, "settings")
    return parse(TraceSettings, read_yaml(source), source)


def load_requests(
    source: str | Path | Sequence[Mapping[str, Any]], max_model_len: int
) -> list[ListedRequest]:
    """Requests from a file of JSON lines, or from what one holds, in the order of the file.

    Raises TraceError with up to ten problems, each with its line.
    """
    rows: Iterable[tuple[int, str | Mapping[str, Any]]]
    if isinstance(source, str | Path):
        file, rows = str(source), _lines(Path(source))
    else:
        file, rows = "requests", enumerate(source, start=1)
    requests: list[ListedRequest] = []
    problems: list[Problem] = []
    for line, row in rows:
        try:
            request = parse(ListedRequest, _object(row) if isinstance(row, str) else row, file)
            _refuse_too_long(request, max_model_len)
            requests.append(request)
        except ServesimError as error:
            problems += (replace(problem, file=file, line=line, column=0) for problem in error.problems)
        if len(problems) >= _MOST_PROBLEMS:
            break
    if problems:
        raise TraceError(problems[:_MOST_PROBLEMS])
    _refuse_contradictions(requests, file)
    return requests


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with path.open(encoding="utf-8") as file:
            yield from ((line, text) for line, text in enumerate(file, start=1) if text.strip())
    except (OSError, UnicodeDecodeError) as error:
        reason = "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else error.strerror
        step = "give a file with one JSON object per line"
        raise TraceError(Problem("cannot be read", str(path), got=str(reason), next_step=step)) from error


def _object(text: str) -> dict[str, Any]:
    try:
        row = json.loads(text)
    except ValueError:
        row = None
    if not isinstance(row, dict):
        step = 'write a line like {"id": "r1", "arrival": 0.5, "unique_len": 100, "output_len": 20}'
        raise ConfigError(Problem("is not a JSON object", got=f"{text.strip():.60}", next_step=step))
    return row


def _refuse_too_long(request: ListedRequest, max_model_len: int) -> None:
    tokens = request.num_prompt_tokens
    if tokens >= max_model_len:
        limit = f"must be less than max_model_len ({max_model_len})"
        raise ConfigError(Problem(f"tokens of the prompt {limit}, as vLLM demands", got=str(tokens)))


def _refuse_contradictions(requests: list[ListedRequest], file: str) -> None:
    if not requests:
        raise TraceError(Problem("the file is empty", file, next_step="write one JSON object per line"))
    twice = [name for name, times in Counter(str(request.id) for request in requests).items() if times > 1]
    if twice:
        step = "give every request an id of its own"
        raise TraceError(Problem("two requests have one id", file, got=twice[0], next_step=step))
    kinds = {kind for r in requests for kind in ("arrival", "arrival_step") if getattr(r, kind) is not None}
    if len(kinds) > 1:
        step = "give all of them arrival_step, or all of them arrival"
        raise TraceError(Problem("some requests arrive by step and some by time", file, next_step=step))
