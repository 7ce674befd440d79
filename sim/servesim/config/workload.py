"""What a scenario file may say about its requests: a recorded trace or a synthetic workload.

    recorded   trace: {format: csv | azure | mooncake}
    lengths    trace: {format: lengths} + arrivals [+ shared_prefixes]
    synthetic  arrivals + prompt_tokens + output_tokens + num_requests [+ shared_prefixes] [+ sessions]

Any other combination is refused.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from servesim.config.record import Record, RuleError
from servesim.config.sampling import SamplingConfig

__all__ = [
    "ArrivalsConfig",
    "AzureTrace",
    "BurstArrivals",
    "ClosedLoopArrivals",
    "ConstantArrivals",
    "CsvTrace",
    "EmpiricalTokens",
    "FixedTokens",
    "GammaArrivals",
    "GammaTokens",
    "GeometricTokens",
    "LengthsTrace",
    "LognormalTokens",
    "MooncakeTrace",
    "PoissonArrivals",
    "SessionsConfig",
    "SharedPrefixesConfig",
    "ThinkTimeLaw",
    "TimedTrace",
    "TokensConfig",
    "TraceConfig",
    "UniformTokens",
    "WorkloadConfig",
]

ThinkTimeLaw = Literal["fixed", "exponential"]


class _Trace(Record):
    file: str = Field(min_length=1)
    """Trace file (gzip or plain): beside the scenario, in ./scenarios, or one of the shipped ones."""
    skip_requests: int = Field(default=0, ge=0)
    """Requests left out at the begin, counted after start_s and duration_s."""
    max_requests: int | None = Field(default=None, ge=1)
    """Most requests kept; empty keeps all."""


class TimedTrace(_Trace):
    """A trace with arrival times. The clock starts at the first request that is kept."""

    start_s: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Keep requests from this time of the trace on, in seconds of the trace after its first request."""
    duration_s: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Keep requests for this long after start_s, in seconds of the trace; empty keeps all."""
    rate_scale: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Speed at which the kept requests are replayed: 2 halves every time between arrivals."""


class CsvTrace(TimedTrace):
    """A CSV, a row per request: arrival in seconds, prompt and output lengths; other columns are ignored."""

    format: Literal["csv"]
    arrival_column: str = Field(default="arrival_s", min_length=1)
    prompt_column: str = Field(default="prompt_tokens", min_length=1)
    output_column: str = Field(default="output_tokens", min_length=1)


class AzureTrace(TimedTrace):
    """Azure LLM inference trace (CSV: TIMESTAMP, ContextTokens, GeneratedTokens)."""

    format: Literal["azure"]


class MooncakeTrace(TimedTrace):
    """Mooncake trace (JSON lines: timestamp in ms, input_length, output_length, hash_ids of token blocks)."""

    format: Literal["mooncake"]
    block_tokens: int = Field(default=512, ge=1)
    """Tokens that one entry of hash_ids stands for; the last entry of a request may stand for fewer."""
    jitter: bool = True
    """Spread the arrivals, recorded in bins of 3 s, uniformly inside their bin (by the scenario's seed)."""


class LengthsTrace(_Trace):
    """Prompt and output lengths without times (CSV), row by row; needs workload.arrivals."""

    format: Literal["lengths"]
    prompt_column: str = Field(default="num_prefill_tokens", min_length=1)
    output_column: str = Field(default="num_decode_tokens", min_length=1)


TraceConfig = Annotated[CsvTrace | AzureTrace | MooncakeTrace | LengthsTrace, Field(discriminator="format")]

Tokens = Annotated[int, Field(ge=1, le=1_000_000_000)]
RatePerS = Annotated[float, Field(gt=0, allow_inf_nan=False)]
ThinkTimeS = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class PoissonArrivals(Record):
    """Independent exponential times between arrivals."""

    process: Literal["poisson"]
    rate_per_s: RatePerS
    exact_rate: bool = False
    """Rescale the times so that the last request comes at count / rate_per_s, as `vllm bench serve` does."""


class GammaArrivals(Record):
    """Gamma times between arrivals, as `vllm bench serve --request-rate --burstiness` draws them."""

    process: Literal["gamma"]
    rate_per_s: RatePerS
    burstiness: float = Field(ge=0.001, allow_inf_nan=False)
    """Shape of the gamma law: 1 is Poisson, below 1 burstier, above 1 more even (CV = burstiness ** -0.5)."""
    exact_rate: bool = False
    """As for poisson."""


class ConstantArrivals(Record):
    """Evenly spaced arrivals, the first at 0."""

    process: Literal["constant"]
    rate_per_s: RatePerS


class BurstArrivals(Record):
    """All requests at time 0, as an infinite request rate sends them."""

    process: Literal["burst"]


class ClosedLoopArrivals(Record):
    """A fixed number of users; each sends its next request (or session) when the last is finished."""

    process: Literal["closed_loop"]
    concurrency: int = Field(ge=1)
    think_time_s: ThinkTimeS = 0.0
    """Mean time between the end of a user's request and its next one."""
    think_time_law: ThinkTimeLaw = "fixed"


ArrivalsConfig = Annotated[
    PoissonArrivals | GammaArrivals | ConstantArrivals | BurstArrivals | ClosedLoopArrivals,
    Field(discriminator="process"),
]


class FixedTokens(Record):
    """Always the same length."""

    law: Literal["fixed"]
    tokens: Tokens


class UniformTokens(Record):
    """Uniform from floor(mean (1 - ratio)) to ceil(mean (1 + ratio)): random lengths of `vllm bench`."""

    law: Literal["uniform"]
    mean_tokens: Tokens
    range_ratio: float = Field(ge=0, lt=1)


class LognormalTokens(Record):
    """Lognormal lengths, rounded, then cut off at min_tokens and max_tokens."""

    law: Literal["lognormal"]
    median_tokens: float = Field(ge=1, le=1_000_000_000)
    sigma: float = Field(ge=0, le=5)
    """Standard deviation of the natural logarithm."""
    min_tokens: Tokens = 1
    max_tokens: Tokens | None = None

    @model_validator(mode="after")
    def _bounds_in_order(self) -> LognormalTokens:
        if self.max_tokens is not None and self.max_tokens < self.min_tokens:
            raise ValueError(f"max_tokens ({self.max_tokens}) is below min_tokens ({self.min_tokens})")
        return self


class GeometricTokens(Record):
    """Geometric lengths from 1 on (the memoryless law of queueing formulas)."""

    law: Literal["geometric"]
    mean_tokens: float = Field(ge=1, le=1_000_000)


class GammaTokens(Record):
    """Gamma lengths, rounded, then cut off at max_tokens: given mean and spread, with a light tail."""

    law: Literal["gamma"]
    mean_tokens: float = Field(ge=1, le=1_000_000)
    shape: float = Field(ge=0.01, le=10_000)
    """1 is exponential, more is more even: the standard deviation is mean_tokens * shape ** -0.5."""
    max_tokens: Tokens | None = None


class EmpiricalTokens(Record):
    """Lengths drawn with replacement from a column of a CSV file."""

    law: Literal["empirical"]
    file: str = Field(min_length=1)
    column: str = Field(min_length=1)
    mean_tokens: float | None = Field(default=None, ge=1, le=1_000_000_000)
    """Every length is multiplied by the same factor, so that the column's mean becomes this, and rounded."""
    max_tokens: Tokens | None = None
    """Lengths are cut off here, after that."""


TokensConfig = Annotated[
    FixedTokens | UniformTokens | LognormalTokens | GeometricTokens | GammaTokens | EmpiricalTokens,
    Field(discriminator="law"),
]


class SharedPrefixesConfig(Record):
    """System prompts: every request begins with one of num_prefixes texts, besides its prompt_tokens."""

    num_prefixes: int = Field(default=1, ge=1, le=1_000_000)
    tokens: Tokens
    """Length of each of the texts."""
    popularity: Literal["uniform", "zipf"] = "uniform"
    zipf_exponent: float = Field(default=1.0, gt=0, le=10)
    """With popularity zipf, text k is drawn with weight k ** -zipf_exponent."""

    @model_validator(mode="after")
    def _exponent_needs_zipf(self) -> SharedPrefixesConfig:
        if "zipf_exponent" in self.model_fields_set and self.popularity != "zipf":
            raise ValueError("zipf_exponent needs popularity: zipf")
        return self


class SessionsConfig(Record):
    """Multi-turn chats: arrivals start sessions, and prompt_tokens is the new text of one turn.

    A turn's prompt is the last turn's prompt, its output and the new text.
    """

    turns: int = Field(ge=1)
    """Requests of a session; the last session is cut when num_requests is no multiple."""
    think_time_s: ThinkTimeS = 0.0
    """Mean time between the end of a turn and the arrival of the next."""
    think_time_law: ThinkTimeLaw = "fixed"


class WorkloadConfig(Record):
    """The requests: a recorded trace, or arrivals with lengths."""

    trace: TraceConfig | None = None
    arrivals: ArrivalsConfig | None = None
    prompt_tokens: TokensConfig | None = None
    """Prompt length; with sessions, the new text of one turn."""
    output_tokens: TokensConfig | None = None
    num_requests: int | None = Field(default=None, ge=1)
    """Requests in all, every turn of a session counted."""
    shared_prefixes: SharedPrefixesConfig | None = None
    sessions: SessionsConfig | None = None
    sampling: SamplingConfig | None = None
    """Several sequences for every request; empty: one."""

    @property
    def forks(self) -> SamplingConfig | None:
        """The sampling whose sequences are scheduled as one; None when there is none."""
        return self.sampling if self.sampling and self.sampling.sharing == "forks" else None

    @model_validator(mode="after")
    def _samples_wait_for_nothing(self) -> WorkloadConfig:
        waits = self.sessions is not None or isinstance(self.arrivals, ClosedLoopArrivals)
        if waits and self.sampling and not self.forks:
            raise RuleError(
                "needs requests that wait for no other (no sessions, no closed_loop)",
                path=("sampling", "sharing"),
                next_step="remove it, or take other arrivals",
            )
        return self

    @model_validator(mode="after")
    def _one_of_the_combinations(self) -> WorkloadConfig:
        given = {name for name in type(self).model_fields if getattr(self, name) is not None} - {"sampling"}
        if self.trace is None:
            kind = "a workload without trace"
            needed, allowed = _SYNTHETIC, _SYNTHETIC | {"shared_prefixes", "sessions"}
        elif isinstance(self.trace, LengthsTrace):
            kind = "trace.format lengths"
            needed, allowed = {"trace", "arrivals"}, {"trace", "arrivals", "shared_prefixes"}
        else:
            kind = f"trace.format {self.trace.format}"
            needed, allowed = {"trace"}, {"trace"}
        faults = []
        if missing := needed - given:
            faults.append(f"{kind} needs {_listed(missing)}")
        if surplus := given - allowed:
            faults.append(f"{kind} does not go with {_listed(surplus)}{_advice(surplus, self.trace)}")
        if faults:
            raise ValueError("; ".join(faults))
        return self


_SYNTHETIC = {"arrivals", "prompt_tokens", "output_tokens", "num_requests"}


def _listed(names: set[str]) -> str:
    return ", ".join(name for name in WorkloadConfig.model_fields if name in names)


def _advice(surplus: set[str], trace: TraceConfig | None) -> str:
    if "num_requests" in surplus:
        return " (trace.max_requests limits a trace)"
    if "arrivals" in surplus and isinstance(trace, TimedTrace):
        return " (it has its own times; trace.rate_scale changes its rate)"
    return ""
