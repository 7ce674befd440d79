"""Scripted troubles: the right cause is named, and what is recommended works, on other requests too."""

from __future__ import annotations

from pathlib import Path

import pytest
from troubles import TROUBLES, write_trouble

from servesim import api
from servesim.analysis.explain import HELPS, Explanation
from servesim.analysis.metrics import summarise
from servesim.report.explain import explanation_text
from servesim.report.explain_words import CAUSE_WORDS

FRESH_SEED = 77


def p99_s(file: Path, metric: str, settings: list[str]) -> float:
    """As `servesim run` finds it."""
    summary = summarise(api.simulate(file, overrides=settings).run)
    return getattr(summary, metric).p99_s


def explained(name: str, folder: Path) -> tuple[Path, Explanation]:
    file = write_trouble(name, folder)
    return file, api.explain(file, f"{TROUBLES[name].metric}_p99", jobs=1).explanation


@pytest.mark.parametrize("name", list(TROUBLES))
def test_the_cause_is_named_and_the_remedy_works(name: str, tmp_path: Path) -> None:
    trouble = TROUBLES[name]
    _, of = explained(name, tmp_path)
    assert of.cause == trouble.cause, of.means(of.tail)
    own = next(one for one in of.candidates if one.key.startswith(trouble.remedies))
    assert of.recommended
    fresh = write_trouble(name, tmp_path, FRESH_SEED)
    before_s = p99_s(fresh, trouble.metric, [])
    for one in {own, *of.recommended}:
        assert one.change(of.metric, of.figures) < -HELPS
        after_s = p99_s(fresh, trouble.metric, one.key.split())
        assert after_s < (1 - HELPS) * before_s, one


def test_a_failed_replica_is_named_and_a_spare_one_mends_it(tmp_path: Path) -> None:
    _, of = explained("failed replica", tmp_path)
    assert [(one.replica, one.failed_s, one.back_s) for one in of.outages] == [(1, 20, 50)]
    assert of.outages[0].aborted > 0
    assert of.replicas[0].replica == 0  # which had to serve all
    [spare] = [one for one in of.remedies if one.key == "hardware.replicas=3"]
    [healthy] = [one for one in of.relaxations if one.key == "failure"]
    assert spare.change(of.metric, of.figures) == pytest.approx(
        healthy.change(of.metric, of.figures), abs=0.05
    )
    text = explanation_text(of)
    assert "Replica 1 failed at 20.0 s" in text
    assert "Lost to a failed replica" in text


def test_relaxing_the_cause_helps(tmp_path: Path) -> None:
    for name in ("KV-starved", "slot-capped", "host-bound", "failed replica", "uneven router"):
        _, of = explained(name, tmp_path)
        [relaxed] = [one for one in of.relaxations if one.cause == of.cause]
        assert relaxed.change(of.metric, of.figures) < -0.5


def test_every_cause_has_words() -> None:
    assert {one.cause for one in TROUBLES.values()} <= set(CAUSE_WORDS)


def test_a_healthy_deployment_is_not_told_to_change_what_does_not_matter(tmp_path: Path) -> None:
    file = write_trouble("slot-capped", tmp_path)
    of = api.explain(file, "ttft_p99", overrides=["engine.max_num_seqs=256"], jobs=1).explanation
    assert of.cause != "slots"
    assert not any(one.key.startswith("engine.max_num_seqs") for one in of.recommended)
