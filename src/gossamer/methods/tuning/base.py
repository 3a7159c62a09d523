"""The protocol of tuning: attach to a model, step after every update, fold at the end.

A method says which adapter stands beside a matrix; freezing, placing, training, saving, undoing
and counting what trains are shared.
"""

from abc import abstractmethod
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from gossamer.core import GossamerError, Method, Site, check_count
from gossamer.methods.tuning.tuner.adapter import Adapter
from gossamer.methods.tuning.tuner.tuned import Tuned, reattached
from gossamer.methods.tuning.tuner.tuner import Tuner
from gossamer.models import Inputs, Progress, as_tokens, find_sites
from gossamer.models.fit import FitPlan, fit, in_float32

__all__ = ["Adapter", "Tuned", "Tuner", "Tuning"]


@dataclass(frozen=True, kw_only=True)
class Tuning(Method):
    """Base of the methods that train few parameters beside frozen weights.

    Parameters
    ----------
    roles : matrices that are tuned: ``attention``, ``mlp``, or full role names. Stacked experts,
        embeddings and heads stay as they are.
    head : modules trained in full beside, by their name in the model, such as ``classifier``.
    steps : optimizer updates of the whole training; schedules are shares of it.
    lr, batch_size : of AdamW in ``apply``; a loop of one's own brings its optimizer.
    seed : of the adapters, and of the order of data in ``apply``.
    """

    exempt: ClassVar[Mapping[str, str]] = {
        "dense at sparsity 0": "fine-tuning changes the model at any sparsity",
        "encoders": "training needs a model with a loss of its own, on data with labels",
    }

    roles: tuple[str, ...] | str = ("attention", "mlp")
    head: tuple[str, ...] | str = ()
    steps: int = 1000
    lr: float = 1e-3
    batch_size: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("roles", "head"):
            value = getattr(self, name)
            if isinstance(value, str):
                words = tuple(word.strip() for word in value.split(",") if word.strip())
                object.__setattr__(self, name, words)
            elif not isinstance(value, tuple | list) or not all(isinstance(v, str) for v in value):
                raise GossamerError(f"{name} is {value!r}; give names, separated by commas")
        check_count("steps", self.steps, 1)
        self.plan()

    # -- what a method says -----------------------------------------------------------------

    @abstractmethod
    def adapter(self, site: Site, weight: Tensor, generator: torch.Generator) -> Adapter:
        """What stands beside one matrix.

        Parameters
        ----------
        weight : the frozen (O, I) matrix, a view. generator : of the method's seed.
        """

    def refresh(self, adapter: Adapter, weight: Tensor, updates: int) -> bool:
        """Choose anew what depends on what trains, after so many updates; whether it was done."""
        return False

    def remarks(self, tuner: Tuner) -> tuple[str, ...]:
        """Further facts for the report."""
        return ()

    # -- what is shared ---------------------------------------------------------------------

    def sites(self, model: nn.Module) -> tuple[Site, ...]:
        """The matrices that get an adapter.

        Raises
        ------
        GossamerError
            If no matrix has one of the roles.
        """
        chosen = find_sites(model).select(self.roles)
        single = tuple(s for s in chosen if s.expert is None and s.role != "experts.router")
        if not single:
            raise GossamerError(
                f"no single matrix has the roles {', '.join(self.roles)}; choose others"
            )
        return single

    def plan(self) -> FitPlan:
        """The training that ``apply`` runs."""
        return FitPlan(
            steps=self.steps, lr=self.lr, batch_size=self.batch_size, seed=self.seed, decay=1.0
        )

    def attach(
        self, model: nn.Module, *, undo: bool = False, state: Mapping[str, Any] | None = None
    ) -> Tuner:
        """Freeze a model and put what trains beside it, for a training loop of one's own.

        Parameters
        ----------
        model : a transformers model, not yet wrapped; make the optimizer afterwards, from
            ``tuner.parameters()``.
        undo : keep what is written over, so that ``finish().restore()`` works.
        state : of :meth:`Tuner.state_dict`, to go on with the same frozen model.

        Raises
        ------
        GossamerError
            If the model cannot be tuned, or the state is of another tuning.
        """
        return Tuner(self, model, undo=undo, state=state)

    def apply(
        self,
        model: nn.Module,
        data: Any = None,
        *,
        undo: bool = True,
        fold: bool = True,
        progress: Progress | None = None,
    ) -> Tuned:
        """Tune a model for ``steps`` updates of AdamW.

        Parameters
        ----------
        model : with a loss of its own. Frozen weights keep their precision; what trains beside
            them is float32.
        data : training text or tokens, see :func:`gossamer.models.as_tokens`, or ``Inputs``.
        undo : keep a copy of the weights that are written over, so that ``restore`` works.
        fold : see :meth:`Tuner.finish`.

        Raises
        ------
        GossamerError
            If the data cannot be used or training diverges; the model is then as it was.
        """
        samples = data if isinstance(data, Inputs) else as_tokens(data, model)
        tuner = self.attach(model, undo=True)
        try:
            # A head trains in place: in half precision its small updates would be lost.
            half = any(p.element_size() < 4 for p in tuner.head.values())
            with in_float32(model) if half else nullcontext():
                losses = fit(
                    model,
                    samples,
                    self.plan(),
                    parameters=tuner.parameters(),
                    watch=lambda optimizer: tuner.step,
                    progress=progress,
                    what=self.key(),
                )
            tuner.undo = undo
            work = tuner.finish(fold=fold)
        except BaseException:
            tuner.cancel()
            raise
        work.losses = losses
        return work

    def reattach(
        self, model: nn.Module, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> Tuned:
        """Take a loaded model up again: its weights are folded, or its adapters are put back."""
        return reattached(self, model, meta, tensors)

    def lasting(self, steps: int) -> Self:
        """The same for a training of another length."""
        return replace(self, steps=steps)
