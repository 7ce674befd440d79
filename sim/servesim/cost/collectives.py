"""Laws of communication between the GPUs of one engine."""

from __future__ import annotations

from servesim.config.profiles import GpuProfile
from servesim.cost.ops import smaller
from servesim.errors import ConfigError, Problem, did_you_mean

__all__ = ["ALL_REDUCE_BYTES", "AllReduce", "PipelineSend"]

ALL_REDUCE_BYTES = 2.0
"""Bytes of an activation that is summed between GPUs."""

_SEND_LAUNCH_S = 10e-6  # of one NCCL send between neighbours, estimate


class AllReduce:
    """Sum of an activation over the tensor-parallel GPUs, by the fastest of three algorithms.

    One-shot for small messages, two-shot for middle ones, ring (or in-switch) for large ones.  Degree 1 costs
    nothing.  Raises ConfigError when the GPU has no coefficients for the degree.
    """

    __slots__ = ("_laws",)

    def __init__(self, gpu: GpuProfile, degree: int) -> None:
        self._laws = ((0.0, 0.0), (0.0, 0.0), (0.0, 0.0))  # launch and seconds per byte of each algorithm
        if degree == 1:
            return
        law = gpu.efficiency.all_reduce.get(degree)
        if law is None:
            known = sorted(gpu.efficiency.all_reduce)
            raise ConfigError(
                Problem(
                    f"{gpu.name} has no all-reduce coefficients for this many GPUs",
                    path="engine.tensor_parallel_size",
                    got=str(degree),
                    hint=did_you_mean(str(degree), ["1", *map(str, known)]),
                    next_step="choose one of these, or add the degree to the GPU's file",
                )
            )
        sent = 2.0 * (degree - 1) / degree  # what each GPU sends per byte of the message
        self._laws = (
            (law.small_launch_s, 1.0 / law.small_bytes_per_s),
            (law.middle_launch_s, sent / law.middle_bus_bytes_per_s),
            (law.large_launch_s, sent / law.large_bus_bytes_per_s),
        )

    def seconds(self, num_bytes: float) -> float:
        """Time to sum ``num_bytes`` held by every GPU."""
        one_shot, two_shot, ring = (launch_s + num_bytes * per_byte_s for launch_s, per_byte_s in self._laws)
        return smaller(smaller(one_shot, two_shot), ring)

    def gather_seconds(self, num_bytes: float) -> float:
        """Time to give every GPU all ``num_bytes``, of which each holds a part: half an all-reduce."""
        return self.seconds(0.5 * num_bytes)


class PipelineSend:
    """Activations handed from one pipeline stage to the next: a launch, then bytes over the link.

    Stages take whole groups of tensor-parallel GPUs, so that neighbours may lie outside the link's domain.
    """

    __slots__ = ("_bytes_per_s",)

    def __init__(self, gpu: GpuProfile, num_gpus: int) -> None:
        self._bytes_per_s = gpu.peer_bandwidth_bytes_per_s(num_gpus)

    def seconds(self, num_bytes: float) -> float:
        """Time until the next stage has ``num_bytes``."""
        return _SEND_LAUNCH_S + num_bytes / self._bytes_per_s
