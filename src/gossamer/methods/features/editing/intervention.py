"""Intervention: changes to what a model computes, as one object to apply, scale, save and load.

Shapes: B = windows of a batch, T = tokens, R = rows, D = width, M = latents, K = units edited.
"""

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gossamer.core import GossamerError
from gossamer.methods.features.autoencoder import Dictionary
from gossamer.methods.features.editing.laws import Law, law_from
from gossamer.methods.features.editing.positions import Places, parse_positions
from gossamer.methods.features.hooks import (
    find_module,
    hidden_of,
    input_of,
    split_path,
    with_hidden,
)
from gossamer.models import State
from gossamer.models.store import atomic_folder, write_json

__all__ = ["Edit", "Hooked", "Intervention"]

_META, _TENSORS = "intervention.json", "intervention.safetensors"


@dataclass(frozen=True, eq=False)
class Edit:
    """A law for some units at one place of a model.

    Parameters
    ----------
    path : module whose output is changed; with ``:in`` behind it, its input.
    law : what happens to the units' values.
    units : int64 (K,), channels or latents; None: all, in order.
    dictionary : the units are its latents; None: they are channels of the activations.
    keep_error : with a dictionary, add the change of the latents to the activations, so that
        what the dictionary misses stays; otherwise the reconstruction takes their place.
    """

    path: str
    law: Law
    units: Tensor | None = None
    dictionary: Dictionary | None = None
    keep_error: bool = True

    def __post_init__(self) -> None:
        if self.units is not None and self.units.shape != (self.law.units,):
            raise GossamerError(
                f"{self.path}: the law is for {self.law.units} units, {len(self.units)} are named"
            )
        if self.units is not None and len(self.units) and int(self.units.min()) < 0:
            raise GossamerError(
                f"{self.path}: unit {int(self.units.min())} is below 0; count from 0"
            )
        if any(bool(part.isnan().any()) for part in self.law.tensors().values()):
            raise GossamerError(f"{self.path}: the {self.law.kind} law holds NaN; make it again")
        made = self.dictionary
        if made is not None and made.transcoder:
            raise GossamerError("a transcoder's latents are of another module; use an autoencoder")
        if made is not None:
            self._check(made.d_sae, "latents")

    def _check(self, wide: int, what: str) -> None:
        units = self.units
        most = self.law.units - 1 if units is None else int(units.max()) if len(units) else 0
        if most >= wide or (units is None and self.law.units != wide):
            raise GossamerError(
                f"{self.path}: the edit is for {most + 1} {what} or more, there are {wide}; "
                "use it on the model it was made for"
            )

    def __call__(self, rows: Tensor, strength: float) -> Tensor:
        """Changed activations of (R, D) rows, in their dtype."""
        size = rows.float().square().mean(-1, keepdim=True).sqrt()
        if self.dictionary is not None:
            return self._latents(self.dictionary, rows, strength, size)
        self._check(rows.shape[-1], "channels")
        wide = rows if self.units is None else rows[:, self.units]
        new = self.law(wide.float(), strength, size).to(rows.dtype)
        return new if self.units is None else rows.index_copy(1, self.units, new)

    def _latents(self, made: Dictionary, rows: Tensor, strength: float, size: Tensor) -> Tensor:
        codes = made.encode(rows)
        units = torch.arange(made.d_sae, device=rows.device) if self.units is None else self.units
        # Where a latent stands among the units; the last column takes all others and padding.
        column = torch.full((made.d_sae + 1,), len(units), device=rows.device)
        column[units] = torch.arange(len(units), device=rows.device)
        values = codes.values.new_zeros(len(rows), len(units) + 1)
        values.scatter_add_(1, column[codes.indices], codes.values)
        values = values[:, :-1]
        change = (self.law(values, strength, size) - values) @ made.W_dec[units]
        base = rows.to(change.dtype) if self.keep_error else made.decode(codes, rows)
        new = base + change
        limit = made.metadata.get("sink_norm")
        if limit is not None:
            sink = torch.linalg.vector_norm(rows.float(), dim=1) > limit
            new = torch.where(sink[:, None], rows.to(new.dtype), new)
        return new.to(rows.dtype)

    def to(self, device: torch.device) -> "Edit":
        """The same edit with its tensors on a device."""
        law = law_from(self.law.kind, {n: t.to(device) for n, t in self.law.tensors().items()})
        units = None if self.units is None else self.units.to(device)
        made = None if self.dictionary is None else self.dictionary.to(device)
        return replace(self, law=law, units=units, dictionary=made)


class Hooked:
    """An intervention at work on a model; a context manager that takes it off again."""

    def __init__(self, intervention: "Intervention", model: nn.Module) -> None:
        device = next(model.parameters()).device
        self.intervention = intervention
        self._stack = ExitStack()
        try:
            self._places = Places(model, intervention.positions, self._stack)
            for edit in intervention.edits:
                self._hook(model, edit.to(device))
        except BaseException:
            self.remove()
            raise

    def _hook(self, model: nn.Module, edit: Edit) -> None:
        name, inward = split_path(edit.path)
        module = find_module(model, name)

        def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
            hidden = self._changed(edit, input_of(args, kwargs, edit.path))
            if args:
                return (hidden, *args[1:]), kwargs
            key = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))
            return args, {**kwargs, key: hidden}

        def after(module: nn.Module, args: Any, output: Any) -> Any:
            return with_hidden(output, self._changed(edit, hidden_of(output, edit.path)))

        if inward:
            handle = module.register_forward_pre_hook(before, with_kwargs=True)
        else:
            handle = module.register_forward_hook(after)
        self._stack.callback(handle.remove)

    def _changed(self, edit: Edit, hidden: Tensor) -> Tensor:
        strength, wide = self.intervention.strength, hidden.shape[-1]
        chosen = self._places.of(hidden)
        if chosen is None:
            return edit(hidden.reshape(-1, wide), strength).view(hidden.shape)
        changed = hidden.clone()
        changed[chosen] = edit(hidden[chosen], strength)
        return changed

    def remove(self) -> None:
        """Take the hooks away; a second call does nothing."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()


@dataclass(frozen=True, eq=False)
class Intervention:
    """Edits of a model's activations, with one strength and the tokens they are made at.

    >>> push = Intervention((Edit("lm_head:in", Affine.added(direction)),), strength=4.0)
    >>> with push.on(model):
    ...     model.generate(prompt)

    Parameters
    ----------
    edits : made in the order the model reaches them, each on what the earlier ones left.
    strength : share of the change that is made; 0 none, 1 all, and beyond.
    positions : ``all`` tokens; ``last``: the last of a prompt and all that are generated from it;
        or places counted from the first real token, such as ``0,3,4``.

    Raises
    ------
    GossamerError
        For a strength that is not finite, or other positions.
    """

    edits: tuple[Edit, ...]
    strength: float = 1.0
    positions: str = "all"

    def __post_init__(self) -> None:
        if not isinstance(self.strength, int | float) or not isfinite(self.strength):
            raise GossamerError(f"strength is {self.strength!r}; give a finite number")
        parse_positions(self.positions)

    def on(self, model: nn.Module) -> Hooked:
        """Put the edits on a model, for forward passes and ``generate``; undone by the block's end.

        Raises
        ------
        GossamerError
            If a path names no module; the model is then as before.
        """
        return Hooked(self, model)

    def at(self, strength: float) -> "Intervention":
        """The same edits with another strength."""
        return replace(self, strength=strength)

    def __add__(self, other: "Intervention") -> "Intervention":
        """Both interventions' edits as one; they must agree on strength and positions."""
        if (self.strength, self.positions) != (other.strength, other.positions):
            raise GossamerError("interventions of other strength or positions are used one by one")
        return replace(self, edits=self.edits + other.edits)

    # -- files -----------------------------------------------------------------------------

    def state(self) -> State:
        """As plain values and tensors."""
        tensors: dict[str, Tensor] = {}
        rows: list[dict[str, Any]] = []
        for i, edit in enumerate(self.edits):
            made = edit.dictionary
            row = {"path": edit.path, "law": edit.law.kind, "keep_error": edit.keep_error}
            rows.append(row | {"dictionary": None if made is None else made.config()})
            if edit.units is not None:
                tensors[f"{i}.units"] = edit.units
            tensors |= {f"{i}.law.{name}": t for name, t in edit.law.tensors().items()}
            if made is not None:
                tensors |= {f"{i}.dictionary.{name}": t for name, t in made.tensors().items()}
        meta = {"strength": self.strength, "positions": self.positions, "edits": rows}
        return State(meta, tensors)

    @classmethod
    def from_state(cls, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "Intervention":
        """The intervention that :meth:`state` described."""

        def part(head: str) -> dict[str, Tensor]:
            return {n.removeprefix(head): t for n, t in tensors.items() if n.startswith(head)}

        edits: list[Edit] = []
        for i, row in enumerate(meta["edits"]):
            law, made = law_from(row["law"], part(f"{i}.law.")), None
            if row["dictionary"] is not None:
                made = Dictionary.from_tensors(row["dictionary"], part(f"{i}.dictionary."))
                made.eval().requires_grad_(False)
            units = tensors.get(f"{i}.units")
            edits.append(Edit(row["path"], law, units, made, row["keep_error"]))
        return cls(tuple(edits), meta["strength"], meta["positions"])

    def save(self, folder: str | Path) -> Path:
        """Write the intervention alone, without a model; the folder appears whole or not.

        Raises
        ------
        GossamerError
            If the folder holds something or cannot be written.
        """
        state = self.state()
        with atomic_folder(folder) as part:
            own = {n: t.detach().cpu().contiguous().clone() for n, t in state.tensors.items()}
            save_file(own, part / _TENSORS)
            write_json(part / _META, state.meta)
        return Path(folder)

    @classmethod
    def load(cls, folder: str | Path) -> "Intervention":
        """Read a folder written by :meth:`save`.

        Raises
        ------
        GossamerError
            If a file is missing or damaged.
        """
        try:
            meta = json.loads((Path(folder) / _META).read_text(encoding="utf-8"))
            return cls.from_state(meta, load_file(Path(folder) / _TENSORS))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, SafetensorError) as error:
            raise GossamerError(f"{folder} holds no readable intervention ({error})") from None
        except (KeyError, TypeError) as error:
            raise GossamerError(
                f"{Path(folder) / _META} lacks or misstates {error}; save it again"
            ) from None
