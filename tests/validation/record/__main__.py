"""Records a real vLLM:  python -m record --plan cpu --gpu NAME --out FOLDER  (see README.md)."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from record.engine import Engine, VllmEngine
from record.folder import Folder
from record.plans import PLANS, Job, first_look
from record.session import RunClock, Session
from record.shapes import write_hf_config
from record.start import start_folder

_LEAST_S = 30.0  # an engine that has less time is not started


def main() -> int:
    """The parent makes every job a process of its own, and none of them can take more than its time."""
    arguments = _arguments()
    if arguments.job is not None:
        number, repeat, deadline = arguments.job
        return _child(arguments, _jobs(arguments)[int(number)], int(repeat), deadline)
    end = time.time() + arguments.budget_s
    jobs = _jobs(arguments)
    for repeat in range(max(job.repeats for job in jobs)):
        for number, job in enumerate(jobs):
            left_s = end - time.time()
            if repeat >= job.repeats or (arguments.only and job.shape not in arguments.only):
                continue
            if left_s < _LEAST_S:
                print(f"{job.shape} {job.prefix} repeat {repeat + 1}: no time left", flush=True)
                continue
            limit_s = min(job.limit_s, left_s)
            begin = time.time()
            command = [sys.executable, "-m", "record", *sys.argv[1:]]
            command += ["--job", str(number), str(repeat), str(begin + limit_s)]
            try:
                status: object = subprocess.run(
                    command, timeout=limit_s + 20, check=False, env={**os.environ, **dict(job.environment)}
                ).returncode
            except subprocess.TimeoutExpired:
                status = "killed at its limit"
            took_s = time.time() - begin
            print(f"{job.shape} {job.prefix} repeat {repeat + 1}: {status}, {took_s:.0f} s", flush=True)
    for folder in {_folder(arguments, job) for job in jobs}:
        if folder.is_dir():
            Folder(folder).merge_kernels()
            Folder(folder).compress()
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m record", description=__doc__)
    parser.add_argument(
        "--plan", choices=PLANS, nargs="+", required=True, help="repeats go round all of them"
    )
    parser.add_argument("--only", nargs="*", help="shapes of the plans")
    parser.add_argument("--out", type=Path, required=True, help="where the folders of the recordings go")
    parser.add_argument("--budget-s", type=float, default=540.0, help="seconds for everything")
    parser.add_argument("--gpu", required=True, help="hardware file of this device: name or path")
    parser.add_argument("--fake", action="store_true", help="a stand-in that only schedules, instead of vLLM")
    parser.add_argument("--first-look", action="store_true", help="the smallest sizes only, once")
    parser.add_argument("--job", nargs=3, type=float, help=argparse.SUPPRESS)
    return parser.parse_args()


def _jobs(arguments: argparse.Namespace) -> list[Job]:
    jobs = [job for plan in arguments.plan for job in PLANS[plan]]
    return [first_look(job) for job in jobs] if arguments.first_look else jobs


def _folder(arguments: argparse.Namespace, job: Job) -> Path:
    """Named by device, release of vLLM and shape."""
    release = "stand-in" if arguments.fake else "vllm-" + ".".join(version("vllm").split(".")[:2])
    return Path(arguments.out) / f"{Path(arguments.gpu).stem}-{release}-{job.shape}"


def _child(arguments: argparse.Namespace, job: Job, repeat: int, deadline: float) -> int:
    folder = Folder(_folder(arguments, job))
    folder.expand()
    if arguments.fake:
        from record.stand_in import StandIn

        stand_in = StandIn(job)
        engine: Engine = stand_in
        clock = stand_in.clock
    else:
        clock = RunClock.named(job.clock)
        with tempfile.TemporaryDirectory() as model:
            engine = VllmEngine(write_hf_config(job.shape, Path(model)), job.settings, clock)
    job = start_folder(folder, job, engine, arguments.gpu)
    session = Session(engine, clock, folder, job, deadline)
    session.warm_up()
    if job.grid is not None:
        if job.grid.served:
            session.grid(job.grid, repeat)
        if job.grid.operator_lengths:
            session.operators(job.grid)
    for online in job.onlines:
        session.online(online, repeat)
    return 0


if __name__ == "__main__":
    sys.exit(main())
