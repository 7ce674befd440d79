"""What a link between replicas is: hardware/links/NAME.yaml."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from servesim.config.gpu_file import Sourced
from servesim.config.load import parse, read_yaml
from servesim.config.record import Record
from servesim.units import GB

__all__ = ["Link", "LinkFile", "load_link"]


class LinkFile(Record):
    """A link's file: numbers in the units people read, each with its source."""

    name: str
    label: str
    bandwidth_gb_per_s: Sourced
    """Per direction, of one port."""
    latency_us: Sourced
    """From the request for the KV cache to its first byte."""
    per: Literal["gpu", "replica"]
    """Whether every GPU of a replica has a port of its own, or the replica has one."""


@dataclass(frozen=True, slots=True)
class Link:
    """A link in SI units."""

    name: str
    label: str
    bandwidth_bytes_per_s: float
    latency_s: float
    per_gpu: bool

    def replica_bytes_per_s(self, num_gpus: int) -> float:
        """What a replica of so many GPUs can send, or receive."""
        return self.bandwidth_bytes_per_s * (num_gpus if self.per_gpu else 1)


def load_link(path: Path) -> Link:
    """A link from its file; raises ConfigError."""
    file = parse(LinkFile, read_yaml(path), path)
    return Link(
        file.name,
        file.label,
        file.bandwidth_gb_per_s.value * GB,
        file.latency_us.value / 1e6,
        file.per == "gpu",
    )
