"""How fast the simulator is, as a ratio to a yardstick of the same machine and minute.

    python tests/benchmarks/speed.py [SCENARIO ...] [--process] [--batch] [--million]

The yardstick is one SimPy process that waits a million times. CPU seconds, best of five; simulation only,
without reading files and writing reports. --process measures `servesim run std10k --json` as a whole, --batch
the time of a step with 16 and with 256 running requests, --million a million requests.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import simpy

from servesim.analysis.simulation import prepare, run_prepared
from servesim.config.load import load_scenario

SCENARIOS = ("std10k", "azure-conv-h100", "mooncake-conv-h100")
MILLION = """\
name: million
model: llama-3.1-8b
hardware: {gpu: h100-sxm}
engine: {max_model_len: 16384}
workload:
  num_requests: 1000000
  arrivals: {process: poisson, rate_per_s: 10}
  prompt_tokens: {law: lognormal, median_tokens: 512, sigma: 0.8, min_tokens: 16, max_tokens: 3072}
  output_tokens: {law: lognormal, median_tokens: 128, sigma: 0.7, min_tokens: 4, max_tokens: 1024}
"""


def cpu_s(work: Callable[[], object], repeats: int = 3) -> float:
    """CPU seconds of the quickest of some runs."""
    best = float("inf")
    for _ in range(repeats):
        begin = time.process_time()
        work()
        best = min(best, time.process_time() - begin)
    return best


def yardstick() -> None:
    """A million timeouts of one SimPy process."""
    env = simpy.Environment()

    def wait() -> simpy.events.ProcessGenerator:
        for _ in range(1_000_000):
            yield env.timeout(1)

    env.process(wait())
    env.run()


def measure(scenario: str, repeats: int = 5) -> None:
    """Print one line of the table."""
    loaded = load_scenario(scenario)
    prepared = prepare(loaded)
    seconds = unit = float("inf")
    for _ in range(repeats):  # turn by turn, so that both meet the same minute
        seconds = min(seconds, cpu_s(lambda: run_prepared(prepared), 1))
        unit = min(unit, cpu_s(yardstick, 1))
    requests = prepared.workload.num_requests
    print(
        f"{loaded.scenario.name:<22}{requests:>10,}{seconds:>10.2f}{seconds / unit:>10.2f}"
        f"{seconds / requests * 1e6:>16.0f}",
        flush=True,
    )


BATCH = """\
name: batch
model: llama-3.1-8b
hardware: {{gpu: h100-sxm}}
engine: {{max_model_len: 8192, max_num_seqs: 1024, step_time: {{law: linear, base_s: 0.02}}}}
workload:
  num_requests: 5000
  arrivals: {{process: poisson, rate_per_s: 10}}
  prompt_tokens: {{law: fixed, tokens: 100}}
  output_tokens: {{law: fixed, tokens: {output_tokens}}}
"""


def measure_batch() -> None:
    """Steps of 20 ms, 10 requests a second, of 80 or 1280 tokens: 16 or 256 requests run."""
    print(f"\n{'running':>10}{'CPU s':>10}{'us a step':>12}")
    with tempfile.TemporaryDirectory() as folder:
        for running in (16, 256):
            file = Path(folder) / "batch.yaml"
            file.write_text(BATCH.format(output_tokens=running * 5))
            prepared = prepare(load_scenario(str(file)))
            steps = run_prepared(prepared).log.counters["steps"]
            seconds = cpu_s(lambda: run_prepared(prepared))  # noqa: B023
            print(f"{running:>10}{seconds:>10.2f}{seconds / steps * 1e6:>12.2f}", flush=True)


PROCESS = "from servesim.cli import main; main()"


def measure_process() -> None:
    """CPU seconds and memory of a whole process, with the modules compiled, as an installer leaves them."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-c", PROCESS, "run", "std10k", "--json"]
    seconds, most_bytes = float("inf"), 0
    for _ in range(5):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=variables)
        _, status, used = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"{command} failed")
        seconds, most_bytes = min(seconds, used.ru_utime + used.ru_stime), used.ru_maxrss * 1024
    ratio = seconds / cpu_s(yardstick)
    print(f"\nservesim run std10k --json: {seconds:.2f} CPU s, ratio {ratio:.2f}, {most_bytes / 1e6:.0f} MB")


def main() -> None:
    """Measure what the command line names."""
    if "--process" in sys.argv:
        measure_process()  # before this process grows: a child's peak of memory begins with its parent's
    names = [word for word in sys.argv[1:] if not word.startswith("--")] or SCENARIOS
    print(f"{'scenario':<22}{'requests':>10}{'CPU s':>10}{'ratio':>10}{'us a request':>16}", flush=True)
    for name in names:
        measure(name)
    if "--batch" in sys.argv:
        measure_batch()
    if "--million" in sys.argv:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "million.yaml"
            file.write_text(MILLION)
            measure(str(file), repeats=1)


if __name__ == "__main__":
    main()
