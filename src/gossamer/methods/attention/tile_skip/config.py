"""A calibration in ModelOpt's layout: ``sparse_attention_config`` in a model's config.json."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from torch import nn

from gossamer.core import GossamerError
from gossamer.methods.attention.layout import PHASES
from gossamer.methods.attention.tile_skip.calibration import Scale
from gossamer.models.store import write_json

__all__ = ["read_scales", "scales_of", "sparse_attention_config", "write_scales"]

_KEY = "sparse_attention_config"


def sparse_attention_config(
    scales: Mapping[str, Scale], sparsity: float, targets: list[str]
) -> dict[str, Any]:
    """The mapping ModelOpt exports and its serving plug-ins read.

    Parameters
    ----------
    scales : by phase. sparsity : share of tiles to skip. targets : class names of the attentions.
    """
    factors: dict[str, Any] = {"formula": "a * exp(b * target_sparsity)"}
    factors |= {phase: {"a": scale.a, "b": scale.b} for phase, scale in sorted(scales.items())}
    return {
        "config_groups": {"group_0": {"sparse_algo": "softmax_skip", "targets": targets}},
        "threshold_scale_factor": factors,
        "target_sparse_ratio": dict.fromkeys(sorted(scales), sparsity),
        "producer": {"name": "gossamer"},
    }


def scales_of(config: object, source: str) -> dict[str, Scale]:
    """The scales in a ``sparse_attention_config``; a phase it leaves out stays full.

    Raises
    ------
    GossamerError
        If it is of another algorithm, or holds no scale.
    """
    if not isinstance(config, Mapping):
        raise GossamerError(f"{source} holds no {_KEY}")
    plain = cast(Mapping[str, Any], config)
    groups = plain.get("config_groups") or {}
    kinds = {group.get("sparse_algo") for group in groups.values()}
    if "softmax_skip" not in kinds:
        raise GossamerError(
            f"the {_KEY} of {source} is of {sorted(map(str, kinds))}; only softmax_skip is read"
        )
    factors = plain.get("threshold_scale_factor") or {}
    found = {
        phase: Scale(float(factors[phase]["a"]), float(factors[phase]["b"]))
        for phase in sorted(PHASES)
        if isinstance(factors.get(phase), Mapping)
    }
    if not found:
        raise GossamerError(f"the {_KEY} of {source} holds no calibrated a and b; calibrate anew")
    return found


def read_scales(path: str | Path) -> dict[str, Scale]:
    """The scales in a config.json, or in the folder that holds one."""
    place = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
    try:
        content = json.loads(place.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise GossamerError(f"{place} is no readable config: {error}") from None
    config = content.get(_KEY, content) if isinstance(content, dict) else None
    return scales_of(cast(object, config), str(place))


def write_scales(
    folder: str | Path, scales: Mapping[str, Scale], sparsity: float, model: nn.Module
) -> None:
    """Add a calibration to the config.json of a saved model.

    Raises
    ------
    GossamerError
        If the folder holds no config.json.
    """
    place = Path(folder) / "config.json"
    try:
        content = json.loads(place.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise GossamerError(f"{place} cannot be read: {error}; save the model first") from None
    content[_KEY] = sparse_attention_config(scales, sparsity, attention_classes(model))
    write_json(place, content)


def attention_classes(model: nn.Module) -> list[str]:
    """Class names of a model's attention modules."""
    names = {type(m).__name__ for m in model.modules() if hasattr(m, "layer_idx")}
    return sorted(n for n in names if "ttention" in n) or ["Attention"]
