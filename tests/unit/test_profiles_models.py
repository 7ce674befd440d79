"""Model profiles: counts and bytes against the published catalog, and files that are broken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from servesim.config.load import find_data, list_data, read_yaml
from servesim.config.profiles import ModelProfile, load_model
from servesim.errors import ConfigError

GIB = 2**30


class Row(NamedTuple):
    """A row of the catalog: parameters in 1e9, weights in bf16 GiB, KV bytes per token, sliding layers."""

    billions: str
    weights_gib: str
    kv_bytes_per_token: int
    sliding_layers: int = 0
    window: int = 0


# Computed independently from published configurations; each count within 0.1 % of the published checkpoint.
CATALOG = {
    "gpt-2": Row("0.124", "0.2", 36_864),
    "opt-13b": Row("12.853", "23.9", 819_200),
    "opt-66b": Row("65.720", "122.4", 2_359_296),
    "opt-175b": Row("174.604", "325.2", 4_718_592),
    "llama-2-7b": Row("6.738", "12.6", 524_288),
    "llama-2-13b": Row("13.016", "24.2", 819_200),
    "llama-2-70b": Row("68.977", "128.5", 327_680),
    "llama-3.1-8b": Row("8.030", "15.0", 131_072),
    "llama-3.1-70b": Row("70.554", "131.4", 327_680),
    "llama-3.1-405b": Row("405.853", "756.0", 516_096),
    "llama-3.2-1b": Row("1.236", "2.3", 32_768),
    "llama-3.2-3b": Row("3.213", "6.0", 114_688),
    "mistral-7b-v0.1": Row("7.242", "13.5", 131_072, 32, 4096),
    "qwen2.5-7b": Row("7.616", "14.2", 57_344),
    "qwen2.5-72b": Row("72.706", "135.4", 327_680),
    "qwen3-8b": Row("8.191", "15.3", 147_456),
    "qwen3-32b": Row("32.762", "61.0", 262_144),
    "gemma-2-27b": Row("27.227", "50.7", 376_832, 23, 4096),
    "gemma-3-27b": Row("27.009", "50.3", 507_904, 52, 1024),
    "phi-3-mini-4k": Row("3.821", "7.1", 393_216, 32, 2048),
    "phi-4": Row("14.660", "27.3", 204_800),
    "yi-34b": Row("34.389", "64.1", 245_760),
    "falcon-40b": Row("41.303", "76.9", 122_880),
    "falcon-180b": Row("179.523", "334.4", 163_840),
    "mixtral-8x7b": Row("46.703", "87.0", 131_072),
    "qwen3-30b-a3b": Row("30.532", "56.9", 98_304),
    "qwen3-235b-a22b": Row("235.094", "437.9", 192_512),
    "gpt-oss-20b": Row("20.915", "39.0", 49_152, 12, 128),
    "gpt-oss-120b": Row("116.829", "217.6", 73_728, 18, 128),
    "deepseek-v2-lite": Row("15.706", "29.3", 31_104),
    "deepseek-v2": Row("235.741", "439.1", 69_120),
    "deepseek-v3": Row("671.026", "1249.9", 70_272),
}


def test_every_model_of_the_catalog_is_shipped_and_no_other() -> None:
    shipped = Path(__file__).parents[2] / "hardware" / "models"
    assert {path.stem for path in shipped.glob("*.yaml")} == set(CATALOG)


@pytest.mark.parametrize("name", CATALOG)
def test_counts_and_bytes_equal_the_catalog(name: str) -> None:
    model, row = load_model(name), CATALOG[name]
    assert model.name == name
    assert f"{model.num_parameters / 1e9:.3f}" == row.billions
    assert f"{2 * model.num_parameters / GIB:.1f}" == row.weights_gib
    assert model.kv_bytes_per_token() == row.kv_bytes_per_token
    sliding = [window for window in model.windows if window is not None]
    assert len(model.windows) == model.num_layers
    assert sliding == [row.window] * row.sliding_layers


@pytest.mark.parametrize(
    ("name", "exactly"),
    [("gpt-2", 124_439_808), ("falcon-180b", 179_522_565_120), ("deepseek-v3", 671_026_419_200)],
)
def test_counts_are_exact_to_the_last_bias(name: str, exactly: int) -> None:
    assert load_model(name).num_parameters == exactly


@pytest.mark.parametrize(
    ("name", "context_tokens", "gib"),
    [
        ("llama-2-7b", 2048, "1.000"),
        ("llama-2-7b", 4096, "2.000"),
        ("llama-2-7b", 32_768, "16.000"),
        ("llama-3.1-70b", 4096, "1.250"),
        ("llama-3.1-70b", 32_768, "10.000"),
        ("llama-3.1-70b", 131_072, "40.000"),
        ("qwen3-8b", 40_960, "5.625"),
        ("deepseek-v3", 131_072, "8.578"),
        ("mistral-7b-v0.1", 32_768, "0.500"),
        ("gemma-2-27b", 32_768, "6.469"),
        ("gemma-3-27b", 32_768, "2.906"),
        ("gpt-oss-120b", 32_768, "1.129"),
    ],
)
def test_kv_bytes_of_a_context(name: str, context_tokens: int, gib: str) -> None:
    assert f"{load_model(name).kv_bytes(context_tokens) / GIB:.3f}" == gib


def test_kv_bytes_in_decimal_units() -> None:
    assert f"{load_model('opt-13b').kv_bytes(2048) / 1e9:.3f}" == "1.678"
    assert f"{load_model('llama-3.1-70b').kv_bytes(500_000) / 1e9:.2f}" == "163.84"


def test_grouped_heads_save_eight_times_on_llama_2_70b() -> None:
    grouped = load_model("llama-2-70b")
    full = grouped.model_copy(update={"num_kv_heads": grouped.num_attention_heads})
    assert full.kv_bytes(4096) == 10 * GIB
    assert full.kv_bytes(131_072) == 320 * GIB


def test_an_fp8_cache_takes_half() -> None:
    model = load_model("gpt-oss-20b")
    assert 2 * model.kv_bytes(5000, dtype_bytes=1.0) == model.kv_bytes(5000)


def test_the_order_of_sliding_and_full_layers() -> None:
    assert load_model("gemma-3-27b").windows[:7] == (1024, 1024, 1024, 1024, 1024, None, 1024)
    assert load_model("gpt-oss-20b").windows[:3] == (128, None, 128)


@pytest.mark.parametrize(
    ("name", "billions", "with_embedding"),
    [
        ("mixtral-8x7b", "12.88", True),
        ("qwen3-30b-a3b", "3.35", True),
        ("qwen3-235b-a22b", "22.19", True),
        ("deepseek-v3", "37.55", True),
        ("gpt-oss-20b", "3.61", False),
        ("gpt-oss-120b", "5.13", False),
    ],
)
def test_active_parameters(name: str, billions: str, with_embedding: bool) -> None:
    model = load_model(name)
    count = model.num_active_parameters - (0 if with_embedding else model.embedding_parameters)
    assert f"{count / 1e9:.2f}" == billions


@pytest.mark.parametrize("name", CATALOG)
def test_the_parts_make_the_whole(name: str) -> None:
    model = load_model(name)
    layers = sum(model.layer_parameters(layer).total for layer in range(model.num_layers))
    ends = model.embedding_parameters + model.lm_head_parameters + model.final_norm_parameters
    assert layers + ends == model.num_parameters
    assert model.layer_totals.total == layers
    assert model.num_dense_layers + model.num_moe_layers == model.num_layers


def test_deepseek_has_plain_layers_first() -> None:
    model = load_model("deepseek-v3")
    assert model.layer_parameters(2).dense_mlp == 3 * 7168 * 18_432
    assert model.layer_parameters(2).routed_experts == model.layer_parameters(3).dense_mlp == 0
    assert model.layer_parameters(3).shared_experts == 3 * 7168 * 2048
    assert (model.num_kv_heads, model.head_dim, model.intermediate_size) == (1, 576, 18_432)


@pytest.mark.parametrize("name", [name for name in CATALOG if not name.startswith("gpt-oss")])
def test_weights_of_one_type_are_parameters_times_bytes(name: str) -> None:
    model = load_model(name)
    assert model.weight_bytes(2.0, 2.0) == pytest.approx(2 * model.num_parameters, rel=1e-12)


@pytest.mark.parametrize(("name", "gib"), [("gpt-oss-20b", "12.8"), ("gpt-oss-120b", "60.8")])
def test_published_mxfp4_experts_give_the_published_checkpoint_size(name: str, gib: str) -> None:
    # 12.8 and 60.8 GiB: the sizes named in OpenAI's model card.
    assert f"{load_model(name).weight_bytes(2.0, 2.0) / GIB:.1f}" == gib


def test_tensor_parallel_weights_follow_vllms_layout() -> None:
    llama = load_model("llama-3.1-8b")
    norms = (2 * 32 + 1) * 4096
    assert llama.weight_bytes(2.0, 2.0, 8) == 2 * ((llama.num_parameters - norms) / 8 + norms)
    kv = 32 * llama.kv_projection_parameters
    repeated = 2 * ((llama.num_parameters - norms - kv) / 16 + kv / 8 + norms)
    assert llama.weight_bytes(2.0, 2.0, 16) == repeated
    deepseek = load_model("deepseek-v3")
    held_whole = 61 * 7168 * (1536 + 576)
    assert deepseek.weight_bytes(1.0, 0.0, 8) == (
        (deepseek.layer_totals.attention - held_whole) / 8
        + held_whole
        + (deepseek.layer_totals.dense_mlp + deepseek.layer_totals.shared_experts) / 8
        + deepseek.layer_totals.routed_experts / 8
    )


def test_quantised_weights_spare_embeddings_and_routers() -> None:
    model = load_model("mixtral-8x7b")
    kept = model.embedding_parameters + model.lm_head_parameters + 32 * (4096 * 8 + 2 * 4096) + 4096
    assert model.weight_bytes(1.0, 2.0) == model.num_parameters + kept


@given(
    name=st.sampled_from(sorted(CATALOG)),
    context=st.integers(1, 200_000),
    more=st.integers(0, 5000),
    degree=st.sampled_from([1, 2, 4, 8, 16]),
)
def test_bytes_are_bounded(name: str, context: int, more: int, degree: int) -> None:
    model = load_model(name)
    assert 0 < model.kv_bytes(context) <= model.kv_bytes(context + more)
    assert model.kv_bytes(context) <= context * model.kv_bytes_per_token()
    whole = model.weight_bytes(2.0, 2.0)
    assert whole / degree <= model.weight_bytes(2.0, 2.0, degree) * (1 + 1e-12)
    assert model.weight_bytes(2.0, 2.0, degree) <= whole * (1 + 1e-12)


def tree_of(name: str) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads(json.dumps(read_yaml(find_data("models", name))))
    return tree


def written(folder: Path, tree: object) -> Path:
    path = folder / "broken.yaml"
    path.write_text(json.dumps(tree, indent=1), encoding="utf-8")  # JSON is YAML
    return path


def message(folder: Path, tree: object) -> str:
    with pytest.raises(ConfigError) as caught:
        load_model(written(folder, tree))
    return str(caught.value)


def test_a_users_own_file_by_path_and_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = {**tree_of("llama-3.1-8b"), "name": "mine", "num_layers": 2}
    path = written(tmp_path, tree)
    assert load_model(str(path)).num_layers == 2
    assert load_model("broken.yaml", base=tmp_path).name == "mine"
    (tmp_path / "hardware" / "models").mkdir(parents=True)
    path.rename(tmp_path / "hardware" / "models" / "mine.yaml")
    monkeypatch.chdir(tmp_path)
    assert load_model("mine").num_layers == 2
    assert "mine" in list_data("models")


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"did you mean llama-3\.1-8b\?"):
        load_model("llama-3.1-8")


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("llama-3.1-8b", {"num_layer": 3}, "did you mean num_layers?"),
        ("llama-3.1-8b", {"num_layers": 0}, "num_layers"),
        ("llama-3.1-8b", {"hidden_size": "wide"}, "must be a whole number"),
        ("llama-3.1-8b", {"num_kv_heads": 5}, "num_attention_heads  is not a multiple of num_kv_heads"),
        ("mixtral-8x7b", {"intermediate_size": 5}, "intermediate_size  is 14336 by the mla or moe section"),
        ("deepseek-v3", {"head_dim": 128}, "head_dim  is 576 by the mla or moe section"),
        (
            "mixtral-8x7b",
            {"moe": {"num_experts": 2, "experts_per_token": 3, "intermediate_size": 1}},
            "larger",
        ),
        ("mistral-7b-v0.1", {"sliding_window": {"tokens": 0}}, "sliding_window.tokens"),
        (
            "mistral-7b-v0.1",
            {"sliding_window": {"tokens": 9, "pattern": ["local"]}},
            "sliding_window.pattern",
        ),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, name: str, change: dict[str, Any], words: str) -> None:
    text = message(tmp_path, {**tree_of(name), **change})
    assert words in text
    assert "broken.yaml:" in text


def test_quoted_numbers_do_not_hide_the_latents_size(tmp_path: Path) -> None:
    tree = tree_of("deepseek-v3")
    tree["mla"]["kv_lora_rank"] = "512"
    assert load_model(written(tmp_path, tree)).head_dim == 576


REQUIRED = ("name", "source", "num_layers", "hidden_size", "num_kv_heads", "head_dim", "intermediate_size")


@pytest.mark.parametrize("key", REQUIRED)
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    tree = tree_of("llama-3.1-8b")
    del tree[key]
    assert f"{key}  is missing" in message(tmp_path, tree)


def test_profiles_are_frozen() -> None:
    model: ModelProfile = load_model("gpt-2")
    with pytest.raises(ValueError, match="frozen"):
        model.num_layers = 3  # type: ignore[misc]
