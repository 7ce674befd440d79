"""The engine's numbered invariants (checked_scheduler.py, engine_log.py), checked after every step."""

from __future__ import annotations

from checked_scheduler import CheckedScheduler
from engine_cases import Case, cases, run_case
from engine_log import check_log
from hypothesis import given, settings
from hypothesis import strategies as st

from servesim.engine.versions import RULES


@settings(max_examples=300, deadline=None, report_multiple_bugs=False)
@given(cases(), st.booleans())
def test_the_invariants_hold_after_every_step(case: Case, one_by_one: bool) -> None:
    scheduler = CheckedScheduler(
        case.limits, RULES[case.version], case.kv(), case.law.windows, one_by_one=one_by_one
    )
    log = run_case(case, scheduler)
    check_log(case, log)
    assert scheduler.checks > scheduler.num_arrived
    assert not scheduler.running
    assert not scheduler.waiting
    assert scheduler.usage()[:4] == (0, 0, 0, scheduler.usage().external), "2: memory is given back"
