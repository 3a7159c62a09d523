"""QuickSelection: features worth keeping are those a sparse autoencoder stays connected to.

A denoising autoencoder with few connections is trained without labels; rewiring moves the
connections to where they help. What an input neuron's connections add up to ranks its feature.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from gossamer.core import Card, GossamerError, Method, check_count, kept_count
from gossamer.kernels.sparse_training import Connections
from gossamer.methods.training.sparse_autoencoder.fitted import (
    FeatureStrengths,
    SelectingAutoencoder,
    autoencoder,
    linears_of,
)
from gossamer.methods.training.sparse_autoencoder.layers import Descent
from gossamer.methods.training.sparse_autoencoder.table import as_table, standardise, varying
from gossamer.methods.training.sparse_autoencoder.training import Form, Plan, network, train
from gossamer.models import Progress

__all__ = ["QuickSelection"]


@dataclass(frozen=True, kw_only=True)
class QuickSelection(Method):
    """Choose features without labels, by their strength in a sparse denoising autoencoder.

    Trained with SET: few random connections at the start; after every epoch those closest to
    zero give way to new random ones. Strength is the sum of |w| over the connections that leave
    an input. Only existing connections are stored, multiplied and updated, on the CPU.

    ``QuickSelection().fit(table).select(50)`` needs no model. ``apply`` trains the two linear
    layers of a given autoencoder instead, anew, and writes the sparse weights into them.

    Parameters
    ----------
    epsilon : connections of each matrix, epsilon * (features + hidden), where ``sparsity`` is
        None. sparsity : fraction of each matrix without connections; takes epsilon's place.
    hidden : hidden units; a model that is given decides itself.
    epochs, lr, batch_size : of gradient descent with momentum 0.9 and weight decay 1e-5.
    zeta : share of connections replaced after every epoch but the last.
    noise : standard deviation of the input's noise; features have 1.
    dropout : share of hidden units silenced.
    output : last activation. seed : of connections, noise, order and dropout.

    Source: arXiv 2012.00560. Departs from the paper: constant features take no part and have
    strength 0; dropout also masks the gradient and scales survivors up, so that nothing is scaled
    afterwards; shares removed are exact counts for each sign; strength is read after the last
    epoch. 30 epochs by default instead of 100: on small tables more of them favour features
    that are nearly constant.
    """

    card: ClassVar = Card(
        title="Quick and Robust Feature Selection: the Strength of Energy-efficient Sparse "
        "Training for Autoencoders",
        year=2020,
        arxiv="2012.00560",
        system="quickselection",
        family="training",
        when="during training",
        start="sparse to sparse",
        masks="dynamic",
        site="both matrices of a denoising autoencoder; input features",
        score="|w|, each sign for itself; of a feature, sum of |w| over its connections",
        pattern="unstructured; then whole features",
        budget="epsilon (n_in + n_out) connections of each matrix; K features",
        schedule="rewired after every epoch but the last",
        update="random connections take the place of removed ones",
        kernel="C++ products over stored connections",
        departs="constant features take no part; inverted dropout; exact counts; 30 epochs",
    )
    subject: ClassVar[str] = "autoencoder"
    exempt: ClassVar[Mapping[str, str]] = {
        "dense at sparsity 0": "the autoencoder is trained anew from random weights",
    }
    example: ClassVar[Mapping[str, Any]] = {"epochs": 3, "batch_size": 20, "epsilon": 2.0}

    sparsity: float | None = None
    epsilon: float = 13.0
    hidden: int = 1000
    epochs: int = 30
    lr: float = 0.01
    batch_size: int = 100
    zeta: float = 0.2
    noise: float = 0.2
    dropout: float = 0.2
    output: Literal["linear", "tanh"] = "linear"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("hidden", "epochs", "batch_size"):
            check_count(name, getattr(self, name), 1)
        for name in ("epsilon", "lr"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not isfinite(value) or value <= 0:
                raise GossamerError(f"{name} is {value!r}; give a positive number")
        for name, most in (("zeta", 1.0), ("dropout", 1.0), ("noise", float("inf"))):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 <= value < most:
                raise GossamerError(f"{name} is {value!r}; give a number, 0 <= {name} < {most}")
        if self.output not in ("linear", "tanh"):
            raise GossamerError(f"output is {self.output!r}; it is linear or tanh")

    def fit(
        self, table: Any, *, progress: Progress | None = None, form: Form = "stored"
    ) -> FeatureStrengths:
        """Train on a table and rank its features.

        Parameters
        ----------
        table : (samples, features) array or tensor of finite numbers; standardised here. float64
            trains in float64.
        form : ``masked`` trains the same network with dense matrices, for comparison.

        Raises
        ------
        GossamerError
            If the table is unusable, all its features are constant, or training diverges.
        """
        return self._fit(as_table(table), self.hidden, progress, form)

    def _fit(
        self, table: Tensor, hidden: int, progress: Progress | None, form: Form = "stored"
    ) -> FeatureStrengths:
        varies = varying(table)
        features = int(varies.sum())
        if not features:
            raise GossamerError(
                f"all {len(varies)} features are constant; give a table in which some vary"
            )
        generator = torch.Generator().manual_seed(self.seed)
        count = self._connections(len(varies), features, hidden)
        tanh = self.output == "tanh"
        net = network(features, hidden, count, generator, form, tanh, table.dtype)
        clean = standardise(table if features == len(varies) else table[:, varies])
        losses = train(net, clean, self._plan(), generator, progress)
        return FeatureStrengths.of(net, varies, losses)

    def _connections(self, features: int, varied: int, hidden: int) -> int:
        """Connections of each matrix: none lead to constant features."""
        if self.sparsity is None:
            wanted = round(self.epsilon * (varied + hidden))
        else:
            wanted = kept_count(features * hidden, self.sparsity)
        return min(max(wanted, 1), varied * hidden)

    def _plan(self) -> Plan:
        return Plan(
            epochs=self.epochs,
            batch_size=self.batch_size,
            zeta=self.zeta,
            noise=self.noise,
            dropout=self.dropout,
            tanh=self.output == "tanh",
            descent=Descent(lr=self.lr),
        )

    def apply(
        self, model: nn.Module | None, data: Any = None, *, progress: Progress | None = None
    ) -> SelectingAutoencoder:
        """Train an autoencoder in place, from new random connections.

        Parameters
        ----------
        model : ``Sequential(Linear(F, H), Sigmoid(), Linear(H, F))``, with Tanh at the end where
            ``output`` says so; None makes one. It reads standardised features.
        data : table (samples, F), as for :meth:`fit`.

        Raises
        ------
        GossamerError
            If the model is another network, or the table unusable.
        """
        if model is None:
            model = autoencoder(as_table(data).shape[1], self.hidden, self.output == "tanh")
        encoder, _ = linears_of(model, self.output == "tanh")
        table = as_table(data, encoder.in_features).to(encoder.weight.dtype)
        fitted = self._fit(table, encoder.out_features, progress)
        return SelectingAutoencoder(self, model, fitted)

    def reattach(
        self, model: nn.Module, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> SelectingAutoencoder:
        """Put stored connections into an autoencoder of the same shape."""
        encoder, _ = linears_of(model, self.output == "tanh")
        shape = (encoder.out_features, encoder.in_features)
        if list(shape) != list(meta["shape"]):
            raise GossamerError(
                f"the stored encoder is {tuple(meta['shape'])}; this model's is {shape}"
            )
        fitted = FeatureStrengths(
            _stored("encoder", tensors, shape),
            _stored("decoder", tensors, (shape[1], shape[0])),
            tensors["encoder.bias"],
            tensors["decoder.bias"],
            tensors["varies"].bool(),
            tuple(meta["losses"]),
        )
        return SelectingAutoencoder(self, model, fitted)


def _stored(name: str, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Connections:
    values, columns, start = (tensors[f"{name}.{part}"] for part in ("values", "columns", "start"))
    return Connections(values, columns, start, shape)
