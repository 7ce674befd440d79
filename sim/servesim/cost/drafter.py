"""The drafter of speculative decoding: what it is made of, and the memory it takes."""

from __future__ import annotations

from typing import NamedTuple

from servesim.config.kv_formats import KV_FORMATS
from servesim.config.profiles import ModelProfile
from servesim.config.scenario import EngineConfig
from servesim.config.speculative import SpeculativeConfig

__all__ = ["DrafterMemory", "drafter_memory", "head_layer"]

_BYTES = 2.0  # a drafter's weights are not quantised


class DrafterMemory(NamedTuple):
    """One GPU's memory of a drafter."""

    weights_bytes: int
    token_bytes: int
    """KV of one token in the drafter's layers, which have a page in every block."""


def drafter_memory(model: ModelProfile, engine: EngineConfig, draft: ModelProfile | None) -> DrafterMemory:
    """The memory that ``engine``'s drafter takes; ``draft`` is the profile of its draft model, if it has one.

    An EAGLE or MTP head is one layer and a matrix that joins hidden state and embedding, and shares the
    model's embedding and LM head; a Medusa head is a square matrix and an LM head.
    Sources: EAGLE (arXiv 2401.15077), Medusa (2401.10774); vLLM 0.26 puts a drafter's layers into the groups
    of the KV cache.
    """
    speculative, degree = engine.speculative, engine.tensor_parallel_size
    if speculative is None or speculative.method == "ngram":
        return DrafterMemory(0, 0)
    hidden = model.hidden_size
    if speculative.method == "medusa":
        heads = speculative.num_speculative_tokens * hidden * (hidden + model.vocab_size)
        return DrafterMemory(int(heads * _BYTES / degree), 0)
    if speculative.method == "draft":
        assert draft is not None
        weights = draft.weight_bytes(_BYTES, _BYTES, degree)
    else:
        draft = head_layer(model, speculative)
        weights = (draft.layer_totals.total + 2 * hidden * hidden) * _BYTES / degree
    kv_bytes = draft.kv_bytes_per_token(KV_FORMATS[engine.kv_cache_dtype].bytes_per_element(draft.head_dim))
    return DrafterMemory(int(weights), int(kv_bytes / min(degree, draft.num_kv_heads)))


def head_layer(model: ModelProfile, speculative: SpeculativeConfig) -> ModelProfile:
    """The layer of a drafting head: as the model's own last one for MTP, with a plain MLP for EAGLE."""
    moe = model.moe if speculative.method == "mtp" else None
    if moe is not None:
        moe = moe.model_copy(update={"first_dense_layers": 0, "dense_intermediate_size": None})
    head = model.model_copy(update={"num_layers": 1, "sliding_window": None, "moe": moe})
    for cached in ("windows", "layer_totals", "num_parameters", "num_active_parameters"):
        head.__dict__.pop(cached, None)  # model_copy takes computed values along
    return head
