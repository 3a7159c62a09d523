"""Opening: the dictionary a user names, and the module of a model that it reads.

A dictionary lies in its own folder, in another tool's file, or inside a model that ``gossamer
sparsify`` saved.
"""

import re
from pathlib import Path
from typing import NamedTuple

from torch import nn

from gossamer.core import GossamerError
from gossamer.export.sae import read_dictionary
from gossamer.methods.features.autoencoder import Dictionary
from gossamer.methods.features.hooks import find_module, split_path
from gossamer.models import find_sites
from gossamer.models.store import MANIFEST, read_stages

__all__ = ["Opened", "modules_read", "open_dictionary"]

_LENS = re.compile(r"blocks\.(\d+)\.hook_resid_(pre|post)")
_PICKLES = (".pkl", ".pickle", ".joblib", ".dill")


class Opened(NamedTuple):
    """A dictionary in eval mode, and the model it names; ``model`` is empty where it names none."""

    dictionary: Dictionary
    model: str


def open_dictionary(source: str | Path) -> Opened:
    """A dictionary from its files.

    Parameters
    ----------
    source : folder of a dictionary (gossamer's own, SAELens', sparsify's ...), a file of weights,
        or the folder of a model saved with a dictionary at work in it.

    Raises
    ------
    GossamerError
        If nothing there is a dictionary, or it is a pickle.
    """
    path = Path(source).expanduser()
    if path.suffix in _PICKLES:
        raise GossamerError(
            f"{path.name} is a pickle, which could run code and is never read; save the weights "
            "as safetensors"
        )
    if not (path / MANIFEST).is_file():
        made = read_dictionary(path)
        return Opened(made, str(made.metadata.get("model_name") or ""))
    for stage in read_stages(path):
        if "config" in stage.meta and "hook" in stage.meta:
            made = Dictionary.from_tensors(stage.meta["config"], stage.tensors)
            made.metadata.setdefault("hook_name", stage.meta["hook"])
            return Opened(made.float().eval().requires_grad_(False), str(path))
    raise GossamerError(f"{path} is a model without a dictionary; give the folder of one")


def modules_read(model: nn.Module, dictionary: Dictionary, hook: str | None) -> tuple[str, ...]:
    """Paths of the modules whose activations, side by side, the dictionary reads.

    Parameters
    ----------
    hook : path that the user names, in place of what the dictionary says. The names that
        TransformerLens gives to a block's residual stream are understood.

    Raises
    ------
    GossamerError
        If no module is named, or the model has no such module.
    """
    named = (hook,) if hook else tuple(dictionary.metadata.get("reads") or ())
    if not named and dictionary.metadata.get("hook_name"):
        named = (str(dictionary.metadata["hook_name"]),)
    if not named:
        blocks = find_sites(model).blocks
        raise GossamerError(
            "the dictionary does not say which module it reads; name it with --hook, such as "
            f"{blocks[len(blocks) // 2]}"
        )
    paths = tuple(_plain(model, name) for name in named)
    for path in paths:
        find_module(model, split_path(path)[0])
    return paths


def _plain(model: nn.Module, name: str) -> str:
    """A module's path for the name of a residual stream."""
    match = _LENS.fullmatch(name)
    if match is None:
        return name
    blocks, number = find_sites(model).blocks, int(match[1])
    if number >= len(blocks):
        raise GossamerError(f"{name} names block {number}; the model has {len(blocks)}, from 0")
    return blocks[number] + (":in" if match[2] == "pre" else "")
