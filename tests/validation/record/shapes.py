"""Model shapes that are recorded: configurations written by hand, served with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["SHAPES", "hf_config", "model_yaml", "write_hf_config"]

Shape = dict[str, Any]


def _dense(
    layers: int, hidden: int, inter: int, heads: int, kv_heads: int, head_dim: int, vocab: int, tied: bool
) -> Shape:
    """The facts of a Llama, in the words of a model file of servesim."""
    return {
        "num_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": inter,
        "num_attention_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
    }


SHAPES: dict[str, Shape] = {
    # For a CPU core: steps of 5 to 30 ms.
    "llama-c57m": _dense(8, 640, 1792, 10, 5, 64, 16000, False),
    "llama-c87m": _dense(12, 768, 2048, 12, 4, 64, 16000, True),
    "llama-c127m": _dense(8, 1024, 2816, 16, 8, 64, 16000, False),
    "moe-c130m": {
        **_dense(6, 512, 1536, 8, 4, 64, 16000, False),
        "intermediate_size": None,
        "qk_norm": True,
        "moe": {"num_experts": 16, "experts_per_token": 4, "intermediate_size": 640},
    },
    # Only to time the operator of experts: other numbers of them, other widths than the one that is judged.
    "moe-c110m": {
        **_dense(4, 640, 1792, 10, 5, 64, 16000, False),
        "intermediate_size": None,
        "qk_norm": True,
        "moe": {"num_experts": 24, "experts_per_token": 3, "intermediate_size": 448},
    },
    "moe-c100m": {
        **_dense(4, 768, 2048, 12, 4, 64, 16000, False),
        "intermediate_size": None,
        "qk_norm": True,
        "moe": {"num_experts": 8, "experts_per_token": 2, "intermediate_size": 1024},
    },
    "moe-c112m": {
        **_dense(4, 640, 1792, 10, 5, 64, 16000, False),
        "intermediate_size": None,
        "qk_norm": True,
        "moe": {"num_experts": 32, "experts_per_token": 6, "intermediate_size": 320},
    },
    # For a GPU.
    "llama-1b": _dense(16, 2048, 8192, 32, 8, 64, 128256, True),
    "llama-3b": _dense(28, 3072, 8192, 24, 8, 128, 128256, True),
    "llama-8b": _dense(32, 4096, 14336, 32, 8, 128, 128256, False),
    # 24 of the 48 layers of a 30B-A3B.
    "moe-15b": {
        **_dense(24, 2048, 6144, 32, 4, 128, 151936, False),
        "intermediate_size": None,
        "qk_norm": True,
        "moe": {"num_experts": 128, "experts_per_token": 8, "intermediate_size": 768},
    },
}


def hf_config(name: str) -> dict[str, Any]:
    """config.json of a shape, as transformers reads it."""
    shape = SHAPES[name]
    moe = shape.get("moe")
    config = {
        "architectures": ["Qwen3MoeForCausalLM" if moe else "LlamaForCausalLM"],
        "model_type": "qwen3_moe" if moe else "llama",
        "num_hidden_layers": shape["num_layers"],
        "hidden_size": shape["hidden_size"],
        "intermediate_size": shape["intermediate_size"] or 3 * shape["hidden_size"],
        "num_attention_heads": shape["num_attention_heads"],
        "num_key_value_heads": shape["num_kv_heads"],
        "head_dim": shape["head_dim"],
        "vocab_size": shape["vocab_size"],
        "tie_word_embeddings": shape["tie_word_embeddings"],
        "max_position_embeddings": 131072,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "attention_bias": False,
        "initializer_range": 0.02,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }
    if moe:
        config |= {
            "num_experts": moe["num_experts"],
            "num_experts_per_tok": moe["experts_per_token"],
            "moe_intermediate_size": moe["intermediate_size"],
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    return config


def model_yaml(name: str) -> str:
    """The same shape as a model file of servesim."""
    shape = SHAPES[name]
    facts = {
        "name": name,
        "label": name,
        "source": "made for recording, random weights (tests/validation/record/shapes.py)",
        **{key: value for key, value in shape.items() if value is not None and key != "moe"},
        "max_position_embeddings": 131072,
    }
    shown = {key: json.dumps(value) if isinstance(value, bool) else value for key, value in facts.items()}
    lines = [f"{key}: {value}" for key, value in shown.items()]
    if "moe" in shape:
        lines += ["moe:", *(f"  {key}: {value}" for key, value in shape["moe"].items())]
    return "\n".join(lines) + "\n"


def write_hf_config(name: str, folder: Path) -> Path:
    """A folder that vLLM loads as a model."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf_config(name)), encoding="utf-8")
    return folder
