"""Results on disk: all of them or none."""

from __future__ import annotations

import json
import os

import pytest

from handmade import handmade_run
from servesim.api import Comparison, Result
from servesim.errors import OutputError
from servesim.report import folder


def test_all_files_of_a_run_are_written_into_a_new_folder(tmp_path):
    out = folder.prepare_folder(tmp_path / "deep" / "out")
    folder.write_files(out, Result(handmade_run()).files())
    names = {"result.json", "requests.csv", "steps.csv", "kv.csv", "report.html"}
    assert {path.name for path in out.iterdir()} == names
    assert json.loads((out / "result.json").read_text())["completed"] == 4


def test_the_same_run_gives_the_same_files():
    assert Result(handmade_run()).files() == Result(handmade_run()).files()


def test_files_of_an_earlier_run_are_replaced(tmp_path):
    (tmp_path / "result.json").write_text("old")
    (tmp_path / "notes.txt").write_text("mine")
    result = Result(handmade_run())
    folder.write_files(tmp_path, Comparison(result, result).files() | result.files())
    assert json.loads((tmp_path / "result.json").read_text())["completed"] == 4
    assert (tmp_path / "compare.html").exists()
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_folder_that_is_a_file_is_told(tmp_path):
    place = tmp_path / "taken"
    place.write_text("mine")
    with pytest.raises(OutputError) as caught:
        folder.prepare_folder(place)
    assert str(place) in str(caught.value)
    assert " -> choose another folder with --out" in str(caught.value)
    assert place.read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_told(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="Permission denied"):
        folder.prepare_folder(tmp_path / "out")


def test_nothing_is_left_half_written_on_a_full_disk(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folder.os, "replace", full)
    with pytest.raises(OutputError, match="No space left on device"):
        folder.write_files(tmp_path, {"a.csv": "1\n", "b.csv": "2\n"})
    assert list(tmp_path.iterdir()) == []
