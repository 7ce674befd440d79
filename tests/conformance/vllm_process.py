"""vLLM in an environment of its own, and a process in it that answers workloads with step traces."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from conformance.workloads import Workload

__all__ = ["VllmError", "VllmProcess", "make_environment", "rules_for"]

HERE = Path(__file__).parent
REPO = HERE.parents[1]


class VllmError(Exception):
    """vLLM could not be installed or refused a workload."""


def rules_for(vllm: str) -> str:
    """The ``engine.version`` that follows a release of vLLM."""
    minor = int(vllm.split(".")[1])
    return "0.22" if minor < 24 else "0.26" if minor < 32 else "0.32" if minor < 33 else "0.33"


def make_environment(vllm: str) -> Path:
    """The Python of an environment with that vLLM, made from the package index unless it is there: 3 GB."""
    folder = REPO / f".venv-vllm-{vllm}"
    python, done = folder / "bin" / "python", folder / ".installed"
    if done.exists():
        return python
    print(f"Installing vLLM {vllm} into {folder.name} (some minutes, 3 GB)", file=sys.stderr)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    commands = (
        [sys.executable, "-m", "venv", str(folder)],
        [*pip, "--requirement", str(HERE / "requirements.txt")],
        [*pip, "--no-deps", f"vllm=={vllm}"],
    )
    for command in commands:
        if subprocess.run(command, stdout=sys.stderr, check=False).returncode:
            raise VllmError(f"failed: {' '.join(command)}")
    done.touch()
    return python


class VllmProcess:
    """A context in which vLLM's scheduler can be asked."""

    def __init__(self, python: Path) -> None:
        self._python = python
        self.version = ""

    def __enter__(self) -> VllmProcess:
        self._process = subprocess.Popen(
            [str(self._python), str(HERE / "vllm_worker.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.version = self._answer()["vllm"]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def steps(self, workload: Workload) -> list[dict[str, Any]]:
        """The steps vLLM makes of a workload."""
        settings, requests = workload
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"settings": settings, "requests": requests}) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        if "error" in answer:
            raise VllmError(answer["error"])
        steps: list[dict[str, Any]] = answer["steps"]
        return steps

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise VllmError(f"{self._python} {HERE / 'vllm_worker.py'} has ended; its messages are above")
        answer: dict[str, Any] = json.loads(line)
        return answer
