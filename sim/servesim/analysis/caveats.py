"""What a reader must know before trusting a result: one enum, each member ending in the next thing to do."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

__all__ = ["RELIABLE_COMPLETIONS", "Caveat", "Warned"]

RELIABLE_COMPLETIONS = 1000
"""Below this, P99 is not to be trusted (fewer than ten requests lie beyond it)."""


class Caveat(Enum):
    """A reason to read a result with care: what is the matter, and what to do next."""

    PARTIAL = (
        "partial results: the run was interrupted at {end_s:.1f} s of simulated time",
        "let it finish, or ask for fewer requests",
    )
    UNFINISHED = (
        "{unfinished:,} of {arrived:,} requests were unfinished at the end; latencies cover the others only",
        "let the run go on until the last request is served",
    )
    NOTHING_COMPLETED = ("no request was completed", "look at the refused and unfinished requests")
    REFUSED = (
        "{failed:,} of {arrived:,} requests were refused: longer than max_model_len {max_model_len}",
        "raise engine.max_model_len, or leave the long requests out",
    )
    LOST = (
        "{lost:,} of {arrived:,} requests were lost with their replica",
        "set fleet.in_flight=retry, or keep a replica that serves",
    )
    FAILED_TOO_LATE = (
        "{late:,} of {failures:,} failures were due after the last request had ended, and did not come",
        "set fleet.failures at_s within the {duration_s:.0f} s of the run",
    )
    CUT_SHORT = (
        "{cut:,} of {arrived:,} requests were cut off at max_model_len {max_model_len}",
        "raise engine.max_model_len, or ask for shorter outputs",
    )
    OVERLOAD = (
        "the queue was still growing by {growth_per_s:.2f} requests/s when arrivals ended: "
        "latencies depend on the length of the run",
        "lower the request rate, or add capacity",
    )
    SAMPLED = (
        "{simulated:,} of {replicas:,} equal replicas were simulated and stand for all: requests and tokens "
        "are counted of these, rates of the whole fleet",
        "raise hardware.simulated_replicas for tails that are more sure",
    )
    BURST = (
        "all requests arrived at once: TTFT is mostly time in the queue",
        "set a request rate to see latencies under steady traffic",
    )
    FEW_COMPLETIONS = (
        "only {completed:,} requests were completed: P99 is not reliable below {reliable:,}",
        "run more requests",
    )
    EDGES = (
        "a request lives for {share:.0%} of the run on average: filling and draining weigh on every mean",
        "run more requests, or a longer slice of the trace",
    )
    PREEMPTIONS = (
        "{preempted:,} of {arrived:,} requests were preempted ({preemptions:,} times in all): "
        "the KV pool is too small for the load",
        "lower engine.max_num_seqs, raise engine.gpu_memory_utilization, or add GPUs",
    )
    KV_DROPPED = (
        "at most {budget:,} KV tokens of a request are kept ({policy}): memory and time are modelled, "
        "what the model answers without the others is not",
        "measure the quality of your model with this budget",
    )
    OTHER_TRAFFIC = (
        "{a} and {b} do not serve the same requests ({what}): they differ by their traffic, too",
        "give both the same workload, by extends: or --set",
    )
    NOTHING_SHARED = (
        "prefix caching is on and found nothing shared in {tokens:,} prompt tokens",
        "describe shared prefixes or sessions in the workload if real traffic has them",
    )

    @property
    def key(self) -> str:
        """Name in JSON, lower case."""
        return self.name.lower()

    def say(self, **values: float | str) -> Warned:
        """The warning with its numbers put in."""
        text, next_step = self.value
        return Warned(self, text.format(**values), next_step.format(**values))


@dataclass(frozen=True, slots=True)
class Warned:
    """One warning of one run."""

    caveat: Caveat
    text: str
    next_step: str

    def __str__(self) -> str:
        return f"{self.text} -> {self.next_step}"
