"""The folder of a sparse model: plain transformers reads it, gossamer restores all of it.

``model.save_pretrained`` writes the weights with their zeros, so every tool that reads the
dense model reads this one. Beside it: ``gossamer.json`` (the methods, in order, and what they
need to be attached again) and ``gossamer.safetensors`` (masks at one bit a weight, thresholds,
dictionaries). Of modules that took a matrix's place, the weights hold the matrix they amount to,
and ``gossamer.safetensors`` their own parameters. The folder appears whole or not at all.
"""

import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gossamer.core import GossamerError
from gossamer.models.applied import at_work
from gossamer.models.quiet import quiet

__all__ = [
    "MANIFEST",
    "Stage",
    "atomic_folder",
    "plain_tensors",
    "read_stages",
    "require_new",
    "save",
    "write_json",
]

MANIFEST = "gossamer.json"
TENSORS = "gossamer.safetensors"
FORMAT = 1


@dataclass(frozen=True)
class Stage:
    """One stored method: its parameters, and the state that attaches it again."""

    method: dict[str, Any]
    meta: dict[str, Any]
    tensors: dict[str, Tensor]


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically: readers see the old file or the new one."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(value, file, indent=1, ensure_ascii=False, allow_nan=False)
            file.write("\n")
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def require_new(folder: str | Path) -> Path:
    """The path, if nothing is there that writing a model would mix with.

    Raises
    ------
    GossamerError
        If it is a file, or a folder that is not empty.
    """
    path = Path(folder)
    try:
        path.exists()
    except (OSError, ValueError) as error:
        raise GossamerError(f"{str(folder)[:60]!r} cannot be a folder ({error})") from None
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise GossamerError(f"{path} exists and is not empty; name a new folder")
    return path


class atomic_folder:  # noqa: N801 - reads as a statement: ``with atomic_folder(path) as part:``
    """Fill a temporary folder that becomes ``target`` when the block ends without an error.

    Raises
    ------
    GossamerError
        If the target exists and is not empty, or its parent cannot be written to.
    """

    def __init__(self, target: str | Path) -> None:
        self.target = Path(target)

    def __enter__(self) -> Path:
        try:
            # A link is followed: what it points to is the folder that is made.
            self.target = self.target.resolve()
            require_new(self.target)
            parent = self.target.parent
            parent.mkdir(parents=True, exist_ok=True)
            self.part = Path(tempfile.mkdtemp(prefix=f".{self.target.name}.", dir=parent))
        except (OSError, ValueError) as error:
            if isinstance(error, GossamerError):
                raise
            raise GossamerError(
                f"cannot write {self.target}: {getattr(error, 'strerror', None) or error}; "
                "name a folder you may write to"
            ) from None
        return self.part

    def __exit__(self, kind: type[BaseException] | None, error: Any, _: object) -> None:
        if kind is not None:
            shutil.rmtree(self.part, ignore_errors=True)
            if issubclass(kind, OSError | SafetensorError):
                raise GossamerError(
                    f"cannot write {self.target}: {getattr(error, 'strerror', None) or error}; "
                    "free space or name another folder"
                ) from error
            return
        try:
            os.chmod(self.part, 0o755)
            os.replace(self.part, self.target)
        except OSError as failure:
            shutil.rmtree(self.part, ignore_errors=True)
            raise GossamerError(
                f"cannot write {self.target}: {failure.strerror}; name another folder"
            ) from None


def plain_tensors(model: nn.Module) -> dict[str, Tensor] | None:
    """What a saved folder holds as the model's weights; None where that is its state dict."""
    own = tensors = model.state_dict()
    for work in reversed(at_work(model)):
        tensors = work.plain(tensors)
    return None if tensors is own else tensors


def save(model: nn.Module, folder: str | Path, tokenizer: Any = None) -> Path:
    """Write a model with the methods at work on it, in the order they were applied.

    Parameters
    ----------
    model : a transformers model.
    folder : must not exist, or be empty.

    Raises
    ------
    GossamerError
        If the folder holds something or cannot be written.
    """
    stages, tensors = [], {}
    for index, work in enumerate(at_work(model)):
        state = work.state()
        stages.append({"method": work.method.to_dict(), "meta": state.meta})
        for name, tensor in state.tensors.items():
            tensors[f"{index}.{name}"] = tensor.detach().cpu().contiguous()
    with atomic_folder(folder) as part:
        with quiet():
            # Named only where it differs: transformers' own way to collect tensors stays in use.
            plain = plain_tensors(model)
            options = {} if plain is None else {"state_dict": plain}
            model.save_pretrained(part, **options)  # type: ignore[operator]
            if tokenizer is not None:
                tokenizer.save_pretrained(part)
        if tensors:
            save_file(tensors, part / TENSORS)
        manifest = {"format": FORMAT, "gossamer": version("gossamer"), "stages": stages}
        write_json(part / MANIFEST, manifest)
    return Path(folder)


def read_stages(folder: str | Path) -> list[Stage]:
    """The methods stored with a model; empty for a plain model folder.

    Raises
    ------
    GossamerError
        If the files are damaged or of a newer format.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        return []
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] > FORMAT:
            raise GossamerError(
                f"{path} has format {manifest['format']}, this gossamer reads up to {FORMAT}; "
                "upgrade gossamer"
            )
        file = Path(folder) / TENSORS
        tensors = load_file(file) if file.is_file() else {}
        stages = []
        for index, stage in enumerate(manifest["stages"]):
            head = f"{index}."
            own = {k.removeprefix(head): v for k, v in tensors.items() if k.startswith(head)}
            stages.append(Stage(stage["method"], stage["meta"], own))
        return stages
    except GossamerError:
        raise
    except Exception as error:
        raise GossamerError(
            f"{path} cannot be read ({type(error).__name__}: {error}); save the model again"
        ) from None
