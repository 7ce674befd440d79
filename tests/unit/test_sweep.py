"""Sweeps: their points, what a run folder keeps, and that every way of running gives the same bytes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from servesim import studies
from servesim.analysis import sweep as sweeping
from servesim.analysis.grid import Axis, grid_points, latin_points, read_axis
from servesim.errors import ConfigError, ServesimError, StudyError

TINY = """\
name: tiny
model: llama-3.1-8b
hardware: {gpu: h100-sxm}
engine: {max_model_len: 2048}
workload:
  num_requests: 20
  arrivals: {process: poisson, rate_per_s: 20}
  prompt_tokens: {law: uniform, mean_tokens: 200, range_ratio: 0.5}
  output_tokens: {law: geometric, mean_tokens: 20}
"""
HUNDREDS = (  # 200 points
    "engine.max_num_seqs=1,2,3,4,5,6,7,8,12,16",
    "engine.block_size=8,16,32,64",
    "workload.arrivals.rate_per_s=5,10,20,40,80",
)
MAIN = "from servesim.cli import main; main()"


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return str(path)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- points ----------------------------------------------------------------------------------------


def test_an_axis_is_a_list_or_a_range() -> None:
    assert read_axis("engine.block_size=8, 16,32") == Axis("engine.block_size", ("8", "16", "32"))
    assert read_axis("a.b={law: fixed, tokens: 3},{law: fixed, tokens: 4}").values == (
        "{law: fixed, tokens: 3}",
        "{law: fixed, tokens: 4}",
    )
    assert read_axis("a=1:9") == Axis("a", (), 1, 9, is_whole=True)
    assert read_axis("a=0.5:2:log") == Axis("a", (), 0.5, 2, is_log=True)
    for wrong in ("a", "a=", "=1,2", "a=1,1", "a=1,,2", "a=5:2", "a=0:2:log"):
        with pytest.raises(ConfigError, match="--vary"):
            read_axis(wrong)
    with pytest.raises(ConfigError, match="needs values, not a range"):
        grid_points([read_axis("a=1:9")])


def test_a_grid_has_every_combination() -> None:
    points = grid_points([read_axis("a=1,2"), read_axis("b=x,y,z")])
    assert points == [("1", "x"), ("1", "y"), ("1", "z"), ("2", "x"), ("2", "y"), ("2", "z")]


def test_a_latin_hypercube_has_one_point_in_each_part_of_every_axis() -> None:
    axes = [read_axis("a=0.0:1.0"), read_axis("b=1:100"), read_axis("c=x,y"), read_axis("d=1.0:16.0:log")]
    points = latin_points(axes, 20, seed=3)
    assert sorted(int(float(point[0]) * 20) for point in points) == list(range(20))
    assert sorted((int(point[1]) - 1) // 5 for point in points) == list(range(20))
    assert [point[2] for point in points].count("x") == 10
    assert sum(float(point[3]) < 4 for point in points) == 10
    assert points == latin_points(axes, 20, seed=3) != latin_points(axes, 20, seed=4)
    assert [point[1] for point in points] != sorted((point[1] for point in points), key=int)


def test_a_point_that_cannot_be_simulated_is_refused_alone(tiny: str, tmp_path: Path) -> None:
    found = studies.sweep(tiny, ["model=llama-3.1-8b,llama-3.1-70b"], out=tmp_path / "s", jobs=1)
    assert "error" not in found.points[0]
    assert "does not fit" in found.points[1]["error"]
    assert "refused" in str(found)
    assert found.frame["refused"].str.contains("does not fit").tolist() == [False, True]


@pytest.mark.parametrize(
    ("vary", "message"),
    [
        (["engine.blok_size=8,16"], "did you mean block_size"),
        (["engine.block_size=8,none"], "engine.block_size"),
        ([], "nothing varies"),
    ],
)
def test_a_value_that_no_point_can_take_is_a_mistake(tiny: str, tmp_path: Path, vary, message) -> None:
    with pytest.raises(ConfigError, match=message):
        studies.sweep(tiny, vary, out=tmp_path / "s")
    assert not (tmp_path / "s").exists()


# ---- the run folder --------------------------------------------------------------------------------


def test_a_finished_point_is_not_simulated_again(tiny, tmp_path, monkeypatch) -> None:
    vary = ["engine.block_size=8,16,32"]
    first = studies.sweep(tiny, vary, out=tmp_path / "s", jobs=1)
    (tmp_path / "s/points/00001.json").unlink()
    (tmp_path / "s/points/00002.json").write_text("{half a po")
    calls = []
    real = sweeping.run_point
    monkeypatch.setattr(sweeping, "run_point", lambda task: calls.append(task.number) or real(task))
    again = studies.sweep(tiny, vary, out=tmp_path / "s", jobs=1)
    assert calls == [1, 2]
    assert again.points == first.points


def test_a_changed_scenario_and_other_points_are_refused(tiny: str, tmp_path: Path) -> None:
    vary = ["engine.block_size=8,16"]
    studies.sweep(tiny, vary, out=tmp_path / "s", jobs=1)
    with pytest.raises(StudyError, match=r"other points.*block_size.*delete this one"):
        studies.sweep(tiny, ["engine.block_size=8,32"], out=tmp_path / "s", jobs=1)
    Path(tiny).write_text(TINY.replace("num_requests: 20", "num_requests: 21"))
    with pytest.raises(StudyError, match=r"has changed since this sweep was begun.*--out"):
        studies.sweep(tiny, vary, out=tmp_path / "s", jobs=1)


def test_a_changed_trace_is_noticed_though_the_scenario_is_the_same(tmp_path: Path) -> None:
    (tmp_path / "own.csv").write_text("arrival_s,prompt_tokens,output_tokens\n0,100,5\n1,100,5\n")
    text = TINY[: TINY.index("workload:")] + "workload: {trace: {file: own.csv, format: csv}}\n"
    (tmp_path / "own.yaml").write_text(text)
    vary = ["engine.block_size=8,16"]
    studies.sweep(tmp_path / "own.yaml", vary, out=tmp_path / "s", jobs=1)
    (tmp_path / "own.csv").write_text("arrival_s,prompt_tokens,output_tokens\n0,100,5\n1,100,6\n")
    with pytest.raises(StudyError, match="a file it names, has changed"):
        studies.sweep(tmp_path / "own.yaml", vary, out=tmp_path / "s", jobs=1)


# ---- the same bytes, however it was run ------------------------------------------------------------


def command(scenario: str, folder: Path, *more: str) -> list[str]:
    vary = [word for axis in HUNDREDS for word in ("--vary", axis)]
    return [sys.executable, "-c", MAIN, "sweep", scenario, *vary, "--out", str(folder), *more]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> tuple[str, Path]:
    home = tmp_path_factory.mktemp("sweep")
    (home / "tiny.yaml").write_text(TINY)
    scenario = str(home / "tiny.yaml")
    subprocess.run(command(scenario, home / "whole", "--jobs", "1"), check=True, capture_output=True)
    return scenario, home / "whole"


def test_a_killed_sweep_of_200_points_resumes_to_the_same_bytes(uninterrupted, tmp_path: Path) -> None:
    scenario, whole = uninterrupted
    folder = tmp_path / "killed"
    process = subprocess.Popen(
        command(scenario, folder, "--jobs", "2"), start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while len(list(folder.glob("points/*.json"))) < 80 and time.monotonic() < deadline:
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=30)
    kept = {path.name: path.stat().st_mtime_ns for path in folder.glob("points/*.json")}
    assert 80 <= len(kept) < 200
    assert not (folder / "sweep.json").exists()
    subprocess.run(command(scenario, folder, "--jobs", "2"), check=True, capture_output=True)
    assert len(list(folder.glob("points/*.json"))) == 200
    assert all((folder / "points" / name).stat().st_mtime_ns == at for name, at in kept.items())
    assert contents(folder) == contents(whole)


@pytest.mark.filterwarnings("default")
def test_a_dask_cluster_of_two_workers_gives_the_same_bytes(uninterrupted, tmp_path: Path) -> None:
    distributed = pytest.importorskip("distributed", reason="needs the extra servesim[dask]")
    scenario, whole = uninterrupted
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, host="127.0.0.1", dashboard_address=None
    ) as cluster:
        options = ("--backend", "dask", "--scheduler", cluster.scheduler_address)
        done = subprocess.run(
            command(scenario, tmp_path / "dask", *options), check=False, capture_output=True, text=True
        )
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "dask") == contents(whole)


def test_no_cluster_at_the_address_is_said_plainly(tiny: str, tmp_path: Path) -> None:
    pytest.importorskip("distributed", reason="needs the extra servesim[dask]")
    options = ("--backend", "dask", "--scheduler", "tcp://127.0.0.1:9")
    done = subprocess.run(
        command(tiny, tmp_path / "s", *options), check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "no Dask cluster answers" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_the_extra_the_cluster_is_refused_in_one_sentence(tiny, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sweeping, "find_spec", lambda name: None)
    with pytest.raises(StudyError) as refused:
        studies.sweep(
            tiny, ["engine.block_size=8,16"], out=tmp_path / "s", backend="dask", scheduler="tcp://x:1"
        )
    assert str(refused.value) == (
        "--backend dask needs the extra servesim[dask]  -> pip install 'servesim[dask]'"
    )


@pytest.mark.parametrize("given", [{"backend": "dask"}, {"scheduler": "tcp://x:1"}, {"backend": "slurm"}])
def test_a_backend_and_its_address_belong_together(tiny: str, tmp_path: Path, given) -> None:
    with pytest.raises(ServesimError):
        studies.sweep(tiny, ["engine.block_size=8,16"], out=tmp_path / "s", **given)


# ---- what is shown ---------------------------------------------------------------------------------


def test_replications_give_intervals_and_say_what_is_not_told_apart(tiny: str, tmp_path: Path) -> None:
    found = studies.sweep(tiny, ["engine.max_num_seqs=1,63,64"], out=tmp_path / "s", replications=4, jobs=1)
    low, high = found.points[0]["intervals"]["mean_e2el_ms"]
    assert low < found.points[0]["figures"]["mean_e2el_ms"] < high
    text = found.text(["mean_e2el_ms", "p99_ttft_ms"])
    assert "+-" in text
    assert "Best Mean E2EL (ms): max_num_seqs=6" in text
    told = text[text.index("not told apart") :].splitlines()[0]
    assert "max_num_seqs=6" in told
    assert "max_num_seqs=1" not in told
    assert found.points[0]["refused"]["p99_ttft_ms"].endswith("needs 1,000")
    rows = json.loads(found.to_json())
    assert rows["replications"] == 4
    assert {"mean_e2el_ms", "mean_e2el_ms_low", "mean_e2el_ms_high"} <= set(found.frame.columns)


def test_a_figure_that_does_not_exist_is_named(tiny: str, tmp_path: Path) -> None:
    found = studies.sweep(tiny, ["engine.block_size=8,16"], out=tmp_path / "s", jobs=1)
    with pytest.raises(ConfigError, match="did you mean p99_ttft_ms"):
        found.text(["p99_tttft_ms"])
