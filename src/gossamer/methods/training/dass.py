"""DASS: choose the operations of a network by how well it does once it is pruned."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from math import isfinite
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gossamer.core import Card, GossamerError, Method, check_count, unknown
from gossamer.methods.training.architecture.masked import plain, sparse
from gossamer.methods.training.architecture.search import (
    Found,
    Objective,
    SearchPlan,
    search,
    train_found,
)
from gossamer.methods.training.architecture.space import decided, mixed_ops
from gossamer.models import Applied, Progress, Report, SiteRow, State
from gossamer.models.pairs import labelled_pair

__all__ = ["DASS", "FoundNetwork"]


class FoundNetwork(Applied):
    """A search space in which the choices are made, and every layer pruned.

    Zeros are written out in ordinary layers, so ``simulated`` is True.

    Attributes
    ----------
    found : architecture, its shares, and what the search took.
    """

    simulated = True

    def __init__(
        self, method: "DASS", model: nn.Module, net: nn.Module, kept: dict[str, int], found: Found
    ) -> None:
        super().__init__(method, model)
        self.found = found
        self._kept = kept
        # The model takes over the parts of the found network; its own are kept whole, untouched.
        self._before = {name: dict(vars(model)[name]) for name in _PARTS}
        net.train(model.training)
        self._put({name: vars(net)[name] for name in _PARTS})
        self._join()

    def _put(self, parts: Mapping[str, Mapping[str, Any]]) -> None:
        for name, values in parts.items():
            held = vars(self.model)[name]
            held.clear()
            held.update(values)

    def _undo(self) -> None:
        self._put(self._before)

    @property
    def architecture(self) -> dict[str, str]:
        """Place to the name of the operation found for it."""
        return dict(self.found.architecture)

    def state(self) -> State:
        tensors = {name: t.detach().clone() for name, t in self.model.state_dict().items()}
        return State({"found": asdict(self.found), "kept": self._kept}, tensors)

    def report(self) -> Report:
        layers = {name: self.model.get_parameter(f"{name}.weight") for name in self._kept}
        rows = tuple(
            SiteRow(name, "weight", i, w.numel(), 1.0 - self._kept[name] / w.numel())
            for i, (name, w) in enumerate(layers.items())
        )
        notes = [f"found {self._words(place)}" for place in self.found.architecture]
        if self.found.updates:
            notes.append(
                f"the search took {self.found.updates} updates of weights or scores and "
                f"{self.found.decisions} of the architecture; training what it found took "
                f"{self.method.updates}"
            )
        size = sum(p.numel() for p in self.model.parameters())
        values = self.method.to_dict()
        return Report(values, rows, "weights", size, self.simulated, tuple(notes))

    method: "DASS"

    def _words(self, place: str) -> str:
        op = self.found.architecture[place]
        if self.method.search == "random":
            return f"{place}: {op} (drawn)"
        shares = self.found.chances[place]
        others = ", ".join(f"{n} {s:.2f}" for n, s in shares.items() if n != op)
        return f"{place}: {op} {shares[op]:.2f}" + (f" ({others})" if others else "")


_PARTS = ("_parameters", "_buffers", "_modules")


@dataclass(frozen=True, kw_only=True)
class DASS(Method):
    """Search a network's operations by gradient, with the loss of the pruned network.

    The model is a search space: any classifier with :class:`~gossamer.methods.training.\
architecture.space.MixedOp` at the places to be searched, such as those of ``linear_space`` and
    ``conv_space``. A mixed operation is the sum of all operations, weighted by a softmax. Weights
    train first; then sparse operations learn the scores that say which weights stay, dense ones
    keep their largest; then what stays trains on. While weights are masked, always at the target
    sparsity, the softmax learns on samples that weights and scores never see. The operation with
    the largest weight stays, and what was found is trained from scratch on all samples, through the
    same phases, with scores that learn in every layer.

    Parameters
    ----------
    sparsity : share of every layer's weights removed.
    search : ``sparse`` is the method; ``dense`` decides before anything is pruned (DARTS) and
        ``random`` draws, both to compare.
    pretrain, learn, tune : updates of weights, of scores, and of the weights that stay; the same
        for what was found.
    batch_size : samples of an update. lr, score_lr, alpha_lr : of Adam, for weights, scores and
        architecture; the first two fall linearly to 0 in every phase.
    validation : share of the samples that only the architecture sees while it is searched.
    seed : of weights, samples, and of what is drawn.

    Examples
    --------
    >>> from gossamer.methods.training.architecture.space import linear_space
    >>> space = linear_space(64, 10, width=32)
    >>> applied = DASS(sparsity=0.9).apply(space, (images, labels))  # doctest: +SKIP
    >>> applied.architecture  # doctest: +SKIP
    {'2.edges.0_1': 'sparse_linear', '2.edges.0_2': 'identity', '2.edges.1_2': 'sparse_linear'}

    Source: arXiv 2207.06968, of which the abstract could be checked; mixed operations and first
    order: arXiv 1806.09055. Departs from the paper: the algorithm is from memory. Ours: dense
    operations are pruned by magnitude while the architecture is decided; one pass through the
    phases; small cells, which add to their input, of linear layers or of 3 x 3 convolutions;
    "none" is never chosen, as in DARTS; every layer has the same sparsity.
    """

    card: ClassVar = Card(
        title="DASS: Differentiable Architecture Search for Sparse neural networks",
        year=2022,
        arxiv="2207.06968",
        system="dass",
        family="training",
        when="before training",
        start="dense to sparse",
        masks="static",
        site="operations of a cell; linear weight, convolution",
        score="softmax of operations; of weights, learned scores from |w|",
        pattern="unstructured",
        budget="sparsity, uniform over layers",
        schedule="weights, then scores, then the weights that stay; architecture in the last two",
        update="first-order bilevel: architecture on held-out samples of the masked network",
        kernel="masked dense",
        departs="abstract checked, algorithm from memory (unverified); dense operations pruned by "
        "magnitude in the search; small cells; none is never chosen",
    )
    subject: ClassVar[str] = "search space"
    exempt: ClassVar[Mapping[str, str]] = {
        "dense at sparsity 0": "what is found is trained from new weights",
    }
    example: ClassVar[Mapping[str, Any]] = {
        "pretrain": 4,
        "learn": 4,
        "tune": 4,
        "batch_size": 16,
    }

    sparsity: float = 0.95
    search: Objective = "sparse"
    pretrain: int = 300
    learn: int = 300
    tune: int = 300
    batch_size: int = 64
    lr: float = 0.01
    score_lr: float = 0.03
    alpha_lr: float = 0.02
    validation: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("pretrain", 0), ("learn", 0), ("tune", 1), ("batch_size", 1)):
            check_count(name, getattr(self, name), least)
        for name in ("lr", "score_lr", "alpha_lr"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not isfinite(value) or value <= 0:
                raise GossamerError(f"{name} is {value!r}; give a positive number")
        value = self.validation
        if not isinstance(value, int | float) or not 0 < value < 1:
            raise GossamerError(f"validation is {value!r}; it is a share, 0 < validation < 1")
        if self.search not in ("sparse", "dense", "random"):
            raise unknown("search", self.search, ("sparse", "dense", "random"))

    @property
    def updates(self) -> int:
        """Of weights or scores, in one pass through the phases."""
        return self.pretrain + self.learn + self.tune

    def plan(self) -> SearchPlan:
        """The search and the training that ``apply`` runs."""
        return SearchPlan(**{f.name: getattr(self, f.name) for f in fields(SearchPlan)})

    def find(
        self, space: nn.Module, data: tuple[Tensor, Tensor], *, progress: Progress | None = None
    ) -> Found:
        """Search only; the space stays as it is.

        Parameters
        ----------
        data : inputs (N, ...) and labels (N,).
        """
        return search(space, labelled_pair(data, space, self.key()), self.plan(), progress)

    def apply(
        self,
        model: nn.Module,
        data: Any = None,
        *,
        progress: Progress | None = None,
        architecture: Mapping[str, str] | None = None,
    ) -> FoundNetwork:
        """Search, then train what was found from scratch and prune it; the model becomes that.

        Parameters
        ----------
        model : a search space: inputs to logits (N, C). Its own weights and operations come back
            with ``restore``; the search does not start from them.
        data : inputs (N, ...) and labels int64 (N,).
        architecture : place to operation, to train that instead of searching.

        Raises
        ------
        GossamerError
            If the model holds nothing to search, the data are no such pair, or training diverges.
        """
        mixed_ops(model)
        pair = labelled_pair(data, model, self.key())
        if architecture is None:
            found = search(model, pair, self.plan(), progress)
        else:
            if not isinstance(architecture, Mapping):
                raise GossamerError(
                    f"architecture is {architecture!r}; give a dict of place to operation"
                )
            found = Found(dict(architecture), {p: {op: 1.0} for p, op in architecture.items()})
        net = train_found(model, found.architecture, pair, self.plan(), progress)
        return FoundNetwork(self, model, net, plain(net), found)

    def reattach(
        self, model: nn.Module, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> FoundNetwork:
        """Put a stored network into a space of the same operations.

        Raises
        ------
        GossamerError
            If the space is another.
        """
        found = Found(**meta["found"])
        with torch.random.fork_rng([]):
            net = decided(model, found.architecture)
        sparse(net, self.sparsity)
        plain(net)
        try:
            net.load_state_dict(tensors)
        except RuntimeError:
            raise GossamerError(
                "the stored network does not fit this space; build it with the widths it was "
                "searched with"
            ) from None
        return FoundNetwork(self, model, net, dict(meta["kept"]), found)
