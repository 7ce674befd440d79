"""Hardware and model files with something removed or replaced: a ConfigError, never another exception."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from servesim.config.load import find_data, read_yaml
from servesim.config.profiles import GpuProfile, ModelProfile, load_gpu, load_model
from servesim.errors import ConfigError

JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**30), 10**30),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=8),
    st.lists(st.integers(-3, 3), max_size=3),
    st.dictionaries(st.text(max_size=4), st.integers(-3, 3), max_size=3),
)
MODELS = ["llama-3.1-8b", "gemma-3-27b", "gpt-oss-20b", "deepseek-v3"]
GPUS = ["h100-sxm", "a100-80gb-pcie", "mi300x", "rtx-4090"]


def paths(node: object, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value of a tree."""
    children: list[tuple[Any, object]] = []
    if isinstance(node, dict):
        children = list(node.items())
    elif isinstance(node, list):
        children = list(enumerate(node))
    found: list[tuple[Any, ...]] = []
    for key, child in children:
        found += [(*above, key), *paths(child, (*above, key))]
    return found


def damaged(data: st.DataObject, kind: str, names: list[str]) -> dict[str, Any]:
    """A shipped file's content with one value removed or replaced."""
    name = data.draw(st.sampled_from(names))
    tree: dict[str, Any] = json.loads(json.dumps(read_yaml(find_data(kind, name))))
    *sections, key = data.draw(st.sampled_from(paths(tree)))
    node: Any = tree
    for section in sections:
        node = node[section]
    if data.draw(st.booleans()):
        del node[key]
    else:
        node[key] = data.draw(JUNK)
    return tree


def loaded(load: Any, folder: Path, tree: object) -> Any:
    """The profile, or the text of the ConfigError."""
    path = folder / "broken.yaml"
    path.write_text(json.dumps(tree, indent=1), encoding="utf-8")  # JSON is YAML
    try:
        return load(path)
    except ConfigError as error:
        return str(error)


fuzz = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=200)


@fuzz
@given(data=st.data())
def test_a_damaged_model_file(tmp_path: Path, data: st.DataObject) -> None:
    result = loaded(load_model, tmp_path, damaged(data, "models", MODELS))
    if isinstance(result, ModelProfile):
        assert result.num_parameters > 0
        assert 0 < result.kv_bytes(1000) <= 1000 * result.kv_bytes_per_token()
        assert result.weight_bytes(1.0, 2.0, 2) > 0
    else:
        assert "broken.yaml" in result


@fuzz
@given(data=st.data())
def test_a_damaged_gpu_file(tmp_path: Path, data: st.DataObject) -> None:
    result = loaded(load_gpu, tmp_path, damaged(data, "gpus", GPUS))
    if isinstance(result, GpuProfile):
        assert 0 < result.cuda_memory_bytes <= result.memory_bytes
        assert result.hbm_bandwidth_bytes_per_s > 0
        assert all(0 < law.compute <= 1 for law in result.efficiency.gemm.values())
    else:
        assert "broken.yaml" in result
