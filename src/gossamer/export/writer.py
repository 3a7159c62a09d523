"""Writing an export: every matrix in the layout where that pays, dense where it does not."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from gossamer.core import NM, GossamerError
from gossamer.export import csr, foreign
from gossamer.export.bitmask import mask_of
from gossamer.export.layouts import Layout, Rows, layout
from gossamer.export.report import ExportReport, TensorRow
from gossamer.export.tensors import FLOATS, Source, check_model, matrix, sources
from gossamer.models import Progress
from gossamer.models.loading import EXPORT_MANIFEST, as_dtype, read_json
from gossamer.models.quiet import quiet
from gossamer.models.store import atomic_folder, require_new, write_json

__all__ = ["FORMAT", "MATRICES", "WEIGHTS", "write"]

WEIGHTS = "gossamer-weights.safetensors"
MATRICES = "csr"
FORMAT = 1


@dataclass
class _Packed:
    """What will be written, gathered before the folder is begun."""

    dense: dict[str, Tensor] = field(default_factory=dict)
    parts: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    shapes: dict[str, tuple[int, int]] = field(default_factory=dict)
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    rows: list[TensorRow] = field(default_factory=list)
    misfit: str | None = None


def write(
    model: nn.Module,
    folder: str | Path,
    format: str = "bitmask",
    *,
    pattern: str | NM = "2:4",
    tokenizer: Any = None,
    dtype: str | torch.dtype | None = None,
    signed_zeros: bool = True,
    progress: Progress | None = None,
) -> ExportReport:
    """Write a model with its zeros left out; :func:`gossamer.export.read` gives it back.

    Parameters
    ----------
    model : a transformers model whose weights hold the zeros.
    folder : must not exist, or be empty.
    format : ``bitmask``, ``nm``, ``csr``, ``sparse-bitmask`` or ``sparse-24-bitmask``.
    pattern : N:M of the format ``nm``.
    dtype : of the values: float32, bfloat16, float16; None keeps what the model has, bit for bit.
    signed_zeros : store -0.0 as a value, so that every bit comes back; False drops it like +0.0.
        Masks that multiply leave -0.0 where a negative weight was.

    Raises
    ------
    GossamerError
        If the folder holds something or cannot be written, the format is unknown, the model
        cannot be built again from its configuration, or its zeros do not have the pattern.
    """
    made = layout(format, pattern)
    require_new(folder)
    check_model(model)
    number = None if dtype is None else as_dtype(dtype, torch.device("cpu"))
    packed = _Packed()
    every = sources(model, number)
    tied: set[str] = set(getattr(model, "all_tied_weights_keys", None) or ())
    for index, source in enumerate(every, 1):
        _pack(packed, source, made, signed_zeros, tied)
        if progress:
            progress(index, len(every), "packing")
    if packed.misfit and not packed.entries:
        raise GossamerError(packed.misfit)
    with atomic_folder(folder) as part:
        _write_config(model, part, made, packed, number)
        if tokenizer is not None:
            with quiet():
                tokenizer.save_pretrained(part)
        metadata = _write_weights(model, part, made, packed)
    return ExportReport(format, str(folder), tuple(packed.rows), metadata, _notes(packed, made))


def _pack(
    packed: _Packed, source: Source, made: Layout, signed_zeros: bool, tied: set[str]
) -> None:
    """Decide how one tensor is stored."""
    tensor = source.tensor
    width = 8 * tensor.element_size()
    row = TensorRow(
        source.name,
        tuple(tensor.shape),
        str(tensor.dtype).removeprefix("torch."),
        "dense",
        tensor.numel(),
        tensor.nbytes,
        float(width),
    )
    stored: tuple[dict[str, Tensor], tuple[int, int]] | None = None
    if source.is_matrix:
        turned = made.by_input and source.transposed
        rows = matrix(tensor, turned)
        mask = mask_of(rows, signed_zeros)
        row = replace(row, kept=int(torch.count_nonzero(mask)))
        note = _refusal(packed, source, made, mask, rows)
        if note is None:
            parts = made.pack(rows, mask)
            size = sum(part.nbytes for part in parts.values())
            if size < tensor.nbytes:
                limit = made.limit(width, row.kept / row.size, rows.shape[1])
                row = replace(row, layout=made.text, bytes=size, limit=limit)
                stored = parts, (rows.shape[0], rows.shape[1])
            elif row.sparsity > 0:
                note = f"its zeros save nothing in format {made.text}"
        row = replace(row, note=note or "")
    packed.rows.append(row)
    if stored is None:
        packed.dense[source.name] = tensor
    else:
        packed.parts[source.name], packed.shapes[source.name] = stored
        entry = {"layout": made.text, "shape": list(tensor.shape), "dtype": FLOATS[tensor.dtype]}
        packed.entries[source.name] = entry | (
            {"transposed": True} if made.by_input and source.transposed else {}
        )
    for alias in source.aliases:
        if not made.foreign:
            packed.aliases[alias] = source.name
        elif alias not in tied:
            # No place in the foreign format says that two names are one tensor.
            packed.dense[alias] = tensor.clone()


def _refusal(
    packed: _Packed, source: Source, made: Layout, mask: Tensor, rows: Tensor
) -> str | None:
    """Why a matrix is stored dense; None where its layout can take it.

    Raises
    ------
    GossamerError
        Where it has the zeros the pattern needs, but in other places: then it was pruned, and
        not as the format asks.
    """
    if made.foreign and (foreign.module_of(source.name) is None or source.tensor.dim() != 2):
        return "" if bool(mask.all()) else f"format {made.text} names no tensor like it"
    pattern = made.requires
    if pattern is None:
        return None
    if not source.site:
        return ""
    if made.foreign and source.transposed:
        return f"its inputs are rows, which format {made.text} cannot say"
    if (where := made.misfit(mask)) is None:
        return None
    if bool((mask & (rows == 0)).any()):
        where += " (some of them -0.0, which signed_zeros=False drops)"
    message = (
        f"{source.name} is not {pattern}: {where}; prune it with pattern {pattern}, or use "
        "format bitmask"
    )
    kept = int(torch.count_nonzero(mask)) / mask.numel()
    if rows.shape[1] % pattern.of == 0 and kept <= pattern.keep / pattern.of:
        raise GossamerError(message)
    packed.misfit = packed.misfit or message
    return f"not {pattern}: {where}"


def _write_config(
    model: Any, part: Path, made: Layout, packed: _Packed, number: torch.dtype | None
) -> None:
    with quiet():
        model.config.save_pretrained(part)
        if model.can_generate():
            model.generation_config.save_pretrained(part)
    config = read_json(part / "config.json")
    config["architectures"] = [type(model).__name__]
    config["dtype"] = str(number or model.dtype).removeprefix("torch.")
    if made.foreign:
        config["quantization_config"] = _foreign_entry(made, packed)
    write_json(part / "config.json", config)


def _foreign_entry(made: Layout, packed: _Packed) -> dict[str, Any]:
    modules = [name.removesuffix(".weight") for name in packed.entries]
    size = sum(row.size for row in packed.rows)
    zeros = size - sum(row.kept for row in packed.rows)
    return foreign.config_entry(made, modules, zeros / size)


def _write_weights(model: nn.Module, part: Path, made: Layout, packed: _Packed) -> int:
    """Write the tensors; returns the bytes that are not theirs."""
    stored = dict(packed.dense)
    apart = isinstance(made, Rows)
    if not apart:
        for name, parts in packed.parts.items():
            base = name.removesuffix(".weight") if made.foreign else name
            stored |= {f"{base}.{key}": tensor.contiguous() for key, tensor in parts.items()}
    file = part / ("model.safetensors" if made.foreign else WEIGHTS)
    save_file(stored, file, {"format": "pt"})
    # safetensors leaves it readable by its owner only.
    file.chmod(0o644)
    extra = file.stat().st_size - sum(tensor.nbytes for tensor in stored.values())
    if apart:
        (part / MATRICES).mkdir()
        for name, parts in packed.parts.items():
            path = part / MATRICES / f"{name}.npz"
            csr.write(path, parts, packed.shapes[name])
            extra += path.stat().st_size - sum(tensor.nbytes for tensor in parts.values())
    if made.foreign:
        return extra + len(json.dumps(_foreign_entry(made, packed), indent=1))
    write_json(part / EXPORT_MANIFEST, _manifest(model, packed))
    return extra + (part / EXPORT_MANIFEST).stat().st_size


def _manifest(model: nn.Module, packed: _Packed) -> Mapping[str, Any]:
    return {
        "format": FORMAT,
        "gossamer": version("gossamer"),
        "architecture": type(model).__name__,
        "dense": sorted(packed.dense),
        "tensors": packed.entries,
        "aliases": packed.aliases,
    }


def _notes(packed: _Packed, made: Layout) -> tuple[str, ...]:
    notes = []
    if not packed.entries:
        notes.append(f"no matrix has zeros enough for format {made.text} to pay")
    if any(row.dtype == "float32" for row in packed.rows if row.layout != "dense"):
        notes.append("values are float32; dtype bfloat16 halves them (and rounds)")
    if made.foreign and packed.entries:
        notes.append(
            "compressed-tensors 0.12 reads this; 0.20 no longer does, and transformers then fills "
            "the matrices with random numbers: open it with gossamer.load"
        )
    return tuple(notes)
