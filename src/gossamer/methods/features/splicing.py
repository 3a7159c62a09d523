"""Splicing: a module's output replaced by what a dictionary makes of it.

Shapes: R = rows, D = width, M = latents.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core import GossamerError, Method, SparseRows
from gossamer.methods.features.autoencoder import Dictionary
from gossamer.methods.features.hooks import find_module, hidden_of, with_hidden
from gossamer.methods.features.measure import DictionaryScore
from gossamer.methods.features.source import ActivationSource
from gossamer.models import Applied, Report, SiteRow, State, Tokens, find_sites

__all__ = ["LossRecovered", "Splice", "SplicedModel", "loss_recovered"]

Edit = Callable[[SparseRows], SparseRows]


class Splice:
    """A hook that decodes a module's output from its sparse code.

    Rows above the dictionary's ``sink_norm``, which it was not trained on, pass unchanged.

    Parameters
    ----------
    keep_error : add back what the dictionary misses. Without an edit the output is then the
        module's own, bit for bit; with one it differs by the decoded difference alone.
    edit : changes the codes before they are decoded.

    Raises
    ------
    GossamerError
        If the path is unknown.
    """

    def __init__(
        self,
        model: nn.Module,
        path: str,
        dictionary: Dictionary,
        *,
        keep_error: bool = False,
        edit: Edit | None = None,
    ) -> None:
        self.path, self.dictionary = path, dictionary
        self.keep_error, self.edit = keep_error, edit
        self._handle = find_module(model, path).register_forward_hook(self._hook)

    def remove(self) -> None:
        """Take the hook away; a second call does nothing."""
        self._handle.remove()

    def __enter__(self) -> "Splice":
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()

    def _hook(self, module: nn.Module, args: Any, output: Any) -> Any:
        hidden = hidden_of(output, self.path)
        return with_hidden(output, self._rewrite(hidden))

    def _rewrite(self, hidden: Tensor) -> Tensor:
        made, rows = self.dictionary, hidden.reshape(-1, hidden.shape[-1])
        codes = made.encode(rows)
        plain = made.decode(codes)
        new = plain if self.edit is None else made.decode(self.edit(codes))
        if self.keep_error:
            new = rows.to(new.dtype) + (new - plain)
        limit = made.metadata.get("sink_norm")
        if limit is not None:
            sink = torch.linalg.vector_norm(rows.float(), dim=1) > limit
            new = torch.where(sink[:, None], rows.to(new.dtype), new)
        return new.view(hidden.shape).to(hidden.dtype)


class SplicedModel(Applied):
    """A dictionary at work in a model.

    Attributes
    ----------
    dictionary : with ``encode`` and ``decode``; save it alone with ``dictionary.save(folder)``.
    hook : path of the module. score : figures on the rows it was fitted on.
    """

    def __init__(
        self,
        method: Method,
        model: nn.Module,
        dictionary: Dictionary,
        hook: str,
        score: DictionaryScore,
        *,
        keep_error: bool = False,
    ) -> None:
        super().__init__(method, model)
        self.dictionary, self.hook, self.score = dictionary, hook, score
        self.keep_error = keep_error
        self._splice = Splice(model, hook, dictionary, keep_error=keep_error)
        self._join()

    def _undo(self) -> None:
        self._splice.remove()

    def state(self) -> State:
        meta = {
            "hook": self.hook,
            "keep_error": self.keep_error,
            "config": self.dictionary.config(),
            "score": asdict(self.score),
        }
        return State(meta, self.dictionary.tensors())

    def _block(self) -> int:
        """Index of the block that the module belongs to; -1 outside the blocks."""
        try:
            blocks = find_sites(self.model).blocks
        except GossamerError:
            return -1
        inside = (i for i, block in enumerate(blocks) if f"{self.hook}.".startswith(f"{block}."))
        return next(inside, -1)

    def report(self) -> Report:
        made, score = self.dictionary, self.score
        row = SiteRow(self.hook, "codes", self._block(), made.d_sae, 1 - score.l0 / made.d_sae)
        notes = (
            f"L0 {score.l0:.2f}"
            + (f" of k = {made.rule.budget}" if made.rule.budget is not None else "")
            + f", FVU {score.fvu:.4f}, dead {score.dead:.1%} on {score.rows:,} rows",
            "error kept: the output is the module's own"
            if self.keep_error
            else "the output is the reconstruction; no weight is removed",
        )
        return Report(self.method.to_dict(), (row,), "latents", made.d_sae, True, notes)


@dataclass(frozen=True)
class LossRecovered:
    """How much of the model's loss survives a splice.

    Parameters
    ----------
    clean, spliced, ablated : mean next-token loss in nats, over the same real tokens.
    ablation : what ``ablated`` puts in place of the activations: ``zero`` or ``mean``.
    """

    clean: float
    spliced: float
    ablated: float
    ablation: str

    @property
    def recovered(self) -> float:
        """(ablated - spliced) / (ablated - clean); 1 when the splice costs nothing."""
        return (self.ablated - self.spliced) / (self.ablated - self.clean)


@torch.no_grad()
def _loss(model: nn.Module, tokens: Tokens, batch_size: int) -> float:
    device = next(model.parameters()).device
    total, count = 0.0, 0
    for start in range(0, len(tokens), batch_size):
        part = tokens.slice(start, start + batch_size)
        logits = model(**next(part.batches(len(part), device))).logits[:, :-1].float()
        mask = part.attention_mask
        real = (mask[:, 1:] & mask[:, :-1]).to(device)
        wanted = part.input_ids[:, 1:].to(device)
        total += float(nn.functional.cross_entropy(logits[real], wanted[real], reduction="sum"))
        count += int(real.sum())
    return total / max(1, count)


@torch.no_grad()
def _mean_activation(model: nn.Module, tokens: Tokens, path: str, batch_size: int) -> Tensor:
    source = ActivationSource(model, path, tokens, windows=batch_size, sink_multiple=None)
    total, count = torch.zeros(source.width, dtype=torch.float64), 0
    for rows in source.one_pass():
        total += rows.double().sum(0).cpu()
        count += len(rows)
    return total / count


def loss_recovered(
    model: nn.Module,
    tokens: Tokens,
    dictionary: Dictionary,
    path: str,
    *,
    ablation: str = "zero",
    batch_size: int = 8,
) -> LossRecovered:
    """Next-token loss of the model as it is, with the dictionary spliced in, and ablated.

    Parameters
    ----------
    model : a causal language model. path : module the dictionary was fitted on.
    ablation : ``zero``, or ``mean`` for the mean activation over ``tokens``.

    Raises
    ------
    GossamerError
        For an unknown path or ablation.
    """
    if ablation not in ("zero", "mean"):
        raise GossamerError(f"ablation is {ablation!r}; give 'zero' or 'mean'")
    module = find_module(model, path)
    constant: Tensor | float = 0.0
    if ablation == "mean":
        constant = _mean_activation(model, tokens, path, batch_size)

    def ablate(module: nn.Module, args: Any, output: Any) -> Any:
        hidden = hidden_of(output, path)
        value = torch.as_tensor(constant, dtype=hidden.dtype, device=hidden.device)
        return with_hidden(output, value.expand_as(hidden))

    clean = _loss(model, tokens, batch_size)
    with Splice(model, path, dictionary):
        spliced = _loss(model, tokens, batch_size)
    handle = module.register_forward_hook(ablate)
    try:
        ablated = _loss(model, tokens, batch_size)
    finally:
        handle.remove()
    return LossRecovered(clean, spliced, ablated, ablation)
