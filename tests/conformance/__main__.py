"""Command line of the conformance suite; exit status 1 when a schedule differs."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections import Counter
from pathlib import Path

from conformance.campaign import Mismatch, run
from conformance.vllm_process import REPO, VllmError, VllmProcess, make_environment, rules_for

SPECULATION = {"no": False, "yes": True, "mixed": None}


def main() -> int:
    arguments = _arguments()
    version = rules_for(arguments.vllm)
    start_s = time.monotonic()
    python = arguments.python or make_environment(arguments.vllm)
    with VllmProcess(python) as vllm:
        if vllm.version != arguments.vllm:
            raise VllmError(f"{python} has vLLM {vllm.version}, not {arguments.vllm}")

        def progress(counts: Counter[str]) -> None:
            if sys.stderr.isatty():
                print(f"\r{counts['workloads']} workloads", end="", file=sys.stderr)

        counts, mismatches = run(
            vllm.steps,
            version,
            seed=arguments.seed,
            num_workloads=arguments.workloads,
            speculation=SPECULATION[arguments.speculation],
            on_batch=progress,
        )
    print(f"\rvLLM {arguments.vllm} against engine.version {version}, seed {arguments.seed}")
    for name, count in counts.items():
        print(f"{name:<28}{count:>10,}")
    for mismatch in mismatches:
        _report(mismatch, arguments, version)
    print(f"{time.monotonic() - start_s:.0f} s", file=sys.stderr)
    return 1 if mismatches else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make conformance", description=__doc__)
    parser.add_argument("--vllm", default="0.26.0", help="release to compare with (default: %(default)s)")
    parser.add_argument("--workloads", type=int, default=2000, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the workloads (default: %(default)s)")
    parser.add_argument("--speculation", choices=SPECULATION, default="mixed", help="speculative decoding")
    parser.add_argument("--python", type=Path, help="of an environment that has this vLLM already")
    return parser.parse_args()


def _report(mismatch: Mismatch, arguments: argparse.Namespace, version: str) -> None:
    name = f"vllm-{arguments.vllm}-seed-{arguments.seed}-batch-{mismatch.batch}"
    settings, requests = mismatch.save(REPO / "out" / "conformance" / name)
    command = ["servesim", "trace", "--version", version, "--settings", str(settings)]
    print(f"\n{mismatch.difference}\n{settings.read_text()}{requests.read_text()}", end="")
    print(shlex.join([*command, "--requests", str(requests)]))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except VllmError as error:
        sys.exit(f"make conformance: {error}")
