"""The end of a step: logits of the sequences that yield a token, and drawing from them."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["SAMPLERS", "Sampler"]


class Sampler(NamedTuple):
    """Kernels that turn logits into tokens: launches, and passes over the fp32 logits."""

    launches_s: float
    passes: int


SAMPLERS = {
    "greedy": Sampler(0.1e-3, 2),
    "top_k_top_p": Sampler(0.3e-3, 15),
}
"""By engine.step_time.sampler. Estimates: 0.1 to 0.3 ms of launches, 2 passes, or 10 to 20 to sort."""
