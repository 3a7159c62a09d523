"""Tasks from a model: labelled windows become rows of one module, with their codes.

Shapes: N = windows, T = tokens, D = width, M = latents.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core import GossamerError
from gossamer.methods.features.autoencoder import Dictionary
from gossamer.methods.features.hooks import record
from gossamer.methods.features.probing.probes import Rows
from gossamer.methods.features.probing.quiver import Task
from gossamer.models import Inputs, Tokens, check_vocabulary
from gossamer.models.labelled import Labelled

__all__ = ["last_token", "one_against_rest", "windows_of"]

_LEAST = 4


def windows_of(model: nn.Module, data: Any) -> tuple[Tokens, Tensor, Tensor]:
    """Windows, the class of each, and whether it is shifted, from labelled inputs.

    Parameters
    ----------
    data : ``Inputs`` with ``input_ids`` and ``labels`` (N,), maybe ``attention_mask``, and maybe
        ``shifted`` (N,) bool for windows from elsewhere that are only tested on; or ``Labelled``
        text, whose attribute ``label`` is the class.

    Raises
    ------
    GossamerError
        If the data is something else or the labels are no classes.
    """
    if isinstance(data, Labelled) and "label" in data.attributes:
        check_vocabulary(data.tokens, model)
        labels = data.attributes["label"]
        return data.tokens, labels, torch.zeros_like(labels).bool()
    values = data.values if isinstance(data, Inputs) else {}
    if "input_ids" not in values or "labels" not in values:
        raise GossamerError(
            f"sparse probing needs labelled windows, not {type(data).__name__}; give "
            "Inputs({'input_ids': (N, T), 'labels': (N,)}), or Labelled text with a label"
        )
    ids, labels = values["input_ids"], values["labels"]
    if labels.dim() != 1 or labels.is_floating_point():
        raise GossamerError(
            f"labels are {labels.dtype} of shape {tuple(labels.shape)}; give one whole number a "
            "window"
        )
    tokens = Tokens(ids, values.get("attention_mask", torch.ones_like(ids)).bool())
    check_vocabulary(tokens, model)
    return tokens, labels.long(), values.get("shifted", torch.zeros_like(labels)).bool()


@torch.no_grad()
def last_token(model: nn.Module, tokens: Tokens, hook: str, *, windows: int = 32) -> Tensor:
    """(N, D) float32 activations of a module at the last real token of every window."""
    device, found = next(model.parameters()).device, []
    for start in range(0, len(tokens), windows):
        part = tokens.slice(start, start + windows)
        hidden = record(model, (hook,), next(part.batches(len(part), device)))[hook]
        places = torch.arange(part.length).expand_as(part.input_ids)
        last = (places * part.attention_mask).amax(1).to(hidden.device)
        found.append(hidden[torch.arange(len(part)), last].float().cpu())
    return torch.cat(found)


def one_against_rest(
    rows: Tensor,
    labels: Tensor,
    dictionary: Dictionary,
    *,
    shifted: Tensor | None = None,
    test_share: float = 0.4,
    seed: int = 0,
    names: Iterable[str] | None = None,
) -> tuple[Task, ...]:
    """One task for every class, or a single one where there are two.

    Parameters
    ----------
    rows : (N, D). labels : (N,) classes. shifted : (N,) bool, rows only tested on.
    test_share : of every class, never trained on. names : of the tasks, in the order of classes.

    Raises
    ------
    GossamerError
        For fewer than 2 classes, or a class with fewer than 4 rows.
    """
    away = torch.zeros_like(labels, dtype=torch.bool) if shifted is None else shifted
    classes = labels[~away].unique().tolist()
    if len(classes) < 2:
        raise GossamerError(f"labels name {len(classes)} class; give at least 2")
    generator = torch.Generator().manual_seed(seed)
    tested = away.clone()
    for one in classes:
        at = ((labels == one) & ~away).nonzero()[:, 0]
        if len(at) < _LEAST:
            raise GossamerError(f"class {one} has {len(at)} rows; give at least {_LEAST} of each")
        order = at[torch.randperm(len(at), generator=generator)]
        tested[order[: min(max(1, round(test_share * len(at))), len(at) - 2)]] = True
    with torch.no_grad():
        device = dictionary.W_dec.device
        parts = [
            Rows.of(part, dictionary.encode(part.to(device)))
            for part in (rows[~tested], rows[tested & ~away], rows[away])
        ]
    wanted = classes[1:] if len(classes) == 2 else classes
    titles = [f"class {one}" for one in wanted] if names is None else list(names)
    return tuple(
        Task(
            title,
            parts[0],
            labels[~tested] == one,
            parts[1],
            labels[tested & ~away] == one,
            parts[2] if bool(away.any()) else None,
            labels[away] == one if bool(away.any()) else None,
        )
        for title, one in zip(titles, wanted, strict=True)
    )
