"""Splicing: a module's output replaced by what a dictionary makes of it.

Shapes: R = rows, D = width, M = latents.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core import GossamerError, Method, SparseRows
from gossamer.methods.features.autoencoder import Dictionary
from gossamer.methods.features.hooks import (
    find_module,
    hidden_of,
    input_of,
    split_path,
    with_hidden,
    with_input,
)
from gossamer.methods.features.measure import DictionaryScore, Interval
from gossamer.methods.features.source import ActivationSource
from gossamer.models import Applied, Report, SiteRow, State, Tokens, find_sites

__all__ = ["LossRecovered", "Splice", "SplicedModel", "loss_recovered"]

Edit = Callable[[SparseRows], SparseRows]


class Splice:
    """A hook that decodes a module's output, or with ``path:in`` its input, from its sparse code.

    Rows above the dictionary's ``sink_norm``, which it was not trained on, pass unchanged.
    A dictionary whose metadata name other modules under ``reads`` (``path:in`` for an input) gets
    their activations side by side; ``writes`` then gives the columns of the reconstruction that
    take the place of this module's output.

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
        self._reads = tuple(dictionary.metadata.get("reads") or (path,))
        self._seen: dict[str, Tensor] = {}
        self._paused = False
        self._handles = ExitStack()
        try:
            for read in self._reads:
                if read != path:
                    self._watch(model, read)
            name, inward = split_path(path)
            module = find_module(model, name)
            if inward:
                handle = module.register_forward_pre_hook(self._before, with_kwargs=True)
            else:
                handle = module.register_forward_hook(self._hook)
            self._handles.callback(handle.remove)
        except BaseException:
            self.remove()
            raise

    def _watch(self, model: nn.Module, read: str) -> None:
        """Keep what a module takes or returns, until the spliced module runs."""
        name, inward = split_path(read)
        module = find_module(model, name)

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._seen[read] = input_of(args, kwargs, read)

        def after(module: nn.Module, args: Any, output: Any) -> None:
            self._seen[read] = hidden_of(output, read)

        if inward:
            handle = module.register_forward_pre_hook(before, with_kwargs=True)
        else:
            handle = module.register_forward_hook(after)
        self._handles.callback(handle.remove)

    def remove(self) -> None:
        """Take the hooks away; a second call does nothing."""
        self._handles.close()
        self._seen.clear()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """While open, the module's activations pass unchanged."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def __enter__(self) -> "Splice":
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()

    def _hook(self, module: nn.Module, args: Any, output: Any) -> Any:
        hidden = hidden_of(output, self.path)
        return with_hidden(output, self._rewrite(hidden))

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        return with_input(args, kwargs, self._rewrite(input_of(args, kwargs, self.path)))

    def _rewrite(self, hidden: Tensor) -> Tensor:
        if self._paused:
            self._seen.clear()
            return hidden
        made, rows = self.dictionary, hidden.reshape(-1, hidden.shape[-1])
        self._seen[self.path] = hidden
        parts = [self._read(path).reshape(len(rows), -1) for path in self._reads]
        self._seen.clear()
        given = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        written = slice(*made.metadata.get("writes", (None,)))
        codes = made.encode(given)
        plain = made.decode(codes, given)[:, written]
        new = plain if self.edit is None else made.decode(self.edit(codes), given)[:, written]
        if self.keep_error:
            new = rows.to(new.dtype) + (new - plain)
        limit = made.metadata.get("sink_norm")
        if limit is not None:
            sink = torch.linalg.vector_norm(parts[0].float(), dim=1) > limit
            new = torch.where(sink[:, None], rows.to(new.dtype), new)
        return new.view(hidden.shape).to(hidden.dtype)

    def _read(self, path: str) -> Tensor:
        if path not in self._seen:
            raise GossamerError(
                f"module {path} has not run when {self.path} does; splice the later of the two"
            )
        return self._seen[path]


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
    windows : (W, 4) float64: tokens counted in each window, and the three losses summed there.
    """

    clean: float
    spliced: float
    ablated: float
    ablation: str
    windows: Tensor | None = field(default=None, compare=False, repr=False)

    @property
    def recovered(self) -> float:
        """(ablated - spliced) / (ablated - clean); 1 when the splice costs nothing."""
        return (self.ablated - self.spliced) / (self.ablated - self.clean)

    def interval(self, *, draws: int = 1000, seed: int = 0) -> Interval:
        """:attr:`recovered` with its interval, from resampling whole windows."""
        if self.windows is None or len(self.windows) < 2:
            raise GossamerError("fewer than 2 windows cannot be resampled; measure on more text")
        generator = torch.Generator().manual_seed(seed)
        count = len(self.windows)
        chosen = torch.randint(count, (draws, count), generator=generator)
        clean, spliced, ablated = self.windows[chosen].sum(1)[:, 1:].unbind(1)
        return Interval.of(self.recovered, (ablated - spliced) / (ablated - clean))


@torch.no_grad()
def _loss(model: nn.Module, tokens: Tokens, batch_size: int) -> Tensor:
    """(W, 2), float64: tokens with a next one in each window, and their summed loss."""
    device = next(model.parameters()).device
    found = []
    for start in range(0, len(tokens), batch_size):
        part = tokens.slice(start, start + batch_size)
        logits = model(**next(part.batches(len(part), device))).logits[:, :-1].float()
        mask = part.attention_mask
        real = (mask[:, 1:] & mask[:, :-1]).to(device)
        wanted = part.input_ids[:, 1:].to(device)
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), wanted, reduction="none")
        summed = (losses.double() * real).sum(1)
        found.append(torch.stack([real.sum(1).double(), summed], 1).cpu())
    return torch.cat(found)


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
    name, inward = split_path(path)
    module = find_module(model, name)
    constant: Tensor | float = 0.0
    if ablation == "mean":
        constant = _mean_activation(model, tokens, path, batch_size)

    def ablate(module: nn.Module, args: Any, output: Any) -> Any:
        hidden = hidden_of(output, path)
        return with_hidden(output, filled(hidden))

    def ablate_input(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return with_input(args, kwargs, filled(input_of(args, kwargs, path)))

    def filled(hidden: Tensor) -> Tensor:
        value = torch.as_tensor(constant, dtype=hidden.dtype, device=hidden.device)
        return value.expand_as(hidden)

    clean = _loss(model, tokens, batch_size)
    with Splice(model, path, dictionary):
        spliced = _loss(model, tokens, batch_size)
    if inward:
        handle = module.register_forward_pre_hook(ablate_input, with_kwargs=True)
    else:
        handle = module.register_forward_hook(ablate)
    try:
        ablated = _loss(model, tokens, batch_size)
    finally:
        handle.remove()
    sums = torch.cat([clean, spliced[:, 1:], ablated[:, 1:]], 1)
    count = max(1.0, float(sums[:, 0].sum()))
    means = (sums[:, 1:].sum(0) / count).tolist()
    return LossRecovered(means[0], means[1], means[2], ablation, sums)
