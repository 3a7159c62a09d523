"""The protocol of sparse training: attach to a model and its optimizer, step after every update.

A method says what a training starts from, and what happens to the masks at which update, as a
:class:`Change`; masks, gradients, optimizer state, distribution, saving and counting are shared.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from math import isfinite
from typing import Any, ClassVar, Literal, get_args

from torch import Tensor, nn

from gossamer.core import (
    NM,
    Block,
    GossamerError,
    Method,
    Pattern,
    Unstructured,
    check_count,
    unknown,
)
from gossamer.methods.training.sparsifier.change import Change, Growth, StartLoss
from gossamer.methods.training.sparsifier.layers import (
    Allocation,
    Layer,
    Quota,
    find_layers,
    plain_module,
    quotas,
)
from gossamer.methods.training.sparsifier.sparsifier import Sparsifier
from gossamer.methods.training.sparsifier.trained import (
    SparselyTrained,
    copy_of,
    put_back,
    reattached,
)
from gossamer.models import Inputs, Progress, Tokens, as_tokens
from gossamer.models.fit import FitPlan, batches, fit, in_float32, meeting
from gossamer.models.gradient import own_loss

__all__ = [
    "Allocation",
    "Change",
    "Growth",
    "SparseTraining",
    "SparselyTrained",
    "Sparsifier",
    "StartLoss",
    "check_share",
]


def check_share(name: str, value: object, *, high: float = 1.0) -> None:
    """Refuse what is no share from 0 to ``high``.

    Raises
    ------
    GossamerError
        Naming the value.
    """
    flag = isinstance(value, bool)
    if flag or not isinstance(value, int | float) or not isfinite(value) or not 0 <= value <= high:
        raise GossamerError(f"{name} is {value!r}; it is a share, 0 <= {name} <= {high:g}")


@dataclass(frozen=True, kw_only=True)
class SparseTraining(Method):
    """Base of the methods that keep a network sparse while it trains.

    Parameters
    ----------
    sparsity : share of the weights removed in the end; None takes the pattern's own, or 0.9.
    pattern : allowed shape, for example ``"layer"``, ``"row"`` (constant fan-in), ``"2:4"``.
    allocation : how the sparsity is split over layers: ``uniform``, ``uniform_plus`` (first layer
        dense, last layer at least 20 % dense), ``er``, ``erk``.
        N:M without a sparsity is uniform; with one, N varies by layer.
    skip : layers left dense, separated by commas: roles, halves of roles, names with wildcards.
    steps : optimizer updates of the whole training; schedules are shares of it.
    lr, batch_size : of AdamW in ``apply``; a loop of one's own brings its optimizer.
    seed : of masks, of random growth, and of the order of data in ``apply``.
    """

    patterns: ClassVar[tuple[str, ...]] = ("layer", "row", "N:M", "block")
    """Kinds of patterns the method allows."""
    keeper: ClassVar[type[Sparsifier]] = Sparsifier
    """What keeps a model sparse while it trains."""

    takes_shards: ClassVar[bool] = True
    """Whether a model sharded by ``fully_shard`` can be trained."""

    starts_from: ClassVar[Literal["loss", "data"] | None] = None
    """What ``attach`` cannot do without."""

    sparsity: float | None = None
    pattern: Pattern = Unstructured(per="layer")
    allocation: Allocation = "erk"
    skip: str = ""
    steps: int = 1000
    lr: float = 1e-3
    batch_size: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_words()
        kind = _kind(self.pattern)
        if kind not in self.patterns:
            raise GossamerError(
                f"{self.key()} takes no pattern {self.pattern}; it takes {', '.join(self.patterns)}"
            )
        fixed = self.pattern.fixed_sparsity
        if self.sparsity is None:
            object.__setattr__(self, "sparsity", 0.9 if fixed is None else fixed)
            if fixed is not None:
                # Who asks for 2:4 and no more means 2:4 in every layer.
                object.__setattr__(self, "allocation", "uniform")
        elif (
            fixed is not None and self.allocation == "uniform" and abs(self.sparsity - fixed) > 1e-9
        ):
            raise GossamerError(
                f"pattern {self.pattern} fixes the sparsity at {fixed:g}; got {self.sparsity}: "
                "leave the sparsity out or choose another pattern"
            )
        check_count("steps", self.steps, 1)
        self.plan()

    def _check_words(self) -> None:
        """Refuse what is no allocation, no names to skip, and neither True nor False."""
        if self.allocation not in get_args(Allocation):
            raise unknown("allocation", self.allocation, get_args(Allocation))
        skip: object = self.skip
        if isinstance(skip, tuple | list) and all(isinstance(word, str) for word in skip):
            object.__setattr__(self, "skip", ",".join(skip))
        elif not isinstance(skip, str):
            raise GossamerError(f"skip is {skip!r}; give names or roles, separated by commas")
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(field.default, bool) and not isinstance(value, bool):
                raise GossamerError(f"{field.name} is {value!r}; give True or False")

    # -- what a method says -----------------------------------------------------------------

    @property
    @abstractmethod
    def initial_sparsity(self) -> float:
        """Sparsity of the random masks a training starts with; 0 starts dense."""

    @abstractmethod
    def sparsity_at(self, update: int) -> float:
        """Sparsity in force after so many updates."""

    @abstractmethod
    def change(self, update: int) -> Change | None:
        """What happens to the masks at an update, counted from 1; None for nothing."""

    # -- what is shared ---------------------------------------------------------------------

    def layers_of(self, model: nn.Module) -> tuple[Layer, ...]:
        """What of a model is kept sparse."""
        return find_layers(model, self.skip)

    @property
    def remembers_removed(self) -> bool:
        """Whether removed values are kept and compete at every pruning."""
        return False

    @property
    def final_sparsity(self) -> float:
        """The sparsity, with what was left open filled in."""
        assert self.sparsity is not None
        return self.sparsity

    def start_scores(
        self, model: nn.Module, layers: tuple[Layer, ...], loss: StartLoss | None
    ) -> Mapping[str, Tensor] | None:
        """Scores of the untrained network that choose the first masks; None for noise."""
        return None

    def first_loss(self, samples: Tokens | Inputs) -> StartLoss | None:
        """What ``apply`` gives methods that score the untrained network: the first batch's loss."""
        first = next(batches(samples, self.plan()))

        def loss(model: nn.Module) -> Tensor:
            device = next(model.parameters()).device
            with meeting(model, first):
                return own_loss(model, {name: value.to(device) for name, value in first.items()})

        return loss

    def quotas(self, layers: tuple[Layer, ...], sparsity: float) -> dict[str, Quota]:
        """What every layer keeps at a sparsity."""
        return quotas(layers, self.pattern, self.allocation, sparsity)

    def plan(self) -> FitPlan:
        """The training that ``apply`` runs."""
        return FitPlan(
            steps=self.steps,
            lr=self.lr,
            batch_size=self.batch_size,
            seed=self.seed,
            decay=1.0,
        )

    def attach(
        self,
        model: nn.Module,
        optimizer: Any,
        *,
        undo: bool = False,
        masters: Mapping[str, Tensor] | None = None,
        state: Mapping[str, Any] | None = None,
        loss: StartLoss | None = None,
    ) -> Sparsifier:
        """Make a model sparse for a training loop of one's own.

        Parameters
        ----------
        model : the model, bare or inside DistributedDataParallel or torch.compile. Layers are the
            matrices of a transformer's blocks, or all linear layers and convolutions.
        optimizer : one of torch's, made from the model's parameters.
        undo : keep a copy of all weights, so that ``finish().restore()`` works.
        masters : parameter name to the copy in higher precision that the optimizer trains, where
            it does not train the parameters themselves; magnitudes are read there.
        state : of :meth:`Sparsifier.state_dict`, to go on with the weights the model now has.
        loss : function of the model to a scalar, for methods that score it before training.

        Raises
        ------
        GossamerError
            If a layer cannot take the pattern, or the optimizer does not fit the model.
        """
        before = copy_of(plain_module(model)) if undo else None
        return self.keeper(
            self, model, optimizer, before=before, masters=masters, state=state, loss=loss
        )

    def apply(
        self,
        model: nn.Module,
        data: Any = None,
        *,
        undo: bool = True,
        progress: Progress | None = None,
    ) -> SparselyTrained:
        """Train a model sparsely in place, for ``steps`` updates of AdamW.

        Parameters
        ----------
        model : with a loss of its own. Weights in half precision are trained in float32.
        data : training text or tokens, see :func:`gossamer.models.as_tokens`, or ``Inputs``.
        undo : keep a copy of the weights so that ``restore`` works.

        Raises
        ------
        GossamerError
            If the data cannot be used or training diverges; the model is then as it was.
        """
        samples = data if isinstance(data, Inputs) else as_tokens(data, model)
        before = copy_of(model)
        made: list[Sparsifier] = []

        def watch(optimizer: Any) -> Any:
            kept = before if undo else None
            loss = self.first_loss(samples)
            made.append(self.keeper(self, model, optimizer, before=kept, loss=loss))
            return made[0].step

        try:
            with in_float32(model):
                losses = fit(
                    model, samples, self.plan(), watch=watch, progress=progress, what=self.key()
                )
                work = made[0].finish()
        except BaseException:
            for sparsifier in made:
                sparsifier.remove()
            put_back(model, before)
            raise
        work.losses = losses
        return work

    def reattach(
        self, model: nn.Module, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> SparselyTrained:
        """Take up the stored masks of a loaded model; its weights already hold the zeros."""
        return reattached(self, model, meta, tensors)

    def lasting(self, steps: int) -> "SparseTraining":
        """The same for a training of another length."""
        return replace(self, steps=steps)


def _kind(pattern: Pattern) -> str:
    if isinstance(pattern, NM):
        return "N:M"
    return "block" if isinstance(pattern, Block) else str(pattern)
