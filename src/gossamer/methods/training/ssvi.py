"""SSVI: a Bayesian network trained in a sparse subspace, which changes while it is trained.

Only a few weights have a mean and a standard deviation, all others are exactly zero from the first
update to the last; weights that are most likely near zero give way to those with large gradients.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gossamer.core import Card, GossamerError, Method, check_count, unknown
from gossamer.methods.training.bayesian.calibration import quality
from gossamer.methods.training.bayesian.criteria import CRITERIA, Criterion
from gossamer.methods.training.bayesian.posterior import Posterior
from gossamer.methods.training.bayesian.training import Plan, Trained, train, weights_of
from gossamer.models import Applied, Progress, Report, SiteRow, State
from gossamer.models.pairs import labelled_pair

__all__ = ["SSVI", "SparsePosterior"]


class SparsePosterior(Applied):
    """A classifier with a Gaussian over its few active weights; the model itself holds the means.

    Zeros are written out in the model, so ``simulated`` is True.

    Attributes
    ----------
    trained : posteriors by parameter name, and the deterministic parameters.
    """

    simulated = True

    def __init__(self, method: "SSVI", model: nn.Module, trained: Trained) -> None:
        super().__init__(method, model)
        self.trained = trained
        self._before = {k: v.detach().clone() for k, v in model.state_dict().items()}
        means = {n: p.dense(p.mu) for n, p in trained.posteriors.items()}
        self._write({**means, **trained.others})
        self._join()

    def _write(self, tensors: Mapping[str, Tensor]) -> None:
        state = self.model.state_dict()
        with torch.no_grad():
            for name, tensor in tensors.items():
                state[name].copy_(tensor)

    def _undo(self) -> None:
        self._write(self._before)

    @torch.no_grad()
    def predict(self, x: Tensor, samples: int = 16, seed: int = 0) -> Tensor:
        """Class probabilities (N, C), averaged over networks drawn from the posterior.

        Parameters
        ----------
        samples : networks drawn; 0 takes the means instead.
        """
        check_count("samples", samples, 0)
        generator = torch.Generator().manual_seed(seed)
        total: Tensor | None = None
        for _ in range(max(samples, 1)):
            drawn = {
                n: p.sample(generator) if samples else p.dense(p.mu)
                for n, p in self.trained.posteriors.items()
            }
            logits = functional_call(self.model, {**drawn, **self.trained.others}, (x,))
            found = logits.softmax(-1)
            total = found if total is None else total + found
        assert total is not None
        return total / max(samples, 1)

    def quality(self, x: Tensor, y: Tensor, samples: int = 16, seed: int = 0) -> dict[str, float]:
        """Accuracy, expected calibration error ``ece`` (15 bins) and ``nll`` (nats)."""
        return quality(self.predict(x, samples, seed), y)

    def state(self) -> State:
        tensors = {f"other.{n}": t for n, t in self.trained.others.items()}
        for name, posterior in self.trained.posteriors.items():
            tensors[f"places.{name}"] = posterior.places
            tensors[f"mu.{name}"] = posterior.mu
            tensors[f"rho.{name}"] = posterior.rho
        return State({"sites": list(self.trained.posteriors)}, tensors)

    def report(self) -> Report:
        posteriors = self.trained.posteriors
        rows = tuple(
            SiteRow(name, "weight", i, p.size, 1.0 - len(p) / p.size)
            for i, (name, p) in enumerate(posteriors.items())
        )
        sigma = torch.cat([p.sigma() for p in posteriors.values()])
        active = sum(len(p) for p in posteriors.values())
        note = f"{active:,} active weights have mean and sigma; median sigma {sigma.median():.1e}"
        size = sum(p.numel() for p in self.model.parameters())
        return Report(self.method.to_dict(), rows, "weights", size, self.simulated, (note,))


@dataclass(frozen=True, kw_only=True)
class SSVI(Method):
    """Train a Bayesian classifier of which only a few weights are ever active.

    Mean-field Gaussians over the active weights; loss: cross-entropy of one drawn network plus
    ``kl`` / (samples) times the divergence from N(0, prior^2), over active weights only, warmed up
    over the first half of the updates.

    Parameters
    ----------
    sparsity : fraction of every matrix that is inactive.
    steps, batch_size : updates. lr, sigma_lr : of means and of rho, sigma = softplus(rho); SGD with
        momentum 0.9, both fall to 0 as half a cosine. decay : weight decay of the means.
    every, until, exchange : every so many updates, up to this share of them, this share of the
        active weights changes, falling to 0 as half a cosine.
    criterion : which go first: least ``mean`` |mu|, ``snr`` |mu| / sigma, ``abs_mean`` E|theta|,
        ``abs_snr`` E|theta| over its deviation, ``exp_mean`` E exp|theta|, ``exp_snr``. abs_snr is
        a rising function of |mu| / sigma, so it removes what ``snr`` removes.
    prior : standard deviation; on few samples the paper's 0.005 holds all means at zero: widen it
        (0.1 for a thousand) or lower kl. kl : weight of the divergence. seed : of everything drawn.

    Source: arXiv 2402.11025. Departs from the paper: uniform sparsity over layers; biases and
    normalisation are deterministic; means start from N(0, 0.1^2); updates replace epochs; a
    gradient of a drawn network decides what is added.
    """

    card: ClassVar = Card(
        title="Training Bayesian Neural Networks with Sparse Subspace Variational Inference",
        year=2024,
        arxiv="2402.11025",
        system="ssvi",
        family="training",
        when="during training",
        start="sparse to sparse",
        masks="dynamic",
        site="linear weight, convolution",
        score="drop by E|theta| over its deviation, grow by |gradient of mu|",
        pattern="unstructured",
        budget="sparsity, uniform over layers",
        schedule="every 100 updates; exchanged share falls as half a cosine",
        update="variational training of active means and deviations",
        kernel="masked dense",
        departs="biases deterministic; uniform sparsity; updates in place of epochs",
    )
    subject: ClassVar[str] = "classifier"
    exempt: ClassVar[Mapping[str, str]] = {
        "dense at sparsity 0": "training changes the weights at any sparsity",
    }
    example: ClassVar[Mapping[str, Any]] = {"steps": 8, "every": 2, "batch_size": 16}

    sparsity: float = 0.9
    steps: int = 2000
    batch_size: int = 64
    lr: float = 0.1
    sigma_lr: float = 0.01
    decay: float = 5e-4
    every: int = 100
    until: float = 0.75
    exchange: float = 0.3
    criterion: Criterion = "abs_snr"
    prior: float = 0.005
    kl: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("steps", "batch_size", "every"):
            check_count(name, getattr(self, name), 1)
        for name in ("lr", "sigma_lr", "prior"):
            self._check(name, lambda v: v > 0, "a positive number")
        for name in ("decay", "kl"):
            self._check(name, lambda v: v >= 0, "a number, at least 0")
        for name in ("until", "exchange"):
            self._check(name, lambda v: 0 <= v <= 1, "a share, from 0 to 1")
        if self.criterion not in CRITERIA:
            raise unknown("criterion", self.criterion, tuple(CRITERIA))

    def _check(self, name: str, fits: Any, cure: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, int | float) or not isfinite(value) or not fits(value):
            raise GossamerError(f"{name} is {value!r}; give {cure}")

    def apply(
        self, model: nn.Module, data: Any = None, *, progress: Progress | None = None
    ) -> SparsePosterior:
        """Train a classifier in place, from new random means.

        Parameters
        ----------
        model : inputs to logits (N, C), with linear layers or convolutions, in main memory.
        data : inputs (N, ...) and labels int64 (N,).

        Raises
        ------
        GossamerError
            If the data are no such pair, or training diverges.
        """
        x, y = labelled_pair(data, model, self.key())
        plan = Plan(**{n: getattr(self, n) for n in Plan.__dataclass_fields__})
        generator = torch.Generator().manual_seed(self.seed)
        return SparsePosterior(self, model, train(model, x, y, plan, generator, progress))

    def reattach(
        self, model: nn.Module, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> SparsePosterior:
        """Put a stored posterior onto a model of the same shape."""
        weights = weights_of(model)
        if list(weights) != list(meta["sites"]):
            raise GossamerError(
                f"the posterior is over {', '.join(meta['sites'])}; this model has "
                f"{', '.join(weights)}"
            )
        posteriors = {
            n: Posterior.at(
                tuple(w.shape), tensors[f"places.{n}"], tensors[f"mu.{n}"], tensors[f"rho.{n}"]
            )
            for n, w in weights.items()
        }
        others = {n[6:]: t for n, t in tensors.items() if n.startswith("other.")}
        return SparsePosterior(self, model, Trained(posteriors, others))
