"""Soup: average model folders that were retrained under one mask."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer import export
from gossamer.core import GossamerError
from gossamer.methods.weights.pruned import PrunedModel
from gossamer.methods.weights.retrain.batchnorm import batch_norms
from gossamer.methods.weights.retrain.masks import parameter_masks
from gossamer.methods.weights.retrain.states import (
    State,
    average,
    check_supports,
    copy_of,
    greedy,
    put_back,
)
from gossamer.models import Loaded, Progress, Tokens, at_work, resolve
from gossamer.models.loading import read_json
from gossamer.models.loss import window_losses
from gossamer.models.store import require_new, save
from gossamer.recipes.recipe import load

__all__ = ["SoupReport", "soup"]


@dataclass(frozen=True)
class SoupReport:
    """What was averaged.

    Parameters
    ----------
    folders : the copies given. chosen : indices of those in the average.
    matrices : sparse matrices, all with one support. sparsity : share of zeros in them.
    losses : held-out loss of every copy in nats per token, empty when not measured.
    loss : of the average, or None. folder : where it was saved. notes : what else to know.
    """

    folders: tuple[str, ...]
    chosen: tuple[int, ...]
    matrices: int
    sparsity: float
    losses: tuple[float, ...] = ()
    loss: float | None = None
    folder: str = ""
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON; a loss that is no number is None."""
        losses = [value if isfinite(value) else None for value in self.losses]
        loss = self.loss if self.loss is not None and isfinite(self.loss) else None
        return {**asdict(self), "losses": losses, "loss": loss}

    def __str__(self) -> str:
        lines = [
            f"averaged {len(self.chosen)} of {len(self.folders)} copies; {self.matrices} sparse "
            f"matrices with one support, {self.sparsity:.2%} zeros"
        ]
        for index, name in enumerate(self.folders):
            loss = f"  loss {self.losses[index]:.4f}" if self.losses else ""
            lines.append(f"  {name}{loss}{'' if index in self.chosen else '  left out'}")
        if self.loss is not None:
            lines.append(f"  the soup  loss {self.loss:.4f}")
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join([*lines, f"saved to {self.folder}"])


def _stored_dtype(folder: str, allow_pickle: bool) -> str | None:
    if export.is_export(folder):
        return None
    path = resolve(folder, allow_pickle=allow_pickle) / "config.json"
    config = read_json(path) if path.is_file() else {}
    stored = config.get("dtype") or config.get("torch_dtype")
    return stored if stored in ("float32", "bfloat16", "float16") else None


def _masks(model: nn.Module, label: str) -> dict[str, Tensor]:
    """The masks stored with a model; empty for a plain folder."""
    works = at_work(model)
    for work in works:
        if not isinstance(work, PrunedModel):
            raise GossamerError(
                f"{label} holds {work.method.key()}, which is no pruning of weights; "
                "average first and apply it afterwards"
            )
    return parameter_masks(works[-1]) if works else {}  # type: ignore[arg-type]


def _one_mask(masks: Sequence[dict[str, Tensor]], labels: Sequence[str]) -> dict[str, Tensor]:
    """The stored masks, the same in all folders that store any."""
    held = [(label, mask) for label, mask in zip(labels, masks, strict=True) if mask]
    for label, mask in held[1:]:
        first, known = held[0]
        for name in sorted(known.keys() | mask.keys()):
            if name not in known or name not in mask or not torch.equal(known[name], mask[name]):
                raise GossamerError(
                    f"the stored masks of {name} differ between {first} and {label}; "
                    "average copies that were retrained under one mask"
                )
    return held[0][1] if held else {}


def soup(
    folders: Sequence[str | Path],
    out: str | Path,
    *,
    tokens: Tokens | None = None,
    choose: bool = False,
    batch_size: int = 8,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> SoupReport:
    """Average model folders and save the result with the first one's tokenizer and masks.

    Parameters
    ----------
    folders : two or more copies of one network, plain or saved by gossamer.
    out : must not exist, or be empty.
    tokens : held-out text; every copy and the average are then measured on it.
    choose : average only the copies that lower that loss, the best first (a greedy soup).

    Raises
    ------
    GossamerError
        If the folders hold different networks, other masks, or zeros in different places.
    """
    labels = [str(folder) for folder in folders]
    if len(labels) < 2:
        raise GossamerError(f"{len(labels)} folder given; a soup needs at least two")
    if len(set(labels)) < len(labels):
        twice = next(label for label in labels if labels.count(label) > 1)
        raise GossamerError(f"{twice} is given twice; name each copy once")
    if choose and tokens is None:
        raise GossamerError("choosing copies needs held-out text to measure them on")
    require_new(out)
    states: list[State] = []
    masks: list[dict[str, Tensor]] = []
    losses: list[float] = []
    first: Loaded | None = None
    for done, label in enumerate(labels, 1):
        loaded = load(label, dtype=_stored_dtype(label, allow_pickle), allow_pickle=allow_pickle)
        masks.append(_masks(loaded.model, label))
        states.append(copy_of(loaded.model))
        if tokens is not None:
            losses.append(window_losses(loaded.model, tokens, batch_size=batch_size).mean)
        first = loaded if first is None else first
        if progress is not None:
            progress(done, len(labels), "reading copies")
    assert first is not None
    model = first.model
    found = check_supports(states, labels)
    stored = _one_mask(masks, labels)
    if stored:
        check_supports(states, labels, stored)

    def score(state: State) -> float:
        assert tokens is not None
        put_back(model, state)
        return -window_losses(model, tokens, batch_size=batch_size).mean

    if choose:
        best = greedy(states, score, scores=[-loss for loss in losses], labels=labels)
        made, chosen = best.state, best.chosen
    else:
        made, chosen = average(states, labels), tuple(range(len(labels)))
    loss = None if tokens is None else -score(made)
    put_back(model, made)
    supports = stored or found
    kept = sum(int(torch.count_nonzero(mask)) for mask in supports.values())
    total = sum(mask.numel() for mask in supports.values())
    notes = [] if supports else ["no matrix has zeros: this is an average of dense models"]
    if batch_norms(model):
        notes.append("batch norm's running statistics are means; measure them anew on data")
    save(model, out, first.tokenizer)
    return SoupReport(
        tuple(labels),
        tuple(chosen),
        len(supports),
        1 - kept / total if total else 0.0,
        tuple(losses),
        loss,
        str(out),
        tuple(notes),
    )
