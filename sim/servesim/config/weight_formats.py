"""How a quantised model keeps the weights of its linear layers, and in which type it multiplies them."""

from __future__ import annotations

from typing import Literal, NamedTuple

__all__ = ["PEAK_OF_PRODUCT", "WEIGHT_FORMATS", "ProductType", "Quantization", "WeightFormat"]

Quantization = Literal["none", "fp8", "fp8_block", "int8", "w4a16", "mxfp4", "nvfp4"]
ProductType = Literal["bf16", "fp8", "fp8_block", "int8", "nvfp4"]

PEAK_OF_PRODUCT: dict[ProductType, Literal["bf16", "fp8", "int8", "fp4"]] = {
    "bf16": "bf16",
    "fp8": "fp8",
    "fp8_block": "fp8",
    "int8": "int8",
    "nvfp4": "fp4",
}
"""The data type of the GPU's peak rate that a kind of product runs at."""


class WeightFormat(NamedTuple):
    """One way to keep a linear layer's weights; embeddings, LM head, routers and norms are not quantised."""

    bits: float
    """Of one weight, with its share of the scales."""
    product: ProductType
    """Kind of matrix product where the GPU has its type."""
    weight_only: bool = False
    """Without that type the kernel expands the weights and multiplies in bf16; otherwise it is refused."""
    activation_bytes: float = 2.0
    meaning: str = ""

    @property
    def bytes_per_weight(self) -> float:
        """Bytes of one weight, with its share of the scales."""
        return self.bits / 8

    def product_on(self, peaks: dict[str, float]) -> ProductType:
        """The product that a GPU with these peak rates runs."""
        return "bf16" if self.weight_only and PEAK_OF_PRODUCT[self.product] not in peaks else self.product


WEIGHT_FORMATS: dict[Quantization, WeightFormat] = {
    "none": WeightFormat(16, "bf16", meaning="as dtype says"),
    "fp8": WeightFormat(
        8,
        "fp8",
        weight_only=True,
        activation_bytes=1.0,
        meaning="one scale per tensor or channel; expanded to bf16 where the GPU has no fp8",
    ),
    "fp8_block": WeightFormat(
        8 + 32 / (128 * 128),
        "fp8_block",
        weight_only=True,
        activation_bytes=1.0,
        meaning="an fp32 scale per 128 x 128 weights; expanded as fp8",
    ),
    "int8": WeightFormat(8, "int8", activation_bytes=1.0, meaning="W8A8, one scale per channel"),
    "w4a16": WeightFormat(
        4 + 16 / 128,
        "bf16",
        meaning="AWQ, GPTQ: an fp16 scale per 128 weights, expanded to bf16 in the kernel",
    ),
    "mxfp4": WeightFormat(
        4 + 8 / 32, "bf16", meaning="an 8-bit scale per 32 weights, expanded to bf16 in the kernel"
    ),
    "nvfp4": WeightFormat(
        4 + 8 / 16,
        "nvfp4",
        weight_only=True,
        activation_bytes=4.5 / 8,
        meaning="an fp8 scale per 16 weights; multiplied in fp4 where the GPU can, else expanded to bf16",
    ),
}
"""Every value of engine.quantization. Bits: OCP MX and NVFP4 formats, and vLLM's group sizes."""
