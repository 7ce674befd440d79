"""Time to move KV blocks between the GPU and where preempted requests wait."""

from __future__ import annotations

from typing import NamedTuple

from servesim.config.profiles import GpuProfile, ModelProfile
from servesim.config.scenario import EngineConfig
from servesim.cost.kv_groups import kv_layout
from servesim.cost.step_time import AffineSteps, StepShape, StepTime

__all__ = ["BlockCopies", "SwapLaw", "block_copies"]


class BlockCopies(NamedTuple):
    """Blocks over PCIe: every block takes ``copies_per_block`` copies, each with a launch of its own.

    A small block makes small copies, which spend their time on launches and not on bytes (PagedAttention
    paper, arXiv 2309.06180, section 7.3). From disk a block comes through host memory, one after the other.
    """

    block_bytes: int
    copies_per_block: int
    launch_s: float
    pcie_bytes_per_s: float
    disk_bytes_per_s: float

    def seconds(self, host_blocks: int, disk_blocks: int = 0) -> float:
        """Time to move so many blocks, in either direction."""
        blocks = host_blocks + disk_blocks
        launches_s = blocks * self.copies_per_block * self.launch_s
        moved_s = blocks * self.block_bytes / self.pcie_bytes_per_s
        return launches_s + moved_s + disk_blocks * self.block_bytes / self.disk_bytes_per_s


def block_copies(model: ModelProfile, gpu: GpuProfile, engine: EngineConfig) -> BlockCopies:
    """The copies of one GPU, which keeps keys and values of every layer apart; GPUs copy side by side."""
    layout, swap = kv_layout(model, engine), engine.swap
    return BlockCopies(
        block_bytes=layout.block_bytes,
        copies_per_block=(1 if model.mla else 2) * layout.layers_per_group,
        launch_s=swap.copy_launch_us / 1e6,
        pcie_bytes_per_s=gpu.pcie_bandwidth_bytes_per_s * swap.pcie_efficiency,
        disk_bytes_per_s=swap.disk_gb_per_s * 1e9,
    )


class SwapLaw:
    """A law of step time, and the copies that a step waits for; nothing of them is taken to be hidden."""

    def __init__(self, law: StepTime, model: ModelProfile, gpu: GpuProfile, engine: EngineConfig) -> None:
        self._law = law
        self._copies = block_copies(model, gpu, engine)

    @property
    def without_copies(self) -> StepTime:
        """The law of the same steps when nothing is moved."""
        return self._law

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The distinct attention windows of the model's layers (None: full attention)."""
        return self._law.windows

    def step_s(self, shape: StepShape) -> float:
        """Seconds of one step, copies first."""
        return self._law.step_s(shape) + self.copies_s(shape)

    def copies_s(self, shape: StepShape) -> float:
        """Seconds that the copies of one step take."""
        return self._copies.seconds(*shape.swapped_blocks)

    def decode_steps(
        self, num_decodes: int, context_tokens: tuple[int, ...], context_growth: tuple[int, ...]
    ) -> AffineSteps:
        """Durations of a run of pure decode steps, in which nothing is moved."""
        return self._law.decode_steps(num_decodes, context_tokens, context_growth)
