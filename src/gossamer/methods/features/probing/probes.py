"""Probes: classifiers of activations, each with its own choice of hyperparameters.

A probe sees training rows alone. What it picks (a strength, a number of neighbours) it picks by
the AUC of held-out training rows, and that AUC is what probes are compared by.
Shapes: N = rows, D = width of the activations, M = latents, K = latents of a sparse probe.
"""

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from scipy.sparse import csr_array
from sklearn.ensemble import GradientBoostingClassifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier
from torch import Tensor

from gossamer.core import SparseRows, check_count, unknown
from gossamer.methods.features.probing.folds import balanced, validation_auc
from gossamer.methods.features.probing.logistic import STRENGTHS, lasso, reduced, ridge

__all__ = [
    "BASELINES",
    "Components",
    "Fitted",
    "Logistic",
    "Neighbours",
    "Perceptron",
    "Probe",
    "Rows",
    "SparseProbe",
    "Trees",
    "top_latents",
]


@dataclass(frozen=True, eq=False)
class Rows:
    """Activations, and their codes by a dictionary.

    Parameters
    ----------
    x : (N, D) float64. codes : (N, M), or None where no dictionary takes part.
    """

    x: Tensor
    codes: csr_array | None = None

    @classmethod
    def of(cls, x: Tensor, codes: SparseRows | None = None) -> "Rows":
        """From activations of any dtype and codes in either form."""
        if codes is None:
            return cls(x.double().cpu())
        csr = codes.to_csr()
        assert csr.indptr is not None
        parts = (t.detach().cpu().numpy() for t in (csr.values.double(), csr.indices, csr.indptr))
        return cls(x.double().cpu(), csr_array(tuple(parts), shape=csr.shape))

    def at(self, index: Tensor) -> "Rows":
        """The rows at these places."""
        picked = None if self.codes is None else self.codes[index.numpy()]
        return Rows(self.x[index], picked)

    def __len__(self) -> int:
        return len(self.x)


@dataclass(frozen=True, eq=False)
class Fitted:
    """A probe after training.

    Parameters
    ----------
    validation : AUC of held-out training rows, 0.5 where there were too few to hold any out.
    score : rows to (N,), higher for positives.
    """

    validation: float
    score: Callable[[Rows], Tensor]


class Probe(ABC):
    """A classifier with a name."""

    name: str

    @abstractmethod
    def fit(self, rows: Rows, labels: Tensor, held: Tensor, seed: int) -> Fitted:
        """Train.

        Parameters
        ----------
        labels : (N,) bool. held : (F, N) rows each fold holds out.
        """


Scaler = Callable[[Tensor], Tensor]
Shrink = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def _scaler(x: Tensor) -> Scaler:
    """To mean 0 and deviation 1 by the training rows; constant columns become 0."""
    mean, spread = x.mean(0), x.std(0, unbiased=False)
    size = torch.where(spread > 1e-9 * (1 + mean.abs()), spread, torch.inf)
    return lambda rows: (rows - mean) / size


def _linear(
    x: Tensor, labels: Tensor, held: Tensor, shrink: Shrink, strengths: Sequence[float]
) -> tuple[float, Tensor]:
    """Validation AUC of the best strength and the fit with it on all rows, (D + 1,)."""
    y, count = 2 * labels.double() - 1, len(strengths)
    # The last of the folds holds nothing out: it is the fit to be used.
    every = torch.cat([held, held.new_zeros(1, len(labels))])
    weights = balanced(labels, every).repeat_interleave(count, 0)
    strength = torch.tensor(strengths, dtype=torch.float64).repeat(len(every))
    found = shrink(x, y, weights, strength).view(len(every), count, -1)
    scores = found[:-1, :, :-1] @ x.T
    by = [validation_auc(list(scores[:, i]), labels, held) for i in range(count)]
    best = max(range(count), key=lambda i: by[i])
    if not len(held):
        best = _middle(strengths)
    return by[best], found[-1, best]


def _middle(strengths: Sequence[float]) -> int:
    """Without rows to choose by, the strength nearest to 1."""
    return min(range(len(strengths)), key=lambda i: abs(math.log(strengths[i])))


@dataclass(frozen=True)
class Logistic(Probe):
    """Logistic regression with an L2 penalty on all channels."""

    strengths: Sequence[float] = STRENGTHS
    name: str = "logistic"

    def fit(self, rows: Rows, labels: Tensor, held: Tensor, seed: int) -> Fitted:
        scale = _scaler(rows.x)
        x, directions = reduced(scale(rows.x))
        value, found = _linear(x, labels, held, ridge, self.strengths)
        weight = directions @ found[:-1]
        return Fitted(value, lambda new: scale(new.x) @ weight)


@dataclass(frozen=True)
class Components(Probe):
    """Logistic regression on the first principal components, as many as validate best."""

    counts: Sequence[int] = (2, 4, 8, 16, 32, 64, 128)
    strengths: Sequence[float] = (1.0,)
    name: str = "pca"

    def fit(self, rows: Rows, labels: Tensor, held: Tensor, seed: int) -> Fitted:
        scale = _scaler(rows.x)
        x, directions = reduced(scale(rows.x))
        most = x.shape[1]
        counts = sorted({min(c, most) for c in self.counts}) if most else [0]
        fits = [(c, *_linear(x[:, :c], labels, held, ridge, self.strengths)) for c in counts]
        count, value, found = max(fits, key=lambda fit: fit[1])
        weight = directions[:, :count] @ found[:-1]
        return Fitted(value, lambda new: scale(new.x) @ weight)


@dataclass(frozen=True)
class Neighbours(Probe):
    """Share of positives among the nearest training rows, nearer ones counting more."""

    counts: Sequence[int] = (1, 3, 7, 15, 31)
    name: str = "neighbours"

    def fit(self, rows: Rows, labels: Tensor, held: Tensor, seed: int) -> Fitted:
        scale = _scaler(rows.x)
        x, votes = scale(rows.x), balanced(labels, labels.new_zeros(1, len(labels)))[0]
        apart = torch.cdist(x, x)
        least = len(labels) - (int(held.sum(1).max()) if len(held) else 0)
        counts = sorted({min(c, least) for c in self.counts})
        hidden = [apart.masked_fill(h, torch.inf) for h in held]
        by = [
            validation_auc([_vote(a, labels, votes, c) for a in hidden], labels, held)
            for c in counts
        ]
        best = max(range(len(counts)), key=lambda i: by[i])

        def score(new: Rows) -> Tensor:
            return _vote(torch.cdist(scale(new.x), x), labels, votes, counts[best])

        return Fitted(by[best], score)


def _vote(apart: Tensor, labels: Tensor, votes: Tensor, count: int) -> Tensor:
    near, place = apart.topk(count, dim=1, largest=False)
    weight = votes[place] / (near + 1e-9)
    return (weight * labels[place]).sum(1) / weight.sum(1)


class _Estimator(Probe):
    """A scikit-learn classifier of standardised channels, with one setting."""

    @abstractmethod
    def made(self, seed: int) -> Any:
        """A fresh classifier."""

    weighted = True

    def fit(self, rows: Rows, labels: Tensor, held: Tensor, seed: int) -> Fitted:
        scale = _scaler(rows.x)
        x = scale(rows.x)
        every = torch.cat([held, held.new_zeros(1, len(labels))])
        fits = []
        for hidden, weight in zip(every, balanced(labels, every), strict=True):
            used = ~hidden
            given = {"sample_weight": weight[used].numpy()} if self.weighted else {}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                fits.append(self.made(seed).fit(x[used].numpy(), labels[used].numpy(), **given))
        value = validation_auc([_proba(f, x) for f in fits[:-1]], labels, held)
        return Fitted(value, lambda new: _proba(fits[-1], scale(new.x)))


def _proba(fit: Any, x: Tensor) -> Tensor:
    return torch.from_numpy(fit.predict_proba(x.numpy())[:, 1])


@dataclass(frozen=True)
class Trees(_Estimator):
    """Gradient-boosted trees."""

    count: int = 50
    name: str = "trees"

    def made(self, seed: int) -> Any:
        return GradientBoostingClassifier(
            n_estimators=self.count, max_features="sqrt", random_state=seed
        )


@dataclass(frozen=True)
class Perceptron(_Estimator):
    """A network with one hidden layer."""

    hidden: int = 64
    name: str = "perceptron"
    weighted = False

    def made(self, seed: int) -> Any:
        return MLPClassifier((self.hidden,), alpha=1.0, solver="lbfgs", random_state=seed)


def top_latents(codes: csr_array, labels: Tensor, count: int) -> Tensor:
    """The latents whose mean differs most between the classes, strongest first.

    The difference of a latent is divided by its mean where it fires, so that loud latents do not
    win by their scale. Latents that never fire come last, ties go to the lower number.

    Parameters
    ----------
    codes : (N, M), training rows only. labels : (N,) bool.
    """
    mark = labels.numpy()
    apart = codes[mark].mean(0) - codes[~mark].mean(0)
    fired = codes.astype(bool).sum(0)
    loud = abs(codes).sum(0) / fired.clip(1)
    score = torch.from_numpy(abs(apart) / (loud + (fired == 0)))
    return score.argsort(descending=True, stable=True)[:count]


@dataclass(frozen=True)
class SparseProbe(Probe):
    """Logistic regression on the few latents that differ most between the classes.

    Parameters
    ----------
    latents : K. penalty : ``l1`` or ``l2``.
    rank_once : rank latents by all training rows, those that validate among them, as the paper's
        code does; otherwise by each fold's own. Once is cheaper and flatters the probe.
    """

    latents: int
    penalty: Literal["l1", "l2"] = "l1"
    strengths: Sequence[float] = STRENGTHS
    rank_once: bool = False

    def __post_init__(self) -> None:
        check_count("latents", self.latents, 1)
        if self.penalty not in ("l1", "l2"):
            raise unknown("penalty", self.penalty, ("l1", "l2"))

    @property
    def name(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return f"{self.latents} latents"

    def fit(self, rows: Rows, labels: Tensor, held: Tensor, seed: int) -> Fitted:
        assert rows.codes is not None
        count = len(self.strengths)
        strength = torch.tensor(self.strengths, dtype=torch.float64)
        scores: list[Tensor] = []
        for hidden, weight in zip(held, balanced(labels, held), strict=True):
            # Ranked anew in every fold: held-out rows that had a say would validate themselves.
            read, found = self._trained(rows.codes, labels, ~hidden, weight, strength)
            scores.append(found @ read(rows.codes).T)
        by = [validation_auc([s[i] for s in scores], labels, held) for i in range(count)]
        best = max(range(count), key=lambda i: by[i]) if len(held) else _middle(self.strengths)
        every = torch.ones_like(labels)
        weight = balanced(labels, ~every[None])[0]
        read, found = self._trained(rows.codes, labels, every, weight, strength[best : best + 1])

        def score(new: Rows) -> Tensor:
            assert new.codes is not None
            return read(new.codes) @ found[0]

        return Fitted(by[best], score)

    def _trained(
        self, codes: csr_array, labels: Tensor, used: Tensor, weight: Tensor, strength: Tensor
    ) -> tuple[Callable[[csr_array], Tensor], Tensor]:
        """What reads the chosen latents of codes, and a fit for every strength (S, K)."""
        ranks = torch.ones_like(used) if self.rank_once else used
        chosen = top_latents(codes[ranks.numpy()], labels[ranks], self.latents).numpy()
        x = torch.from_numpy(codes[:, chosen].toarray()[used.numpy()])
        scale, y = _scaler(x), 2 * labels[used].double() - 1
        weights = weight[used].expand(len(strength), -1)
        if self.penalty == "l1":
            found = lasso(scale(x), y, weights, strength)[:, :-1]
        else:
            small, directions = reduced(scale(x))
            found = ridge(small, y, weights, strength)[:, :-1] @ directions.T

        def read(new: csr_array) -> Tensor:
            return scale(torch.from_numpy(new[:, chosen].toarray()))

        return read, found


BASELINES: dict[str, Callable[[], Probe]] = {
    "logistic": Logistic,
    "pca": Components,
    "neighbours": Neighbours,
    "trees": Trees,
    "perceptron": Perceptron,
}
