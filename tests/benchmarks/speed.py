"""How fast the simulator is, as a ratio to a yardstick of the same machine and minute.

    python tests/benchmarks/speed.py [SCENARIO ...] [--million]

The yardstick is one SimPy process that waits a million times. CPU seconds, best of three; simulation only,
without reading files and writing reports.
"""

from __future__ import annotations

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


def measure(scenario: str, repeats: int = 3) -> None:
    """Print one line of the table."""
    loaded = load_scenario(scenario)
    prepared = prepare(loaded)
    seconds, unit = cpu_s(lambda: run_prepared(prepared), repeats), cpu_s(yardstick)
    requests = prepared.workload.num_requests
    print(
        f"{loaded.scenario.name:<22}{requests:>10,}{seconds:>10.2f}{seconds / unit:>10.2f}"
        f"{seconds / requests * 1e6:>16.0f}",
        flush=True,
    )


def main() -> None:
    """Measure what the command line names."""
    names = [word for word in sys.argv[1:] if not word.startswith("--")] or SCENARIOS
    print(f"{'scenario':<22}{'requests':>10}{'CPU s':>10}{'ratio':>10}{'us a request':>16}", flush=True)
    for name in names:
        measure(name)
    if "--million" in sys.argv:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "million.yaml"
            file.write_text(MILLION)
            measure(str(file), repeats=1)


if __name__ == "__main__":
    main()
