"""What the scheduler keeps about a request, and what it decides for a step."""

from __future__ import annotations

from enum import IntEnum
from math import nan
from typing import Any

from servesim.cost.step_time import StepShape
from servesim.workload.request import Request

__all__ = [
    "FINISHED_LENGTH",
    "FINISHED_STOP",
    "REFUSED",
    "RUNNING",
    "WAITING",
    "AdmissionFailure",
    "Plan",
    "RequestState",
    "Status",
]


class Status(IntEnum):
    """Ends first, in the order of Log.STATUSES."""

    FINISHED_STOP = 0
    FINISHED_LENGTH = 1
    REFUSED = 2
    RUNNING = 3
    WAITING = 4
    LOST = 5


# A member of an enum takes as long to look up as a call; these are looked up for every request.
RUNNING, WAITING, REFUSED = Status.RUNNING, Status.WAITING, Status.REFUSED
FINISHED_STOP, FINISHED_LENGTH = Status.FINISHED_STOP, Status.FINISHED_LENGTH


class AdmissionFailure(IntEnum):
    """Why the head of the queue waits, in the order of Log.ADMISSION_FAILURES."""

    NONE = 0
    SEATS = 1
    MEMORY = 2
    FIT = 3
    WATERMARK = 4


class RequestState:
    """A request in the engine, in vLLM's terms.

    ``num_computed_tokens`` counts tokens whose KV exists or is being computed; it advances when a step is
    scheduled. ``num_placeholders`` are output tokens that steps in flight will yield. While the request is
    a member of the decode group (``grouped``), these three numbers are derived from the group's tick.
    """

    __slots__ = (
        "admission",
        "cached_tokens",
        "drawn",
        "emitted_s",
        "emitted_step",
        "failures",
        "final_slots",
        "final_waste",
        "first_token_s",
        "grouped",
        "is_prefill_chunk",
        "joined_step",
        "num_computed_tokens",
        "num_draft_tokens",
        "num_in_flight_tokens",
        "num_output_tokens",
        "num_placeholders",
        "num_preemptions",
        "num_prompt_tokens",
        "num_slots",
        "offset",
        "output_limit",
        "planned_step",
        "request",
        "scheduled_s",
        "sequence",
        "status",
        "waste_from_slot",
    )

    def __init__(self, request: Request, sequence: Any, max_model_len: int) -> None:
        self.request = request
        self.sequence = sequence
        self.admission = -1  # place in the order of admissions, the order of the running requests
        self.status = WAITING
        prompt_tokens, output_limit = request.prompt_tokens, request.output_tokens
        if prompt_tokens + output_limit > max_model_len:
            output_limit = max_model_len - prompt_tokens
        self.num_prompt_tokens, self.output_limit = prompt_tokens, output_limit
        # KV slots in use when the last token comes out; that token's own KV is never written
        self.final_slots = prompt_tokens + output_limit - 1
        self.num_computed_tokens = 0
        self.num_output_tokens = 0
        self.num_in_flight_tokens = 0  # scheduled, output not processed; kept one by one only
        self.num_placeholders = 0
        self.num_draft_tokens = 0  # proposed, waiting to be verified; this and the next two: speculation
        self.num_slots = 0  # most KV slots asked for since the last admission
        self.is_prefill_chunk = False  # its last step computed a part of the tokens it had
        self.num_preemptions = 0
        self.failures = 0  # AdmissionFailures since it waits, a bit each
        self.cached_tokens = -1  # not looked up yet
        self.grouped = False
        self.offset = 0
        self.final_waste = 0  # slots it will hold and never fill, from slot waste_from_slot on
        self.waste_from_slot = 0
        self.drawn: Any = None  # by the law that decides its luck, which keeps it here
        self.planned_step = -1  # last step scheduled to yield a token of it
        self.joined_step = -1  # step after which it decodes in the group
        self.emitted_step = -1  # last step that did yield one, at emitted_s
        self.emitted_s = self.scheduled_s = self.first_token_s = nan

    @property
    def num_tokens(self) -> int:
        """Prompt and accepted output."""
        return self.num_prompt_tokens + self.num_output_tokens

    @property
    def priority_key(self) -> tuple[int, float, str]:
        """vLLM's order under the priority policy, smallest first."""
        return (self.request.priority, self.request.arrival_s, self.request.request_id)


class Plan:
    """One step as scheduled; if it ``coasts`` the decode group can go on after it without a new plan.

    ``scheduled`` lists the requests handled one by one as (request, tokens, computed tokens before), in
    vLLM's order; ``group_size`` more decode together. ``yielding`` are those of ``scheduled`` whose token
    comes out; ``finishing`` are requests whose last token the plan's last step yields.
    ``running`` counts, as vLLM does, also ``num_draining`` whose last token is in an earlier step.
    ``drafts`` counts the draft tokens among those scheduled, by request; those of a request in ``padded`` are
    mere placeholders. ``num_discarded`` are sampled tokens that came to nothing, known once committed.
    ``group_contexts`` are the KV tokens that the group attends to in the plan's first step, by window.
    ``lookup`` is the prefix-cache look-up (tokens, hits) of a waiting request that did not fit, ``failure``
    why it did not.

    The values in the class are those of a step of the decode group alone; its lists stay empty.
    """

    together = True  # scheduled by group and chunks, not one by one
    coasts = True
    scheduled: list[tuple[RequestState, int, int]] = []  # noqa: RUF012
    yielding: list[RequestState] = []  # noqa: RUF012
    admitted: list[RequestState] = []  # noqa: RUF012
    preempted: list[RequestState] = []  # noqa: RUF012
    drafts: dict[RequestState, int] = {}  # noqa: RUF012
    padded: list[RequestState] = []  # noqa: RUF012
    num_discarded = 0
    num_draining = 0
    lookup = (0, 0)
    failure = AdmissionFailure.NONE
    group_contexts: tuple[int, ...] = ()
    running: int
    waiting: int
    shape: StepShape

    def __init__(self, step: int, group_size: int) -> None:
        self.step = self.last_step = step
        self.group_size = group_size
        self.finishing: list[RequestState] = []
