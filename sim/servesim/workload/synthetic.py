"""Requests made from arrivals and lengths, alone or as the turns of sessions, in an open or a closed loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from servesim.workload.arrivals import ThinkTime
from servesim.workload.prefixes import SharedPrefixes
from servesim.workload.request import Request, Segment
from servesim.workload.streams import Column

__all__ = ["SyntheticWorkload"]


class SyntheticWorkload:
    """A stream of sessions of ``turns`` requests; without sessions, every session has one turn.

    Request ``session * turns + turn`` reads its lengths and think times at that index, and its system
    prompt at the session's index.  In a closed loop the k-th session to start is session k, whichever user
    starts it: what is asked for never depends on what is served, only when.  That count is the one state;
    ``arrivals()`` resets it, so one workload feeds one simulation at a time.
    """

    def __init__(
        self,
        num_requests: int,
        start_times: Callable[[int], Iterator[float]],
        prompt_tokens: Column[int],
        output_tokens: Column[int],
        prefixes: SharedPrefixes | None = None,
        turns: int = 1,
        turn_think: ThinkTime | None = None,
        users: int | None = None,
        user_think: ThinkTime | None = None,
    ) -> None:
        """``start_times(n)`` gives the starts, among the first n sessions, that wait for nothing.

        ``users`` is the number of sessions in flight of a closed loop, None for an open loop.
        """
        self._num_requests = num_requests
        self._num_sessions = -(-num_requests // turns)
        self._start_times = start_times
        self._prompt_tokens = prompt_tokens
        self._output_tokens = output_tokens
        self._prefixes = prefixes
        self._turns = turns
        self._turn_think = turn_think
        self._users = users
        self._user_think = user_think
        self._started = self._num_sessions

    @property
    def num_requests(self) -> int:
        """Requests in all, every turn counted."""
        return self._num_requests

    def arrivals(self) -> Iterator[Request]:
        """The first turns of the sessions whose start waits for nothing."""
        if self._users is not None:
            self._started = min(self._users, self._num_sessions)
        return map(self._first_turn, range(self._num_sessions), self._start_times(self._num_sessions))

    def follow_up(self, finished: Request, now_s: float) -> Request | None:
        """The session's next turn; after its last one, the user's next session if the loop is closed."""
        index = finished.index
        if (index + 1) % self._turns and index + 1 < self._num_requests:
            return self._next_turn(finished, now_s + _think_s(self._turn_think, index))
        if self._started < self._num_sessions:
            session, self._started = self._started, self._started + 1
            return self._first_turn(session, now_s + _think_s(self._user_think, index))
        return None

    def _first_turn(self, session: int, arrival_s: float) -> Request:
        index = session * self._turns
        tokens = self._prompt_tokens[index]
        if self._prefixes is None and self._turns == 1:
            return Request(index, f"request-{index}", arrival_s, tokens, self._output_tokens[index])
        prefix = () if self._prefixes is None else (self._prefixes.of(session),)
        return self._request(index, arrival_s, prefix, sum(part.num_tokens for part in prefix))

    def _next_turn(self, last: Request, arrival_s: float) -> Request:
        history = (*last.prompt, Segment(last.output_name, last.output_tokens))
        return self._request(last.index + 1, arrival_s, history, last.prompt_tokens + last.output_tokens)

    def _request(
        self, index: int, arrival_s: float, history: tuple[Segment, ...], history_tokens: int
    ) -> Request:
        """A request whose new text follows ``history``; texts are named only if a later turn repeats them."""
        session, turn = divmod(index, self._turns)
        repeated = turn + 1 < self._turns and index + 1 < self._num_requests
        new_text = Segment(("user", index) if repeated else None, self._prompt_tokens[index])
        return Request(
            index,
            f"request-{index}" if self._turns == 1 else f"session-{session}-turn-{turn}",
            arrival_s,
            history_tokens + new_text.num_tokens,
            self._output_tokens[index],
            (*history, new_text),
            ("assistant", index) if repeated else None,
        )


def _think_s(think: ThinkTime | None, index: int) -> float:
    return 0.0 if think is None else think.after(index)
