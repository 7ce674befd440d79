"""Trials of a plan: what they attain, and whether the queue grows; and which requests they serve."""

from __future__ import annotations

from servesim.analysis.caveats import Caveat
from servesim.analysis.metrics import summarise
from servesim.analysis.plan_trials import TrialTask, run_trial
from servesim.analysis.simulation import prepare, run_prepared
from servesim.config.load import load_scenario


def test_overload_of_sessions_is_not_hidden_by_their_later_turns() -> None:
    """Chats begin for a minute, faster than they can be taken in; their last turns come in ten."""
    chats = ["workload.num_requests=4000", "engine.max_num_seqs=32", "workload.arrivals.rate_per_s=12"]
    loaded = load_scenario("poisson-chat", [*chats, "workload.sessions.think_time_s=100"])
    assert not run_trial(TrialTask(loaded, 1.0, 1, 1, "round-robin", 0)).is_stable
    assert Caveat.OVERLOAD in [one.caveat for one in summarise(run_prepared(prepare(loaded))).warnings]
    slower = TrialTask(loaded, 0.3, 1, 1, "round-robin", 0)
    assert run_trial(slower).is_stable
