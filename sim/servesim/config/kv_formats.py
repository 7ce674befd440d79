"""How the KV cache keeps its elements."""

from __future__ import annotations

from typing import Literal, NamedTuple

__all__ = ["KV_FORMATS", "KvCacheDtype", "KvFormat"]

KvCacheDtype = Literal["auto", "fp8", "int8", "int4"]


class KvFormat(NamedTuple):
    """One type of KV cache."""

    bits: int
    """Of one element."""
    scale_bytes: int = 0
    """Of one token's key, or value, in one KV head: scale and zero point."""
    kernel: Literal["bf16", "fp8"] = "bf16"
    """Measured attention kernel whose coefficients are taken."""
    memory_share: float = 1.0
    """Of the HBM bandwidth that this kernel reaches."""

    def bytes_per_element(self, head_dim: int) -> float:
        """Bytes of one element with its share of the scales; ``head_dim`` elements have one scale."""
        return self.bits / 8 + self.scale_bytes / head_dim


KV_FORMATS: dict[KvCacheDtype, KvFormat] = {
    "auto": KvFormat(16),
    "fp8": KvFormat(8, kernel="fp8"),
    # Scale and zero point in 16 bits each, for every token and head, as LMDeploy keeps them (its page on
    # INT4/INT8 KV cache; the 16 bits are an assumption). The bandwidth is an estimate: the fp8 kernels of
    # H100, H200 and B200 reach 0.91, 0.73 and 0.97 of what the bf16 ones do, on average 0.87.
    "int8": KvFormat(8, scale_bytes=4, memory_share=0.87),
    # An estimate, between int8's bytes per second and its elements per second: 0.87 and half of it.
    "int4": KvFormat(4, scale_bytes=4, memory_share=0.65),
}
