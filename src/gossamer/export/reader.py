"""Reading an export back: dense tensors, then the model transformers builds from its config.

Nothing is unpickled, and only classes of transformers are built.
"""

import json
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import CONFIG_MAPPING, GenerationConfig

from gossamer.core import GossamerError
from gossamer.export import csr, foreign
from gossamer.export.layouts import Rows, layout
from gossamer.export.tensors import FLOATS, build_class, unmatrix
from gossamer.export.writer import FORMAT, MATRICES, WEIGHTS
from gossamer.models import Loaded
from gossamer.models.loading import (
    EXPORT_MANIFEST,
    as_device,
    as_dtype,
    check_safetensors,
    first_line,
    load_tokenizer,
    read_json,
    shard_files,
)
from gossamer.models.quiet import quiet

__all__ = ["is_export", "read"]

_AGAIN = "export the model again"


def is_export(source: str | Path) -> bool:
    """Whether a folder holds an export that :func:`read` opens."""
    if str(source) == "nano":
        return False
    folder = Path(source).expanduser()
    if (folder / EXPORT_MANIFEST).is_file():
        return True
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and foreign.format_of(config) is not None


def read(
    folder: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> Loaded:
    """The dense model of an export, in eval mode, and its tokenizer (None where it has none).

    Parameters
    ----------
    folder : written by :func:`gossamer.export.write`, or by compressed-tensors with one of its
        two sparse formats.
    dtype : floats are cast to it; None gives every tensor back bit for bit.

    Raises
    ------
    GossamerError
        If a file is missing, cut short or damaged, the format is unknown or newer, or the
        tensors are not those of the model.
    """
    path = Path(folder).expanduser()
    place = as_device(device)
    number = None if dtype is None else as_dtype(dtype, place)
    if not path.is_dir():
        raise GossamerError(f"no folder {path}; give the folder of an export")
    if not (path / "config.json").is_file():
        raise GossamerError(f"{path} has no config.json, so it is not a (whole) export")
    config = read_json(path / "config.json")
    if (path / EXPORT_MANIFEST).is_file():
        state = _own(path)
    elif foreign.format_of(config):
        state = _checked(path / "config.json", lambda: foreign.unpack_all(config, _foreign(path)))
    else:
        raise GossamerError(
            f"{path} is not an export ({EXPORT_MANIFEST} is missing); load it as a plain model"
        )
    model = _build(path, config, state, number)
    with quiet():
        tokenizer = load_tokenizer(path, required=False)
    return Loaded(model.to(place).eval(), tokenizer)


def _checked(path: Path, step: Callable[[], Any]) -> Any:
    """Run a step; what goes wrong in it is an error that names the file."""
    try:
        return step()
    except GossamerError as error:
        raise GossamerError(f"{path}: {error}") from None
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise GossamerError(
            f"{path} is damaged ({type(error).__name__}: {first_line(error)}); {_AGAIN}"
        ) from None


def _load(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise GossamerError(f"{path} is missing; {_AGAIN}")
    check_safetensors(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise GossamerError(f"{path} cannot be read ({first_line(error)}); {_AGAIN}") from None


def _foreign(path: Path) -> dict[str, Tensor]:
    index = path / "model.safetensors.index.json"
    files = [path / "model.safetensors"] if not index.is_file() else shard_files(index)
    return {name: tensor for file in files for name, tensor in _load(file).items()}


def _own(path: Path) -> dict[str, Tensor]:
    """The tensors of our own formats, checked against the manifest."""
    manifest = read_json(path / EXPORT_MANIFEST)
    return _checked(path / EXPORT_MANIFEST, lambda: _restore(path, manifest))


def _restore(path: Path, manifest: Mapping[str, Any]) -> dict[str, Tensor]:
    if manifest["format"] > FORMAT:
        raise GossamerError(
            f"it has format {manifest['format']}, this gossamer reads up to {FORMAT}; "
            "upgrade gossamer"
        )
    stored = _load(path / WEIGHTS)
    state: dict[str, Tensor] = {}
    for name in manifest["dense"]:
        if name not in stored:
            raise GossamerError(f"{WEIGHTS} lacks {name}; {_AGAIN}")
        state[name] = stored[name]
    for name, entry in manifest["tensors"].items():
        state[name] = _matrix(path, name, entry, stored)
    return state | {alias: state[name] for alias, name in manifest["aliases"].items()}


def _matrix(
    path: Path, name: str, entry: Mapping[str, Any], stored: Mapping[str, Tensor]
) -> Tensor:
    """One compressed matrix, dense again."""
    made = layout(entry["layout"])
    dtypes = {text: dtype for dtype, text in FLOATS.items()}
    shape = tuple(int(size) for size in entry["shape"])
    turned = bool(entry.get("transposed", False))
    columns = shape[-2] if turned else shape[-1]
    if isinstance(made, Rows):
        # The name becomes a path: it must not lead out of the folder.
        if Path(name).name != name or "\\" in name:
            raise GossamerError(f"{name!r} is no name of a tensor; {_AGAIN}")
        parts = csr.read(path / MATRICES / f"{name}.npz", dtypes[entry["dtype"]])
    else:
        missing = [part for part in made.parts if f"{name}.{part}" not in stored]
        if missing:
            raise GossamerError(f"{WEIGHTS} lacks {name}.{missing[0]}; {_AGAIN}")
        parts = {part: stored[f"{name}.{part}"] for part in made.parts}
    try:
        dense = made.unpack(parts, (prod(shape) // columns, columns))
    except (GossamerError, RuntimeError) as error:
        raise GossamerError(f"{name}: {first_line(error)}; {_AGAIN}") from None
    if dense.dtype != dtypes[entry["dtype"]]:
        raise GossamerError(f"{name} holds {dense.dtype} where {entry['dtype']} is due; {_AGAIN}")
    return unmatrix(dense, shape, turned)


def _build(
    path: Path, config: Mapping[str, Any], state: dict[str, Tensor], number: torch.dtype | None
) -> Any:
    """The model of a configuration with these tensors, all of them and no others."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise GossamerError(
            f"{path / 'config.json'}: transformers knows no models of type {kind!r}"
        )
    named = config.get("architectures")
    architecture = build_class(named[0] if isinstance(named, list) and named else None)
    ours = ("quantization_config", "compression_config", "sparsity_config")
    plain = {key: value for key, value in config.items() if key not in ours}
    try:
        with quiet():
            built: Any = architecture.from_pretrained(
                None,
                config=CONFIG_MAPPING[kind].from_dict(plain),
                state_dict=dict(state),
                dtype=number or _most(state),
                output_loading_info=True,
            )
            model, facts = built
            if (path / "generation_config.json").is_file():
                model.generation_config = GenerationConfig.from_pretrained(path)
    except Exception as error:
        raise GossamerError(f"{path} cannot be loaded: {first_line(error)}") from None
    for word, key in (("lacks", "missing_keys"), ("has a foreign", "unexpected_keys")):
        if names := sorted(facts.get(key) or ()):
            raise GossamerError(f"{path} {word} tensor {names[0]}; {_AGAIN}")
    if number is None:
        _restore_dtypes(model, state)
    model.config.name_or_path = str(path)
    model.name_or_path = str(path)
    return model


def _most(state: Mapping[str, Tensor]) -> torch.dtype:
    """The dtype most floats have."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in state.values():
        if tensor.is_floating_point():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel()
    return max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)


def _restore_dtypes(model: Any, state: Mapping[str, Tensor]) -> None:
    """Give tensors their stored dtype back where transformers cast them all to one."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        stored = state.get(name)
        if stored is not None and stored.dtype != tensor.dtype:
            tensor.data = stored.clone()
