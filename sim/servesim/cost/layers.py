"""What one tensor-parallel GPU computes in every layer: the shapes of its products and its attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from servesim.config.profiles import ModelProfile
from servesim.cost.attention import AttentionShape

__all__ = ["Experts", "Linear", "Shard", "shard"]


class Linear(NamedTuple):
    """A weight matrix of k x n that ``num_layers`` layers have, applied to every token of a step."""

    name: str
    num_layers: int
    n: int
    k: int
    quantised: bool = True
    """Whether a quantised model keeps it in the quantised type."""


class Experts(NamedTuple):
    """The routed experts of ``num_layers`` layers; each has matrices hidden x up and width x hidden.

    Tensor parallelism gives every GPU a slice of each expert, expert parallelism (``num_ranks`` above 1)
    whole experts.
    """

    num_layers: int
    num_experts: int
    """Of a layer, on all GPUs together."""
    experts_per_token: int
    up: int
    width: int
    num_ranks: int
    weight_bits: float | None
    """As published; None: the engine's type."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One GPU's part of a model under tensor parallelism.

    ``windows`` are the distinct attention windows in the order of their first layer, ``window_layers`` how
    many layers have each.  ``decode_linears`` and ``prefill_linears`` (MLA) are applied to the decoding
    tokens, and to the new and cached tokens of prompt chunks: decoding folds the latent's expansion into the
    query and the output, prefill expands keys and values of every head.
    """

    num_layers: int
    hidden_size: int
    vocab_size: int
    attention: AttentionShape
    linears: tuple[Linear, ...]
    experts: Experts | None
    decode_linears: tuple[Linear, ...]
    prefill_linears: tuple[Linear, ...]
    windows: tuple[int | None, ...]
    window_layers: tuple[int, ...]
    rotated_elements: int
    """Query and key elements of one token and layer."""
    activations: tuple[tuple[int, int], ...]
    """Layers and width of every plain or shared MLP's activation."""


def shard(model: ModelProfile, degree: int, expert_parallel: bool = False) -> Shard:
    """The part of ``model`` that each of ``degree`` GPUs holds, in vLLM's layout.

    Heads, MLP width and vocabulary are split; KV heads are repeated once there are fewer than GPUs; the MLA
    latent, its down-projection and the router are whole on every GPU.  Experts are split in width, or dealt
    out whole when ``expert_parallel``.
    """
    heads, kv_heads = model.num_attention_heads // degree, max(1, model.num_kv_heads // degree)
    windows = tuple(dict.fromkeys(model.windows))
    mla = model.mla
    if mla is None:
        head_flops = 4.0 * heads * model.head_dim
        decode_flops, prefill_flops = head_flops, head_flops
        kv_elements, rotated = 2 * kv_heads * model.head_dim, (heads + kv_heads) * model.head_dim
    else:
        query = mla.qk_nope_head_dim + mla.qk_rope_head_dim
        decode_flops = 2.0 * heads * (2 * mla.kv_lora_rank + mla.qk_rope_head_dim)
        prefill_flops = 2.0 * heads * (query + mla.v_head_dim)
        kv_elements, rotated = model.head_dim, heads * query + model.head_dim
    absorbed, expanded = _latent_linears(model, heads)
    return Shard(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        vocab_size=-(-model.vocab_size // degree),
        attention=AttentionShape(
            num_heads=heads,
            num_kv_heads=kv_heads,
            kv_elements=kv_elements,
            decode_flops_per_context_token=decode_flops,
            prefill_flops_per_pair=prefill_flops,
            latent=mla is not None,
            sinks=model.attention_sinks,
        ),
        linears=(*_attention_linears(model, heads, kv_heads), *_mlp_linears(model, degree)),
        experts=_experts(model, degree, expert_parallel),
        decode_linears=absorbed,
        prefill_linears=expanded,
        windows=windows,
        window_layers=tuple(model.windows.count(window) for window in windows),
        rotated_elements=rotated,
        activations=tuple((count, width) for _, count, width in _plain_mlps(model, degree)),
    )


def _attention_linears(model: ModelProfile, heads: int, kv_heads: int) -> tuple[Linear, ...]:
    layers, hidden, mla = model.num_layers, model.hidden_size, model.mla
    if mla is None:
        return (
            Linear("qkv", layers, (heads + 2 * kv_heads) * model.head_dim, hidden),
            Linear("attention_output", layers, hidden, heads * model.head_dim),
        )
    latent, queries = model.head_dim, heads * (mla.qk_nope_head_dim + mla.qk_rope_head_dim)
    if mla.q_lora_rank is None:
        down = (Linear("qkv", layers, queries, hidden), Linear("qkv", layers, latent, hidden))
    else:
        down = (
            Linear("qkv", layers, mla.q_lora_rank + latent, hidden),
            Linear("qkv", layers, queries, mla.q_lora_rank),
        )
    return (*down, Linear("attention_output", layers, hidden, heads * mla.v_head_dim))


def _plain_mlps(model: ModelProfile, degree: int) -> list[tuple[str, int, int]]:
    """Name, layers and width on one GPU of the MLPs that see every token."""
    mlps = []
    if model.num_dense_layers:
        mlps.append(("mlp", model.num_dense_layers, model.intermediate_size // degree))
    if model.moe is not None and model.moe.num_shared_experts:
        width = model.moe.num_shared_experts * model.moe.intermediate_size // degree
        mlps.append(("shared_experts", model.num_moe_layers, width))
    return mlps


def _mlp_linears(model: ModelProfile, degree: int) -> list[Linear]:
    hidden, up_matrices = model.hidden_size, 2 if model.gated_mlp else 1
    linears = []
    for name, count, width in _plain_mlps(model, degree):
        linears += [Linear(name, count, up_matrices * width, hidden), Linear(name, count, hidden, width)]
    if model.moe is not None:
        router = Linear("router", model.num_moe_layers, model.moe.num_experts, hidden, quantised=False)
        linears.append(router)
    return linears


def _experts(model: ModelProfile, degree: int, expert_parallel: bool) -> Experts | None:
    moe = model.moe
    if moe is None:
        return None
    width = moe.intermediate_size if expert_parallel else moe.intermediate_size // degree
    return Experts(
        num_layers=model.num_moe_layers,
        num_experts=moe.num_experts,
        experts_per_token=moe.experts_per_token,
        up=(2 if model.gated_mlp else 1) * width,
        width=width,
        num_ranks=degree if expert_parallel else 1,
        weight_bits=moe.routed_weight_bits,
    )


def _latent_linears(model: ModelProfile, heads: int) -> tuple[tuple[Linear, ...], tuple[Linear, ...]]:
    """MLA's expansion of the latent, as decode and as prefill apply it; kept unquantised by vLLM."""
    mla = model.mla
    if mla is None:
        return (), ()
    layers, rank = model.num_layers, mla.kv_lora_rank
    keys, values = heads * mla.qk_nope_head_dim, heads * mla.v_head_dim
    absorbed = (
        Linear("latent_expansion", layers, keys, rank, quantised=False),
        Linear("latent_expansion", layers, values, rank, quantised=False),
    )
    return absorbed, (Linear("latent_expansion", layers, keys + values, rank),)
