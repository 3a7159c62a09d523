"""What training leaves: the strengths of features, and an autoencoder that holds the weights."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core import Budget, GossamerError, Method, Selection, Unstructured, check_count
from gossamer.kernels.sparse_training import Connections
from gossamer.methods.training.sparse_autoencoder.table import as_table
from gossamer.methods.training.sparse_autoencoder.training import Network
from gossamer.models import Applied, Report, SiteRow, State

__all__ = ["FeatureStrengths", "SelectingAutoencoder", "autoencoder", "linears_of", "strengths"]


def strengths(encoder: Connections) -> Tensor:
    """Sum of |w| over the connections that leave each input: (F,) of an encoder (H, F)."""
    total = encoder.values.new_zeros(encoder.shape[1])
    return total.index_add_(0, encoder.columns.long(), encoder.values.abs())


def _spread(matrix: Connections, at: Tensor, dim: int) -> Connections:
    """The matrix with its rows (dim 0) or columns (dim 1) moved to places among more."""
    places = at.nonzero()[:, 0]
    if dim == 1:
        columns = places[matrix.columns.long()].to(torch.int32)
        return Connections(matrix.values, columns, matrix.start, (matrix.shape[0], len(at)))
    counts = torch.zeros(len(at), dtype=torch.int64)
    counts[places] = matrix.start.diff()
    start = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    return Connections(matrix.values, matrix.columns, start, (len(at), matrix.shape[1]))


@dataclass(frozen=True, eq=False)
class FeatureStrengths:
    """A trained sparse autoencoder, and how strongly each feature is connected in it.

    Parameters
    ----------
    encoder : (H, F). decoder : (F, H). encoder_bias : (H,). decoder_bias : (F,).
    varies : bool, (F,); constant features have no connections.
    losses : mean training loss of every epoch.
    """

    encoder: Connections
    decoder: Connections
    encoder_bias: Tensor
    decoder_bias: Tensor
    varies: Tensor
    losses: tuple[float, ...]

    @classmethod
    def of(cls, net: Network, varies: Tensor, losses: list[float]) -> "FeatureStrengths":
        """From a network over the features that vary."""
        bias = net.decoder.bias.new_zeros(len(varies))
        bias[varies] = net.decoder.bias
        return cls(
            _spread(net.encoder.connections(), varies, 1),
            _spread(net.decoder.connections(), varies, 0),
            net.encoder.bias,
            bias,
            varies,
            tuple(losses),
        )

    @property
    def strengths(self) -> Tensor:
        """(F,), at least 0; 0 for constant features."""
        return strengths(self.encoder)

    def selection(self, k: int) -> Selection:
        """The k strongest features; ties go to the lower index.

        Raises
        ------
        GossamerError
            If fewer than k features vary.
        """
        check_count("k", k, 1)
        if k > (most := int(self.varies.sum())):
            raise GossamerError(
                f"k is {k}; only {most} of {len(self.varies)} features vary: choose at most {most}"
            )
        # Below zero, so that a feature that varies but lost all connections still goes first.
        score = torch.where(self.varies, self.strengths, -1.0)
        return Unstructured(per="layer").select(score, Budget(keep=k))

    def select(self, k: int) -> Tensor:
        """Indices of the k strongest features, strongest first: int64, (k,)."""
        chosen = self.selection(k).mask().nonzero()[:, 0]
        return chosen[torch.argsort(self.strengths[chosen], descending=True, stable=True)]

    def transform(self, table: Any, k: int) -> Tensor:
        """The columns of a table that are selected, strongest first: (samples, k)."""
        return as_table(table, len(self.varies))[:, self.select(k)]


def autoencoder(features: int, hidden: int, tanh: bool = False) -> nn.Sequential:
    """The network that is trained, with dense random weights."""
    layers: list[nn.Module] = [nn.Linear(features, hidden), nn.Sigmoid()]
    layers.append(nn.Linear(hidden, features))
    return nn.Sequential(*layers, *([nn.Tanh()] if tanh else [])).eval()


def linears_of(model: nn.Module, tanh: bool = False) -> tuple[nn.Linear, nn.Linear]:
    """Encoder and decoder of an autoencoder.

    Raises
    ------
    GossamerError
        If the model is another network.
    """
    kinds = [nn.Linear, nn.Sigmoid, nn.Linear] + ([nn.Tanh] if tanh else [])
    layers = list(model) if isinstance(model, nn.Sequential) else []
    names = ", ".join(kind.__name__ for kind in kinds)
    if [type(layer) for layer in layers] != kinds:
        found = ", ".join(type(layer).__name__ for layer in layers) or type(model).__name__
        raise GossamerError(f"QuickSelection trains Sequential({names}); this model is {found}")
    encoder, decoder = layers[0], layers[2]
    assert isinstance(encoder, nn.Linear)
    assert isinstance(decoder, nn.Linear)
    closed = decoder.out_features == encoder.in_features
    if not closed or encoder.bias is None or decoder.bias is None:
        raise GossamerError(
            f"an autoencoder gives back its {encoder.in_features} features and has biases; this "
            f"one gives {decoder.out_features}"
        )
    return encoder, decoder


class SelectingAutoencoder(Applied):
    """An autoencoder whose two matrices were trained with few connections.

    Training stored only those; the model that was given holds them as dense matrices with zeros,
    so ``simulated`` is True. ``gossamer.accelerate`` runs them sparse.

    Attributes
    ----------
    fitted : strengths, selection and the connections.
    """

    simulated = True

    def __init__(self, method: Method, model: nn.Module, fitted: FeatureStrengths) -> None:
        super().__init__(method, model)
        self.fitted = fitted
        linears = linears_of(model, len(list(model.children())) == 4)
        self._before = {k: v.detach().clone() for k, v in model.state_dict().items()}
        parts = (fitted.encoder, fitted.encoder_bias), (fitted.decoder, fitted.decoder_bias)
        with torch.no_grad():
            for linear, (matrix, bias) in zip(linears, parts, strict=True):
                linear.weight.copy_(matrix.dense())
                linear.bias.copy_(bias)
        self._join()

    @property
    def strengths(self) -> Tensor:
        """(F,) strength of every feature."""
        return self.fitted.strengths

    def select(self, k: int) -> Tensor:
        """Indices of the k strongest features, strongest first."""
        return self.fitted.select(k)

    def _undo(self) -> None:
        state = self.model.state_dict()
        with torch.no_grad():
            for name, tensor in self._before.items():
                state[name].copy_(tensor)

    def state(self) -> State:
        tensors = {"varies": self.fitted.varies.to(torch.uint8)}
        for name in ("encoder", "decoder"):
            matrix: Connections = getattr(self.fitted, name)
            for part in ("values", "columns", "start"):
                tensors[f"{name}.{part}"] = getattr(matrix, part)
            tensors[f"{name}.bias"] = getattr(self.fitted, f"{name}_bias")
        shape = list(self.fitted.encoder.shape)
        return State({"shape": shape, "losses": list(self.fitted.losses)}, tensors)

    def report(self) -> Report:
        fitted = self.fitted
        matrices = {"encoder": fitted.encoder, "decoder": fitted.decoder}
        rows = tuple(
            SiteRow(name, name, i, m.shape[0] * m.shape[1], m.sparsity)
            for i, (name, m) in enumerate(matrices.items())
        )
        still = int((~fitted.varies).sum())
        strongest = ", ".join(str(int(i)) for i in fitted.select(min(10, int(fitted.varies.sum()))))
        notes = (
            f"{len(fitted.varies)} features, {still} of them constant; strongest: {strongest}",
            f"loss {fitted.losses[0]:.4f} in the first epoch, {fitted.losses[-1]:.4f} in the last",
        )
        size = sum(p.numel() for p in self.model.parameters())
        return Report(self.method.to_dict(), rows, "weights", size, self.simulated, notes)
