"""What is said on stderr while something takes long."""

from __future__ import annotations

import sys

import pytest

from servesim import api
from servesim.report import progress as module
from servesim.report.progress import Progress


class Clock:
    """Stands still until it is told to go on."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    stopped = Clock()
    monkeypatch.setattr(module, "time", stopped)
    return stopped


def test_the_time_left_is_that_of_the_round(clock, capsys):
    progress = Progress("plan", "trials of this round", 1)
    for now_s, ended, total in ((50, 1, 2), (100, 2, 2), (110, 1, 8), (120, 2, 8), (150, 1, 1), (180, 1, 1)):
        clock.now = now_s
        progress.update(ended, total)
    assert [line.removeprefix("plan: ") for line in capsys.readouterr().err.splitlines()] == [
        "1 of 2 trials of this round, 50 s left",
        "2 of 2 trials of this round, 0 s left",
        "1 of 8 trials of this round, 70 s left",
        "2 of 8 trials of this round, 60 s left",
        "1 of 1 trials of this round, 0 s left",
        "1 of 1 trials of this round, 0 s left",
    ]


def test_points_that_were_there_already_took_no_time(clock, capsys):
    progress = Progress("sweep", "points", 1)
    clock.now = 10
    progress.update(151, 200)
    assert capsys.readouterr().err == "sweep: 151 of 200 points, 490 s left\n"


def test_the_bar_of_a_later_round_is_not_at_its_end(clock, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    progress = Progress("plan", "trials", 1)
    clock.now = 10
    try:
        for ended in (1, 2, 1):
            progress.update(ended, 2)
        assert progress._bar is not None
        [task] = progress._bar.tasks
        assert (task.completed, task.total, task.finished) == (1, 2, False)
    finally:
        progress.close()


def test_replicas_that_stand_for_others_serve_their_share():
    told = []
    few = ["hardware.replicas=20", "hardware.simulated_replicas=2", "workload.num_requests=1000"]
    api.simulate("poisson-chat", overrides=few, progress=lambda *of: told.append(of[:2]))
    assert told[0] == (1, 100)
    ended, total = told[-1]
    assert 90 <= ended <= total <= 110
