"""Lazy neurons: few hidden units speak for a token, so let only the k loudest.

Trained ReLU MLPs are sparse by themselves; :class:`Emergence` measures it. A top-k transformer
makes it a rule: of every token's hidden activation the k largest entries stay.
Shapes: I = hidden units.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from gossamer.core import Card, GossamerError, Method, check_sparsity, kept_count, topk_mask
from gossamer.methods.activations.training.emergence import Emergence
from gossamer.methods.activations.training.hidden import Activity, hidden_units
from gossamer.methods.activations.training.loop import Training, as_trainable, fit
from gossamer.methods.activations.training.trained import TrainedModel, as_data, keep_weights
from gossamer.models import Progress

__all__ = ["Emergence", "LazyNeuron", "keep_largest", "statistical_cut"]

Selection = Literal["exact", "statistical"]


def keep_largest(activation: Tensor, keep: int) -> Tensor:
    """Zero all but the ``keep`` largest values (not magnitudes) of every row.

    Gradients reach the kept entries only. Ties stay with the lower index.

    Parameters
    ----------
    activation : (..., I). keep : entries kept of a row.
    """
    rows = activation.detach().reshape(-1, activation.shape[-1])
    mask = topk_mask(rows, keep).view(activation.shape)
    return activation.masked_fill(~mask, 0)


def statistical_cut(x: Tensor, sparsity: float) -> Tensor:
    """ReLU(x - (mean + c std)) with c the normal quantile of the sparsity: top-k without a sort.

    Mean and biased standard deviation are those of each row, taken in fp32. On Gaussian rows a
    share 1 - sparsity survives; survivors are shifted by the cutoff, so this is no mask.

    Parameters
    ----------
    x : (..., I), before the activation function. sparsity : 0 < sparsity < 1.
    """
    wide = x.float()
    deviation, mean = torch.std_mean(wide, dim=-1, correction=0, keepdim=True)
    cutoff = mean + NormalDist().inv_cdf(sparsity) * deviation
    return torch.relu(wide - cutoff).to(x.dtype)


@dataclass(frozen=True, kw_only=True)
class LazyNeuron(Method):
    """Keep the k largest hidden units of every token's MLP, in training and in use.

    ``MLP(x) = W_2 TopK(φ(W_1 x))``; of gated MLPs, φ(W_g x) is cut before the product with W_u x.
    Works on token, prefill and ``generate`` alike, since every token is cut on its own.

    Parameters
    ----------
    sparsity : share of hidden units set to zero; k = round((1 - sparsity) I).
    selection : ``exact`` keeps the k largest activations; ``statistical`` shifts the
        pre-activation by mean + std Φ⁻¹(sparsity) and keeps what is positive.
    steps : updates of all weights with the rule in force; 0 only applies the rule. The samples
        are taken in the order given.
    lr, batch_size : of these updates.

    Source: arXiv 2210.06313, §4.

    Departs from the paper: any activation function and gated MLPs are served, not only ReLU; the
    model is trained further instead of from scratch.
    """

    card: ClassVar[Card] = Card(
        title="The Lazy Neuron Phenomenon: On Emergence of Activation Sparsity in Transformers",
        year=2022,
        arxiv="2210.06313",
        system="lazy_neuron",
        family="activations",
        when="during training",
        masks="dynamic",
        site="output of the MLP's activation function",
        score="activation value",
        pattern="any hidden unit, per token",
        budget="k largest of every token",
        schedule="constant",
        update="gradients through kept entries only",
        kernel="masked dense",
        departs="any activation function, gated MLPs; trained further, not from scratch",
    )
    exempt: ClassVar[Mapping[str, str]] = {
        "reads data": "without steps nothing is trained and no data is read",
    }

    sparsity: float = 0.9
    selection: Selection = "exact"
    steps: int = 0
    lr: float = 3e-4
    batch_size: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.selection not in get_args(Selection):
            raise GossamerError(
                f"selection is {self.selection!r}; choose from {', '.join(get_args(Selection))}"
            )
        self._plan()

    def _plan(self) -> Training:
        return Training(steps=self.steps, lr=self.lr, batch_size=self.batch_size, seed=None)

    def install(self, functions: list[nn.Module]) -> ExitStack:
        """Put the rule on activation functions; closing what is returned takes it off.

        Parameters
        ----------
        functions : modules such as ``nn.ReLU``, of any network.
        """
        check_sparsity(self.sparsity)

        def cut(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return statistical_cut(args[0], self.sparsity), *args[1:]

        def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return keep_largest(output, kept_count(output.shape[-1], self.sparsity))

        with ExitStack() as stack:
            # At sparsity 0 there is no rule, and the model is the dense one bit for bit.
            for module in functions if self.sparsity > 0 else ():
                statistical = self.selection == "statistical"
                handle = (
                    module.register_forward_pre_hook(cut)
                    if statistical
                    else module.register_forward_hook(keep)
                )
                stack.callback(handle.remove)
            return stack.pop_all()

    def apply(
        self, model: nn.Module, data: Any = None, *, progress: Progress | None = None
    ) -> TrainedModel:
        """Put the rule on every MLP, and train with it if ``steps`` says so.

        Parameters
        ----------
        model : any transformers model whose sites are known.
        data : tokens or inputs to train on, read only with ``steps``.
        """
        units = hidden_units(model)
        with ExitStack() as stack:
            paths = dict.fromkeys(path for unit in units for path in unit.functions)
            stack.enter_context(self.install([model.get_submodule(path) for path in paths]))
            losses: tuple[float, ...] = ()
            if self.steps:
                as_trainable(model)
                samples = as_data(data, model)
                stack.callback(keep_weights(dict(model.named_parameters())))
                losses = fit(
                    model, samples, self._plan(), progress=progress, what="top-k transformer"
                )
            return self._at_work(model, stack.pop_all(), losses)

    def reattach(
        self, model: nn.Module, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> TrainedModel:
        """Put the rule back on a loaded model; its weights are already the trained ones."""
        paths = dict.fromkeys(path for unit in hidden_units(model) for path in unit.functions)
        stack = self.install([model.get_submodule(path) for path in paths])
        work = self._at_work(model, stack, ())
        work.activity = TrainedModel.activity_of(meta)
        return work

    def _at_work(
        self, model: nn.Module, stack: ExitStack, losses: tuple[float, ...]
    ) -> TrainedModel:
        shares = {}
        for unit in hidden_units(model):
            kept = kept_count(unit.tap.features, self.sparsity) / unit.tap.features
            shares[unit.tap.name] = Activity(kept)
        note = "shares are the rule's; measure(data) counts what is non-zero and which units live"
        return TrainedModel(
            self, model, stack, shares, gate_zeros=True, losses=losses, notes=(note,)
        )
