"""Readers: what a source takes from a forward pass, when that is more than a module's output.

Shapes: B = windows of a batch, T = tokens, D = width of the module's output.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gossamer.core import GossamerError
from gossamer.methods.features.hooks import find_module, hidden_of, with_hidden

__all__ = ["GradientReader", "Reader"]


class Reader(Protocol):
    """Makes the columns of a source's rows from a batch.

    Attributes
    ----------
    channels : number of leading columns that are activations; norms are measured on them.
    """

    channels: int

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """(B, T, columns), detached."""
        ...


class GradientReader:
    """A module's output, and beside it the gradient of the next-token loss by it: 2 D columns.

    The loss is summed over the real tokens of a window that have a next one; a token's gradient
    says how its activation bears on that and all later predictions. It is scaled to norm
    sqrt(D), or zero where nothing depends on the token. The model's weights get no gradient.

    Parameters
    ----------
    path : of the module.
    """

    def __init__(self, path: str) -> None:
        self.path, self.channels = path, 0

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Run the model forwards and back.

        Raises
        ------
        GossamerError
            If the model predicts no next token, or the module does not run.
        """
        found: list[Tensor] = []

        def watch(module: nn.Module, args: Any, output: Any) -> Any:
            hidden = hidden_of(output, self.path).detach().requires_grad_()
            found.append(hidden)
            return with_hidden(output, hidden)

        handle = find_module(model, self.path).register_forward_hook(watch)
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        try:
            with torch.enable_grad():
                loss = _loss(model, batch)
                if not found:
                    raise GossamerError(f"module {self.path!r} does not run; hook another")
                (gradient,) = torch.autograd.grad(loss, found[-1], allow_unused=True)
        finally:
            handle.remove()
            for module, training in modes:
                module.training = training
        hidden = found[-1].detach()
        self.channels = hidden.shape[-1]
        gradient = torch.zeros_like(hidden) if gradient is None else gradient
        size = torch.linalg.vector_norm(gradient.float(), dim=-1, keepdim=True)
        unit = gradient.float() / size.clamp_min(1e-30) * self.channels**0.5
        return torch.cat([hidden.float(), unit], dim=-1)


def _loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Summed next-token loss over real tokens."""
    logits = getattr(model(**batch), "logits", None)
    ids = batch.get("input_ids")
    if logits is None or ids is None or logits.shape[:2] != ids.shape:
        raise GossamerError(
            f"{type(model).__name__} predicts no next token, so its loss has no gradient; "
            "give a causal language model"
        )
    mask = batch.get("attention_mask", torch.ones_like(ids))
    if mask.dim() == 2:
        real = mask[:, 1:].bool() & mask[:, :-1].bool()
    else:
        # Documents packed apart: the next token is of the same one where positions go on.
        real = batch["position_ids"].diff(dim=1) == 1
    return nn.functional.cross_entropy(
        logits[:, :-1][real].float(), ids[:, 1:][real], reduction="sum"
    )
