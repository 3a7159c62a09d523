"""compressed-tensors: how its two sparse formats name tensors and record themselves.

A weight ``<module>.weight`` becomes ``<module>.compressed``, ``<module>.bitmask``,
``<module>.shape`` and, unless it is 2:4, ``<module>.row_offsets``, in ``model.safetensors``;
``config.json`` says so under ``quantization_config.sparsity_config``.
Source: the format descriptions of github.com/neuralmagic/compressed-tensors at version 0.12.2.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from gossamer.core import GossamerError
from gossamer.export.layouts import Layout, Sparse24, SparseBitmask

__all__ = ["config_entry", "format_of", "module_of", "unpack_all"]

VERSION = "0.12.2"
_LAYOUTS: dict[str, Layout] = {"sparse-bitmask": SparseBitmask(), "sparse-24-bitmask": Sparse24()}


def module_of(name: str) -> str | None:
    """The module a weight belongs to; None for tensors the format cannot name."""
    return name.removesuffix(".weight") if name.endswith(".weight") else None


def config_entry(layout: Layout, modules: Sequence[str], sparsity: float) -> dict[str, Any]:
    """The ``quantization_config`` of an export.

    Parameters
    ----------
    modules : paths of the modules whose weights are compressed.
    sparsity : share of zeros over all tensors; recorded in percent, for information only.
    """
    return {
        "quant_method": "compressed-tensors",
        "version": VERSION,
        "sparsity_config": {
            "format": layout.text,
            "targets": list(modules),
            "ignore": [],
            "global_sparsity": 100.0 * sparsity,
            "sparsity_structure": "2:4" if isinstance(layout, Sparse24) else "unstructured",
            "registry_requires_subclass": False,
        },
        "transform_config": {},
    }


def format_of(config: Mapping[str, Any]) -> str | None:
    """The sparse format a model's configuration records, or None.

    Older files have ``sparsity_config`` at the top and write ``sparse_bitmask``.
    """
    outer = config.get("quantization_config") or config.get("compression_config") or {}
    inner = (outer.get("sparsity_config") if isinstance(outer, Mapping) else None) or config.get(
        "sparsity_config"
    )
    name = inner.get("format") if isinstance(inner, Mapping) else None
    word = name.replace("_", "-") if isinstance(name, str) else None
    return None if word in (None, "dense", "dense-sparsity") else word


def unpack_all(config: Mapping[str, Any], stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The dense tensors of a compressed-tensors file.

    Raises
    ------
    GossamerError
        If the format is not a sparse one, values are quantised as well, or a tensor is missing
        or does not belong to the others; the message names it.
    """
    name = format_of(config)
    layout = _LAYOUTS.get(name or "")
    if layout is None:
        raise GossamerError(
            f"sparsity format {name!r} cannot be read; known: {', '.join(sorted(_LAYOUTS))}"
        )
    quantised = config.get("quantization_config") or {}
    if quantised.get("config_groups"):
        raise GossamerError(
            "the values are quantised as well, which is not read; use the model they were made from"
        )
    modules = [n.removesuffix(".compressed") for n in stored if n.endswith(".compressed")]
    rest = dict(stored)
    dense: dict[str, Tensor] = {}
    for module in modules:
        parts: dict[str, Tensor] = {}
        for part in layout.parts:
            if (tensor := rest.pop(f"{module}.{part}", None)) is None:
                raise GossamerError(f"{module}.{part} is missing; copy the model again")
            parts[part] = tensor
        shape = parts["shape"].reshape(-1).tolist()
        if len(shape) != 2 or min(shape) < 1:
            raise GossamerError(f"{module}.shape is {shape}; it has two sizes of at least 1")
        try:
            matrix = layout.unpack(parts, (int(shape[0]), int(shape[1])))
        except (GossamerError, RuntimeError) as error:
            raise GossamerError(f"{module}: {error}; copy the model again") from None
        dense[module if module_of(module) else f"{module}.weight"] = matrix
    for name in rest:
        if name.endswith((".bitmask", ".row_offsets")):
            raise GossamerError(f"{name} is stored without its values; copy the model again")
    return {**rest, **dense}
