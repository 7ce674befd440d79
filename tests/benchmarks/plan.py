"""How long a plan takes as a whole process, and whether its answer holds on fresh seeds.

    python tests/benchmarks/plan.py [--time-only]

50 requests/s of the Azure conversations on Llama-3.1-70B, over A100, H100, H200, B200 and TP 1 to 8, P99 TTFT
under 500 ms, P99 TPOT under 40 ms. Wall and CPU seconds of the command, the latter also as a ratio to the
yardstick of speed.py. Then 20 trials of the winner as a whole fleet, and of one replica fewer, under seeds
that the plan has not seen.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from typing import Any

from speed import cpu_s, yardstick

from servesim.analysis.plan_setup import question_of
from servesim.analysis.plan_trials import TrialTask, run_trial
from servesim.analysis.sweep import Workers, in_order
from servesim.config.load import load_scenario

RATE_PER_S = 50.0
SLO = ("ttft_p99_s=0.5", "tpot_p99_s=0.04")
WORDS = (
    "plan", "azure-conv-70b", "--rate", f"{RATE_PER_S:g}", "--gpus", "a100-80gb-sxm,h100-sxm,h200-sxm,b200",
    "--tensor-parallel", "1,2,4,8", *(word for limit in SLO for word in ("--slo", limit)), "--json",
)  # fmt: skip


def timed_plan() -> dict[str, Any]:
    """The winner, by the command itself; prints what it took."""
    scale_s = cpu_s(yardstick)
    begin_s, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-c", "from servesim.cli import main; main()", *WORDS]
    done = subprocess.run(command, capture_output=True, check=True, text=True)
    wall_s, after = time.perf_counter() - begin_s, resource.getrusage(resource.RUSAGE_CHILDREN)
    used_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    found = json.loads(done.stdout)
    print(f"{found['simulations']} simulations: {wall_s:.1f} s of wall time, {used_s:.1f} CPU s")
    print(f"{used_s / scale_s:.0f} times the yardstick of {scale_s:.2f} CPU s")
    winner: dict[str, Any] = found["configurations"][0]
    return winner


def kept(winner: dict[str, Any], replicas: int, count: int = 20) -> int:
    """Of ``count`` whole fleets under fresh seeds, those that keep the SLO."""
    changes = [f"{path}={value}" for path, value in winner["configuration"].items()]
    loaded = load_scenario("azure-conv-70b", [*changes, *(f"slo.{limit}" for limit in SLO)])
    question = question_of(loaded, RATE_PER_S, None, {})
    tasks = [
        TrialTask(loaded, question.factor, replicas, replicas, question.router, 500 + seed)
        for seed in range(count)
    ]
    return sum(trial.keeps for trial in in_order(run_trial, tasks, Workers()))


def main() -> None:
    """Print the time and, unless told otherwise, how well the answer holds."""
    winner = timed_plan()
    print(f"winner: {winner['replicas']} replicas of {winner['configuration']}")
    if "--time-only" not in sys.argv:
        for replicas in (winner["replicas"], winner["replicas"] - 1):
            print(f"{replicas} replicas keep the SLO in {kept(winner, replicas)} of 20 trials on fresh seeds")


if __name__ == "__main__":
    main()
