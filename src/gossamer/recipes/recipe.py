"""Recipe: several methods applied to one model in order, from a file or from Python."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from gossamer import export, methods
from gossamer.core import GossamerError, Method, check_count, unknown
from gossamer.models import (
    Applied,
    Loaded,
    Progress,
    Tokens,
    as_tokens,
    load_model,
    resolve,
)
from gossamer.models.loading import as_device, as_dtype
from gossamer.models.store import MANIFEST, read_stages, require_new
from gossamer.models.store import save as save_folder
from gossamer.recipes import text

__all__ = ["MAX_STAGES", "AppliedRecipe", "Recipe", "load"]

MAX_STAGES = 64
_KEYS = ("model", "stages", "data", "samples", "length", "seed", "out")


class AppliedRecipe:
    """Methods at work on one model; undone in reverse order.

    Attributes
    ----------
    model, tokenizer : the model they work on. stages : one ``Applied`` per method, in order.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, stages: Sequence[Applied]) -> None:
        self.model, self.tokenizer, self.stages = model, tokenizer, tuple(stages)

    def restore(self) -> None:
        """Undo every stage, the last first."""
        with ExitStack() as stack:
            for stage in self.stages:
                stack.callback(stage.restore)

    def save(self, folder: str | Path) -> Path:
        """Write the model with all that is at work; see :func:`gossamer.models.store.save`."""
        return save_folder(self.model, folder, self.tokenizer)

    def report(self) -> str:
        """All stages' reports, one after the other."""
        return "\n\n".join(str(stage.report()) for stage in self.stages)

    def __enter__(self) -> "AppliedRecipe":
        return self

    def __exit__(self, *exc: object) -> None:
        self.restore()


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to do to which model.

    Parameters
    ----------
    stages : methods in the order they are applied, at most 64.
    model : ``nano``, a folder or a hub id; None when the model is given to :meth:`apply`.
    data : file of calibration text, or None for the packaged text.
    samples, length : calibration windows and tokens per window.
    seed : draws the calibration windows, and seeds every stage that has a seed and names none.
    out : folder to save to, or None.
    """

    stages: tuple[Method, ...]
    model: str | None = None
    data: str | None = None
    samples: int = 64
    length: int = 1024
    seed: int = 0
    out: str | None = None
    folder: Path = field(default=Path(), repr=False)

    def __post_init__(self) -> None:
        if not 1 <= len(self.stages) <= MAX_STAGES:
            raise GossamerError(
                f"a recipe has 1 to {MAX_STAGES} stages; this one has {len(self.stages)}"
            )
        for name in ("samples", "length", "seed"):
            check_count(name, getattr(self, name), 0 if name == "seed" else 1)
        for name in ("model", "data", "out"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, str) and value.strip()):
                raise GossamerError(f"{name} is {value!r}; give text, or leave it out")

    @classmethod
    def read(cls, path: str | Path) -> "Recipe":
        """A recipe from a YAML file; relative paths in it are relative to the file.

        Raises
        ------
        GossamerError
            Naming the file, the stage and the key at fault.
        """
        path = Path(path)
        try:
            content = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise GossamerError(f"{path} is not a text file in UTF-8") from None
        except OSError as error:
            raise GossamerError(f"cannot read {path}: {error.strerror}") from None
        try:
            return cls.from_dict(text.parse(content), folder=path.parent)
        except GossamerError as error:
            raise GossamerError(f"{path}: {error}") from None

    @classmethod
    def from_dict(cls, values: Any, folder: Path = Path()) -> "Recipe":
        """A recipe from plain values.

        Raises
        ------
        GossamerError
            On unknown keys (with the nearest known), wrong types, or too many stages.
        """
        if not isinstance(values, Mapping):
            raise GossamerError(f"a recipe is a mapping with the keys {', '.join(_KEYS)}")
        for key in values:
            if key not in _KEYS:
                raise unknown("key", key, _KEYS)
        stages = values.get("stages")
        if not isinstance(stages, list):
            raise GossamerError("stages is a list of methods, such as '- method: wanda'")
        if len(stages) > MAX_STAGES:
            raise GossamerError(
                f"a recipe has 1 to {MAX_STAGES} stages; this one has {len(stages)}"
            )
        seed = values.get("seed", 0)
        made = tuple(_stage(number, stage, seed) for number, stage in enumerate(stages, 1))
        rest = {k: v for k, v in values.items() if k != "stages"}
        return cls(stages=made, folder=folder, **rest)

    def to_text(self) -> str:
        """The YAML form that :meth:`read` reads back."""
        values = {k: getattr(self, k) for k in _KEYS if k != "stages"}
        plain = {k: v for k, v in values.items() if v is not None}
        stages = [{k: v for k, v in m.to_dict().items() if v is not None} for m in self.stages]
        return text.dump({**plain, "stages": stages})

    def _path(self, name: str) -> str:
        """A path of the recipe: beside the file if it is there; ``nano`` is the packaged model."""
        inside = self.folder / name
        return str(inside) if name != "nano" and inside.exists() else name

    def run(self, progress: Progress | None = None) -> AppliedRecipe:
        """Load the model, apply the stages, save if ``out`` is set."""
        if self.model is None:
            raise GossamerError("the recipe names no model; add 'model: nano' or a folder")
        if self.out is not None:
            require_new(self.folder / self.out)
        loaded = load(self._path(self.model))
        done = self.apply(loaded.model, loaded.tokenizer, progress=progress)
        if self.out is not None:
            done.save(self.folder / self.out)
        return done

    def apply(
        self,
        model: nn.Module,
        tokenizer: Any,
        data: Any = None,
        progress: Progress | None = None,
    ) -> AppliedRecipe:
        """Apply the stages in order; on an error the model is left as it was.

        Parameters
        ----------
        data : calibration tokens or documents; None for the recipe's own ``data``.
        """
        tokens = self._tokens(model, tokenizer) if data is None else data
        done: list[Applied] = []
        try:
            for method in self.stages:
                done.append(method.apply(model, tokens, progress=progress))
        except BaseException:
            AppliedRecipe(model, tokenizer, done).restore()
            raise
        return AppliedRecipe(model, tokenizer, done)

    def _tokens(self, model: nn.Module, tokenizer: Any) -> Tokens:
        return as_tokens(
            None if self.data is None else self._path(self.data),
            model,
            samples=self.samples,
            length=self.length,
            seed=self.seed,
            tokenizer=tokenizer,
        )


def _stage(number: int, stage: Any, seed: int) -> Method:
    if isinstance(stage, str):
        stage = {"method": stage}
    if not isinstance(stage, Mapping) or not isinstance(stage.get("method"), str):
        raise GossamerError(f"stage {number} needs a key 'method' with a method's name")
    for key in stage:
        if not isinstance(key, str):
            raise GossamerError(f"stage {number} has the key {key!r}; keys are names of parameters")
    values = {k: v for k, v in stage.items() if k != "method"}
    values = {"seed": seed, **values} if methods.has_field(stage["method"], "seed") else values
    try:
        return methods.make(stage["method"], **values)
    except GossamerError as error:
        raise GossamerError(f"stage {number}: {error}") from None


def load(source: str | Path, **options: Any) -> Loaded:
    """Load a model and every method stored with it.

    Parameters
    ----------
    source : ``nano``, a folder (dense, saved or exported by gossamer) or a hub id.
    options : dtype, device, allow_pickle, as for :func:`gossamer.models.load_model`.
    """
    if export.is_export(source):
        device = as_device(options.get("device", "cpu"))
        return export.read(source, dtype=as_dtype(options.get("dtype"), device), device=device)
    loaded = load_model(source, **options)
    folder = resolve(source, allow_pickle=options.get("allow_pickle", False))
    for stage in read_stages(folder):
        try:
            values = dict(stage.method)
            method = methods.make(values.pop("method"), **values)
            method.reattach(loaded.model, stage.meta, stage.tensors)
        except GossamerError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise GossamerError(
                f"{folder / MANIFEST} is damaged ({type(error).__name__}: {error}); "
                "save the model again"
            ) from None
    return loaded
