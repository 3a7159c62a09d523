"""Reading: which tool wrote a dictionary's files, and their tensors without unpickling anything."""

import json
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from gossamer.core import GossamerError
from gossamer.export.sae import convert
from gossamer.methods.features.autoencoder import Dictionary

__all__ = ["read_dictionary"]

_FILES = {
    "sae_weights.safetensors": "SAELens",
    "sae.safetensors": "sparsify",
    "ae.pt": "dictionary_learning",
    "params.npz": "Gemma Scope",
}


def read_dictionary(source: str | Path) -> Dictionary:
    """A sparse dictionary from the files of SAELens, sparsify, dictionary_learning or Gemma Scope.

    Parameters
    ----------
    source : folder, or the file with the weights; its name tells the tool.

    Returns
    -------
    The dictionary in eval mode: the same reconstruction of the same x, within rounding.

    Raises
    ------
    GossamerError
        If the files are missing, damaged or of no tool known here, hold a pickle that is more
        than tensors, or use an option that no dictionary here has.
    """
    file, tool = _weights(Path(source).expanduser())
    try:
        config, tensors = _parts(file, tool)
        made = Dictionary.from_tensors(config, {n: t.float() for n, t in tensors.items()})
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, GossamerError):
            raise
        raise GossamerError(
            f"{file} lacks or misstates {_line(error)}; it is no whole {tool} dictionary"
        ) from None
    made.metadata.setdefault("read_from", tool)
    return made.eval().requires_grad_(False)


def _weights(source: Path) -> tuple[Path, str]:
    """The file with the weights, and the tool that wrote it."""
    if source.is_dir():
        for name, tool in _FILES.items():
            if (source / name).is_file():
                return source / name, tool
        found = ", ".join(sorted(p.name for p in source.iterdir())[:6]) or "nothing"
        raise GossamerError(f"{source} holds {found}; a dictionary has one of {', '.join(_FILES)}")
    if not source.is_file():
        raise GossamerError(f"{source} does not exist; give a folder or file of weights")
    if source.name in _FILES:
        return source, _FILES[source.name]
    if source.suffix == ".npz":
        return source, "Gemma Scope"
    if source.suffix in (".pt", ".pth", ".bin"):
        return source, "dictionary_learning"
    raise GossamerError(f"{source.name} is of no tool known here; known: {', '.join(_FILES)}")


def _parts(file: Path, tool: str) -> convert.Parts:
    if tool == "SAELens":
        config = _json(file.parent / "cfg.json")
        made, tensors = convert.sae_lens(config, _safetensors(file))
        return {**made, "metadata": dict(config.get("metadata") or {})}, tensors
    if tool == "sparsify":
        return convert.sparsify(_json(file.parent / "cfg.json"), _safetensors(file))
    if tool == "Gemma Scope":
        return convert.gemma_scope(_npz(file))
    beside = file.parent / "config.json"
    return convert.dictionary_learning(_json(beside) if beside.exists() else {}, _torch(file))


def _json(path: Path) -> dict[str, Any]:
    try:
        made = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise GossamerError(f"{path} cannot be read ({_line(error)}); copy it again") from None
    if not isinstance(made, dict):
        raise GossamerError(f"{path} holds a {type(made).__name__}, not a configuration")
    return made


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise GossamerError(f"{path} cannot be read ({_line(error)}); copy it again") from None


def _npz(path: Path) -> dict[str, Tensor]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: torch.from_numpy(np.ascontiguousarray(file[name])) for name in file}
    except ValueError:
        raise _pickled(path) from None
    except (OSError, zipfile.BadZipFile, TypeError) as error:
        raise GossamerError(f"{path} cannot be read ({_line(error)}); copy it again") from None


def _torch(path: Path) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():
            # An unusual pickle protocol is one way to be refused, which is said below.
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise _pickled(path) from None
    except (OSError, RuntimeError, EOFError) as error:
        raise GossamerError(f"{path} cannot be read ({_line(error)}); copy it again") from None
    if not isinstance(state, Mapping):
        raise GossamerError(f"{path} holds a {type(state).__name__}, not tensors by name")
    found = {str(name): torch.as_tensor(value) for name, value in state.items()}
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def _pickled(path: Path) -> GossamerError:
    return GossamerError(
        f"{path} is a pickle of more than tensors, which could run code and is never read; save "
        "the weights as safetensors, or as a state dict of tensors"
    )


def _line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
