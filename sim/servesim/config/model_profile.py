"""A model's architecture: the facts of its file, and the counts and bytes that follow from them."""

from __future__ import annotations

import re
from functools import cached_property
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, model_validator

from servesim.config.record import Record, RuleError

__all__ = ["LayerParameters", "MlaConfig", "ModelProfile", "MoeConfig", "SlidingWindow"]

Count = Annotated[int, Field(ge=1, le=10**9)]
CountOrZero = Annotated[int, Field(ge=0, le=10**9)]


class SlidingWindow(Record):
    """Layers that attend only to the newest tokens."""

    tokens: Count
    """Tokens that a sliding layer attends to, the new one included."""
    pattern: tuple[Literal["sliding", "full"], ...] = Field(default=("sliding",), min_length=1)
    """Kind of layer 0, 1, ...; repeated until the last layer."""


class MoeConfig(Record):
    """Layers whose MLP is a set of experts."""

    num_experts: Count
    """Routed experts of a layer."""
    experts_per_token: Count
    num_shared_experts: CountOrZero = 0
    """Experts that see every token; each as wide as a routed one."""
    intermediate_size: Count
    """Width of one expert."""
    first_dense_layers: CountOrZero = 0
    """Leading layers that have a plain MLP instead of experts."""
    dense_intermediate_size: Count | None = None
    """Width of that plain MLP."""
    router_bias: bool = False
    expert_bias: bool = False
    routed_weight_bits: float | None = Field(default=None, gt=0, le=32)
    """Bits of one routed expert weight as published, with its share of scales; empty: the engine's type."""

    @model_validator(mode="after")
    def _is_consistent(self) -> MoeConfig:
        if self.experts_per_token > self.num_experts:
            raise RuleError("is larger than num_experts", path=("experts_per_token",))
        if (self.first_dense_layers > 0) != (self.dense_intermediate_size is not None):
            raise RuleError("comes with dense_intermediate_size, or not at all", path=("first_dense_layers",))
        return self


class MlaConfig(Record):
    """Multi-head latent attention: keys and values are kept as one compressed vector per token."""

    kv_lora_rank: Count
    q_lora_rank: Count | None = None
    """Rank of the query compression; empty when queries are projected directly."""
    qk_nope_head_dim: Count
    qk_rope_head_dim: Count
    v_head_dim: Count


def _whole(section: Any, key: str) -> int:
    """A number of a section that is not validated yet; 0 where it is none, which validation reports."""
    value = section.get(key) if isinstance(section, dict) else None
    return int(value) if isinstance(value, (int, str)) and re.fullmatch(r"\d{1,9}", str(value)) else 0


class LayerParameters(NamedTuple):
    """Parameters of one layer by part: matrices first, then the vectors that never get quantised."""

    attention: int
    dense_mlp: int
    routed_experts: int
    shared_experts: int
    router: int
    norms: int
    biases: int
    """Biases and attention sinks."""

    @property
    def total(self) -> int:
        return sum(self)


class ModelProfile(Record):
    """One decoder-only language model."""

    name: str = Field(min_length=1)
    label: str = Field(min_length=1)
    source: str = Field(min_length=1)
    """Where the configuration was read."""
    num_layers: Annotated[int, Field(ge=1, le=10_000)]
    hidden_size: Count
    intermediate_size: Count
    """Width of a plain MLP layer; leave empty in a model with experts (its `moe` section says it)."""
    num_attention_heads: Count
    num_kv_heads: Count
    """KV heads; leave empty in a model with `mla`: one latent vector serves all heads."""
    head_dim: Count
    """Elements of a key or value; leave empty in a model with `mla`: kv_lora_rank + qk_rope_head_dim."""
    vocab_size: Count
    max_position_embeddings: Count
    tie_word_embeddings: bool = False
    gated_mlp: bool = True
    """Gate, up and down matrices (SwiGLU and kin); false: up and down only."""
    sliding_window: SlidingWindow | None = None
    moe: MoeConfig | None = None
    mla: MlaConfig | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    norms_per_layer: Count = 2
    norm_bias: bool = False
    qk_norm: bool = False
    """A norm on every query head and one on every key head, shared between heads."""
    attention_sinks: bool = False
    """One learned logit per attention head."""
    num_learned_positions: CountOrZero = 0
    """Rows of a learned position embedding; 0 for rotary positions."""

    @model_validator(mode="before")
    @classmethod
    def _fill_what_follows(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        implied: dict[str, int] = {}
        if (mla := data.get("mla")) is not None:
            implied["num_kv_heads"] = 1
            implied["head_dim"] = (_whole(mla, "kv_lora_rank") + _whole(mla, "qk_rope_head_dim")) or 1
        if (moe := data.get("moe")) is not None:
            width = _whole(moe, "dense_intermediate_size") or _whole(moe, "intermediate_size")
            implied["intermediate_size"] = width or 1
        for key, value in implied.items():
            if data.get(key, value) != value:
                raise RuleError(
                    f"is {value} by the mla or moe section", path=(key,), next_step="leave it out"
                )
        return {**data, **implied}

    @model_validator(mode="after")
    def _is_consistent(self) -> ModelProfile:
        if self.num_attention_heads % self.num_kv_heads:
            raise RuleError("is not a multiple of num_kv_heads", path=("num_attention_heads",))
        if self.mla and self.head_dim != self.mla.kv_lora_rank + self.mla.qk_rope_head_dim:
            raise RuleError("needs whole numbers", path=("mla",))
        if self.moe and self.moe.first_dense_layers >= self.num_layers:
            raise RuleError("leaves no layer with experts", path=("moe", "first_dense_layers"))
        return self

    @cached_property
    def windows(self) -> tuple[int | None, ...]:
        """The attention window of every layer in tokens; None attends to the whole context."""
        if self.sliding_window is None:
            return (None,) * self.num_layers
        tokens, pattern = self.sliding_window.tokens, self.sliding_window.pattern
        kinds = (pattern[layer % len(pattern)] for layer in range(self.num_layers))
        return tuple(tokens if kind == "sliding" else None for kind in kinds)

    def pipeline_stage(self, num_stages: int) -> ModelProfile:
        """What the fullest of ``num_stages`` pipeline stages holds, for its memory.

        Its share of the layers rounded up, dense ones spread with the others, and one table of the
        vocabulary: the embedding of the first stage or the LM head of the last.
        """
        if num_stages == 1:
            return self
        layers = -(-self.num_layers // num_stages)
        update: dict[str, Any] = {"num_layers": layers, "tie_word_embeddings": True}
        if self.moe is not None:
            dense = min(self.moe.first_dense_layers // num_stages, layers - 1)
            update["moe"] = self.moe.model_copy(update={"first_dense_layers": dense})
        stage = self.model_copy(update=update)
        for cached in ("windows", "layer_totals", "num_parameters", "num_active_parameters"):
            stage.__dict__.pop(cached, None)  # model_copy takes computed values along
        return stage

    @property
    def num_moe_layers(self) -> int:
        """Layers with experts."""
        return self.num_layers - self.moe.first_dense_layers if self.moe else 0

    @property
    def num_dense_layers(self) -> int:
        """Layers with a plain MLP."""
        return self.num_layers - self.num_moe_layers

    @property
    def embedding_parameters(self) -> int:
        """Token embedding and learned positions."""
        return (self.vocab_size + self.num_learned_positions) * self.hidden_size

    @property
    def lm_head_parameters(self) -> int:
        """The output matrix; 0 when it is the token embedding itself."""
        return 0 if self.tie_word_embeddings else self.vocab_size * self.hidden_size

    @property
    def replicated_attention_parameters(self) -> int:
        """Attention matrix parameters of a layer that every tensor-parallel GPU holds whole (MLA only)."""
        if self.mla is None:
            return 0
        return self.hidden_size * ((self.mla.q_lora_rank or 0) + self.head_dim)

    @property
    def kv_projection_parameters(self) -> int:
        """Parameters of a layer's K and V projections, split over at most num_kv_heads GPUs (not MLA)."""
        return 0 if self.mla else 2 * self.hidden_size * self.num_kv_heads * self.head_dim

    @property
    def attention_matrix_parameters(self) -> int:
        """Matrix parameters of one layer's attention."""
        if self.mla is None:
            return (
                2 * self.hidden_size * self.num_attention_heads * self.head_dim
                + self.kv_projection_parameters
            )
        mla, heads = self.mla, self.num_attention_heads
        queries = (
            (mla.q_lora_rank or self.hidden_size) * heads * (mla.qk_nope_head_dim + mla.qk_rope_head_dim)
        )
        expand = mla.kv_lora_rank * heads * (mla.qk_nope_head_dim + mla.v_head_dim)
        output = heads * mla.v_head_dim * self.hidden_size
        return self.replicated_attention_parameters + queries + expand + output

    def _mlp_matrices(self, width: int) -> int:
        return (3 if self.gated_mlp else 2) * self.hidden_size * width

    def _mlp_biases(self, width: int) -> int:
        return (2 if self.gated_mlp else 1) * width + self.hidden_size

    def layer_parameters(self, layer: int) -> LayerParameters:
        """Parameters of layer ``layer``, by part."""
        moe = self.moe if self.moe and layer >= self.moe.first_dense_layers else None
        norm_size = self.hidden_size * (2 if self.norm_bias else 1)
        norms = self.norms_per_layer * norm_size + (2 * self.head_dim if self.qk_norm else 0)
        if self.mla:
            norms += self.mla.kv_lora_rank + (self.mla.q_lora_rank or 0)
        biases = self.num_attention_heads if self.attention_sinks else 0
        if self.qkv_bias:
            biases += (self.num_attention_heads + 2 * self.num_kv_heads) * self.head_dim
        if self.o_bias:
            biases += self.hidden_size
        if moe is None:
            biases += self._mlp_biases(self.intermediate_size) if self.mlp_bias else 0
            mlp = self._mlp_matrices(self.intermediate_size)
            return LayerParameters(self.attention_matrix_parameters, mlp, 0, 0, 0, norms, biases)
        if moe.router_bias:
            biases += moe.num_experts
        if moe.expert_bias:
            biases += moe.num_experts * self._mlp_biases(moe.intermediate_size)
        expert = self._mlp_matrices(moe.intermediate_size)
        return LayerParameters(
            self.attention_matrix_parameters,
            0,
            moe.num_experts * expert,
            moe.num_shared_experts * expert,
            self.hidden_size * moe.num_experts,
            norms,
            biases,
        )

    @cached_property
    def layer_totals(self) -> LayerParameters:
        """Parameters of all layers together, by part."""
        dense, moe = self.layer_parameters(0), self.layer_parameters(self.num_layers - 1)
        dense_layers = self.moe.first_dense_layers if self.moe else 0
        moe_layers = self.num_layers - dense_layers
        return LayerParameters(*(dense_layers * a + moe_layers * b for a, b in zip(dense, moe, strict=True)))

    @property
    def final_norm_parameters(self) -> int:
        """The norm before the LM head."""
        return self.hidden_size * (2 if self.norm_bias else 1)

    @cached_property
    def num_parameters(self) -> int:
        """All parameters; tied embeddings once."""
        layers = self.layer_totals.total
        return layers + self.embedding_parameters + self.lm_head_parameters + self.final_norm_parameters

    @cached_property
    def num_active_parameters(self) -> int:
        """Parameters that one token uses, input embedding included: routed experts count by their share."""
        if self.moe is None:
            return self.num_parameters
        moe, expert = self.moe, self._mlp_matrices(self.moe.intermediate_size)
        if moe.expert_bias:
            expert += self._mlp_biases(moe.intermediate_size)
        return self.num_parameters - self.num_moe_layers * (moe.num_experts - moe.experts_per_token) * expert

    def weight_bytes(
        self, bytes_per_linear_param: float, bytes_per_other_param: float, tensor_parallel_size: int = 1
    ) -> float:
        """Weight bytes on one GPU.

        Matrices of linear layers take the first size (routed experts their published one, if the file gives
        it); embeddings, LM head, routers, norms and biases the second. K and V projections split over at
        most num_kv_heads GPUs; MLA's down-projections, routers, norms, biases and learned positions are held
        whole by every GPU, all else splits evenly (vLLM's layout without expert parallelism).
        """
        layers, degree = self.layer_totals, tensor_parallel_size
        kv = self.num_layers * self.kv_projection_parameters
        whole = self.num_layers * self.replicated_attention_parameters
        split = layers.attention - kv - whole + layers.dense_mlp + layers.shared_experts
        linear = whole + kv / min(degree, self.num_kv_heads) + split / degree
        bits = self.moe.routed_weight_bits if self.moe else None
        experts = layers.routed_experts / degree * (bits / 8 if bits else bytes_per_linear_param)
        vocabulary = self.vocab_size * self.hidden_size + self.lm_head_parameters
        positions = self.num_learned_positions * self.hidden_size
        small = layers.router + layers.norms + layers.biases + self.final_norm_parameters + positions
        return (
            linear * bytes_per_linear_param + experts + (vocabulary / degree + small) * bytes_per_other_param
        )

    def kv_bytes_per_token_and_layer(self, dtype_bytes: float = 2.0) -> float:
        """KV bytes that one layer keeps of one token: K and V of every KV head, or the one MLA latent."""
        return (1 if self.mla else 2) * self.num_kv_heads * self.head_dim * dtype_bytes

    def kv_bytes_per_token(self, dtype_bytes: float = 2.0) -> float:
        """KV bytes of one token in all layers, windows ignored; of the whole model, not per GPU."""
        return self.num_layers * self.kv_bytes_per_token_and_layer(dtype_bytes)

    def kv_bytes(self, context_tokens: int, dtype_bytes: float = 2.0) -> float:
        """KV bytes that a sequence of ``context_tokens`` needs: sliding layers keep their window only."""
        tokens = sum(min(context_tokens, window or context_tokens) for window in self.windows)
        return tokens * self.kv_bytes_per_token_and_layer(dtype_bytes)
