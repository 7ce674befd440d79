"""GPU and model profiles by name or path: hardware/gpus/NAME.yaml and hardware/models/NAME.yaml."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from servesim.config.gpu_file import GpuFile
from servesim.config.gpu_profile import (
    PEAK_OF_EXPERTS,
    AllReduceEfficiency,
    DecodeAttentionEfficiency,
    Efficiency,
    ElementwiseKind,
    ExpertEfficiency,
    ExpertFormat,
    FirstCallEfficiency,
    GemmEfficiency,
    GpuProfile,
    KernelError,
    PrefillAttentionEfficiency,
)
from servesim.config.load import find_data, parse, read_yaml
from servesim.config.model_profile import LayerParameters, MlaConfig, ModelProfile, MoeConfig, SlidingWindow
from servesim.config.problems import locate
from servesim.errors import ConfigError, Problem

__all__ = [
    "PEAK_OF_EXPERTS",
    "AllReduceEfficiency",
    "DecodeAttentionEfficiency",
    "Efficiency",
    "ElementwiseKind",
    "ExpertEfficiency",
    "ExpertFormat",
    "FirstCallEfficiency",
    "GemmEfficiency",
    "GpuProfile",
    "KernelError",
    "LayerParameters",
    "MlaConfig",
    "ModelProfile",
    "MoeConfig",
    "PrefillAttentionEfficiency",
    "SlidingWindow",
    "load_gpu",
    "load_model",
]


def load_gpu(name_or_path: str | Path, base: Path | Sequence[Path] | None = None) -> GpuProfile:
    """A GPU's profile, its efficiency derived where the file says so.

    ``base``: folder (or folders) of the scenario that names it. Raises ConfigError.
    """
    path = find_data("gpus", str(name_or_path), base)
    tree = read_yaml(path)

    def load_measured(key: str, name: str) -> GpuProfile:
        try:
            return _load_measured(name, path.parent)
        except ConfigError as error:
            where = ("efficiency", "derived", key)
            problems = (one if one.file else locate(one, tree, where, str(path)) for one in error.problems)
            raise ConfigError(problems) from None

    return parse(GpuFile, tree, path).to_profile(load_measured)


def _load_measured(name: str, base: Path) -> GpuProfile:
    path = find_data("gpus", name, base)
    file = parse(GpuFile, read_yaml(path), path)

    def refuse(key: str, name: str) -> GpuProfile:
        # One step only: a chain of derivations would hide where the numbers come from, and could loop.
        raise ConfigError(
            Problem(
                "efficiency can be derived from a measured GPU only",
                got=f'"{file.name}", which is derived itself',
                next_step="name a GPU whose file has efficiency.measured",
            )
        )

    return file.to_profile(refuse)


def load_model(name_or_path: str | Path, base: Path | Sequence[Path] | None = None) -> ModelProfile:
    """A model's profile. ``base``: folder (or folders) of the scenario that names it. Raises ConfigError."""
    path = find_data("models", str(name_or_path), base)
    return parse(ModelProfile, read_yaml(path), path)
