"""Local Interaction Basis: a layer in the directions that the next one listens to.

Principal directions are those in which activations vary most, whether anyone cares or not. Here
variance is weighted by what it does to the next layer, and what does nothing is dropped.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from gossamer.core import Card, GossamerError, Method, check_count
from gossamer.core.budget import kept_count
from gossamer.methods.features.hooks import find_module, hidden_of, with_hidden
from gossamer.methods.features.interaction.basis import Basis
from gossamer.methods.features.interaction.stream import stream_bases
from gossamer.models import (
    Applied,
    Inputs,
    Progress,
    Report,
    SiteRow,
    State,
    Tokens,
    as_tokens,
    find_sites,
)

__all__ = ["LocalInteractionBasis", "ReducedModel"]


@dataclass(frozen=True, kw_only=True)
class LocalInteractionBasis(Method):
    """Project a block's output on the directions that matter most to the blocks behind it.

    Bases are made from the last block backwards, each with respect to the features of the next.
    ``interaction.basis`` has the same for any layers, with the edges between their features.
    On language models the basis was found to be no sparser in its interactions than PCA's, in the
    paper and here (see the claims): use it to look, not in the hope of a smaller circuit.

    Parameters
    ----------
    sparsity : share of the D directions left out, least important first.
    hook : path of the block; None: the one before the middle.
    draws : random signs for every window by which the Jacobians are asked.
    seed : of the signs.

    Source: arXiv 2405.10928, §3; the ``jacobian`` formula of the authors' code. Departs from the
    paper: activations are centred instead of carrying a constant 1; the variance direction that
    the last norm divides by is not set apart; Jacobians of windows are sampled by random signs.
    """

    card: ClassVar[Card] = Card(
        title="The Local Interaction Basis: Identifying Computationally-Relevant and Sparsely "
        "Interacting Features in Neural Networks",
        year=2024,
        arxiv="2405.10928",
        system="local_interaction_basis",
        family="features",
        when="after training",
        start="dense",
        masks="static",
        site="output of a block",
        score="squared effect of a typical change on the next layer's features",
        pattern="whole directions",
        budget="a share of the directions of a layer",
        update="none; a projection is hooked in",
        departs="centred activations instead of a constant 1; the last norm's variance direction "
        "is not set apart; Jacobians of windows are sampled by random signs",
    )
    example: ClassVar[Mapping[str, Any]] = {"draws": 1}

    sparsity: float = 0.5
    hook: str | None = None
    draws: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("draws", self.draws, 1)

    def paths(self, model: nn.Module) -> tuple[str, ...]:
        """The hooked block and all behind it.

        Raises
        ------
        GossamerError
            If the hook is no block, or the last one: nothing listens to that.
        """
        blocks = find_sites(model).blocks
        hook = blocks[max(0, len(blocks) // 2 - 1)] if self.hook is None else self.hook
        find_module(model, hook)
        if hook not in blocks[:-1]:
            raise GossamerError(
                f"hook is {hook!r}; give a block that another follows, {blocks[0]} to "
                f"{blocks[max(0, len(blocks) - 2)]}"
            )
        return blocks[blocks.index(hook) :]

    def bases(
        self, model: nn.Module, data: Any, *, progress: Progress | None = None
    ) -> dict[str, Basis]:
        """Bases of the hooked block and of all behind it, by path; the model is not changed."""
        paths = self.paths(model)
        tokens: Tokens | Inputs = data if isinstance(data, Inputs) else as_tokens(data, model)
        made = stream_bases(
            model, paths, tokens, draws=self.draws, seed=self.seed, progress=progress
        )
        return dict(zip(paths, made, strict=True))

    def apply(
        self, model: nn.Module, data: Any = None, *, progress: Progress | None = None
    ) -> "ReducedModel":
        """Find the basis, then let only its most important directions pass."""
        bases = self.bases(model, data, progress=progress)
        hook = self.paths(model)[0]
        return ReducedModel(replace(self, hook=hook), model, bases[hook])

    def reattach(
        self, model: nn.Module, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> "ReducedModel":
        """Project on a stored basis again."""
        parts = (tensors[name] for name in ("mean", "into", "back", "strength"))
        return ReducedModel(replace(self, hook=meta["hook"]), model, Basis(*parts))


class ReducedModel(Applied):
    """A model of which one block speaks in few directions.

    Attributes
    ----------
    basis : all its directions. keep : how many pass.
    """

    def __init__(self, method: LocalInteractionBasis, model: nn.Module, basis: Basis) -> None:
        super().__init__(method, model)
        assert method.hook is not None
        self.basis, self.hook = basis, method.hook
        self.width = len(basis.mean)
        self.keep = kept_count(self.width, method.sparsity)
        self._handle = find_module(model, self.hook).register_forward_hook(self._project)
        self._join()

    def _project(self, module: nn.Module, args: Any, output: Any) -> Any:
        if self.keep == self.width:
            return output
        return with_hidden(output, self.basis.rebuild(hidden_of(output, self.hook), self.keep))

    def _undo(self) -> None:
        self._handle.remove()

    def state(self) -> State:
        tensors = {name: tensor.cpu().contiguous() for name, tensor in vars(self.basis).items()}
        return State({"hook": self.hook}, tensors)

    def report(self) -> Report:
        blocks = find_sites(self.model).blocks
        sparsity = 1 - self.keep / self.width
        row = SiteRow(self.hook, "directions", blocks.index(self.hook), self.width, sparsity)
        strength = self.basis.strength
        kept = float(strength[: self.keep].sum() / strength.sum())
        notes = (
            f"{min(self.keep, len(strength))} of {len(strength)} directions that vary and are "
            f"listened to pass; they hold {kept:.2%} of the importance to the next block",
            "a projection runs; no weight is removed",
        )
        return Report(self.method.to_dict(), (row,), "directions", self.width, True, notes)
