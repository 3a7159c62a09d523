"""CoreMatching: tokens and neurons choose each other in one pass over an image and a question.

The neurons active in most tokens of the prompt are its core; the image tokens whose active
neurons overlap most with the core are the ones that matter. The others leave the prompt half-way
through the model, and the answer is decoded with the core neurons alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, get_args

from torch import Tensor, nn

from gossamer.core import Card, GossamerError, Method, kept_count
from gossamer.methods.activations.core.applied import CoreModel, blocks_between, make_plan
from gossamer.methods.activations.core.memory import Plan
from gossamer.methods.activations.vlm.pruner import TokenPruner, image_token
from gossamer.methods.activations.vlm.tokens import Reference, overlap
from gossamer.models import Progress, Report, SiteMap, State, find_sites

__all__ = ["CoreMatching", "MatchedModel"]

_ALL = 1 << 62


class MatchedModel(CoreModel):
    """A vision-language model whose prompts lose image tokens and whose answers use few neurons.

    Attributes
    ----------
    pruner : the hooks that take tokens out; ``pruner.last`` says which stayed.
    """

    method: "CoreMatching"

    def __init__(
        self, method: "CoreMatching", model: nn.Module, sites: SiteMap, plan: Plan
    ) -> None:
        block = blocks_between(len(sites.blocks), (0.0, 1.0))[int(method.layer * len(sites.blocks))]
        down = next((s for s in sites.in_block(block) if s.role == "mlp.down"), None)
        if down is None:
            raise GossamerError(f"block {block} has no plain feed-forward layer; choose another")
        keep = kept_count(down.shape[1], method.sparsity)
        self.pruner = TokenPruner(
            model,
            sites,
            block,
            lambda a, real, prunable: overlap(a > 0, real, prunable, keep, method.reference),
            self._shrunk,
        )
        # Tokens first: the neurons' hooks then see the shortened prompt's mask and positions.
        if method.prune_tokens:
            try:
                self.pruner.attach()
            except BaseException:
                self.pruner.remove()
                raise
        try:
            super().__init__(method, model, sites, plan, _ALL)
        except BaseException:
            self.pruner.remove()
            raise

    def _shrunk(self, places: Tensor) -> None:
        self.session.shrink(places)

    def _undo(self) -> None:
        super()._undo()
        self.pruner.remove()

    def state(self) -> State:
        """Nothing: cores and tokens belong to prompts."""
        return State()

    def report(self) -> Report:
        """Share of every matrix that a decoded token does not read; tokens in the notes."""
        return replace(super().report(), notes=self._notes())

    def _notes(self) -> tuple[str, ...]:
        notes = [n for n in super()._notes() if "scored in one pass" not in n]
        kept = self.pruner.last
        if not self.method.prune_tokens:
            notes.append("all tokens stay")
        elif kept is None:
            notes.append("image tokens below the elbow leave; no prompt with an image was read yet")
        else:
            notes.append(
                f"latest prompt: {kept.removed} of {kept.length} tokens left behind block "
                f"{self.pruner.block}, and every layer's cache"
            )
        return tuple(notes)


@dataclass(frozen=True, kw_only=True)
class CoreMatching(Method):
    """Prune image tokens by their overlap with the core neurons, and decode with the core.

    At a middle layer every token's active neurons (positive activations) are counted against the
    prompt's core; the image tokens before the elbow of the sorted counts stay, text always stays.
    Removed tokens take no part in later layers and are in no layer's cache: both really shrink.
    Original positions are kept. While decoding, only the core neurons of each layer are read.

    Parameters
    ----------
    sparsity : share of the neurons of each layer not used in decoding, and outside the core that
        scores tokens.
    layer : share of the depth of the block behind which tokens leave, 0 <= layer < 1.
    reference : what a token is matched against: ``core``, the neurons active in most tokens of the
        prompt (the paper); ``text``, in most text tokens; ``late``, those of one late text token
        (the released code).
    prune_tokens : False leaves all tokens, to see the neurons' part alone.
    layers : from and to which share of the depth blocks decode with core neurons.

    Source: arXiv 2505.19235, section 4.

    Departs from the paper: prompts of a batch give up equally many tokens, those of the row that
    can spare the fewest; equal scores at the elbow share their fate. Departs from the released
    code, which sets keys and values to zero (a zero key still takes softmax mass): tokens leave.
    """

    card: ClassVar[Card] = Card(
        title="CoreMatching: A Co-adaptive Sparse Inference Framework with Token and Neuron "
        "Pruning for Comprehensive Acceleration of Vision-Language Models",
        system="corematching",
        year=2025,
        arxiv="2505.19235",
        family="activations",
        when="inference",
        masks="dynamic",
        site="image tokens of a prompt; feed-forward neurons while decoding",
        score="active neurons of the token inside the prompt's core",
        pattern="whole tokens and whole neurons, per prompt",
        budget="elbow of the sorted scores for tokens; sparsity for neurons",
        schedule="once per prompt, at one layer",
        update="none",
        kernel="shorter sequences and caches; gathered dense matrices",
        departs="batch rows give up equally many tokens; ties at the elbow share their fate",
    )
    subject: ClassVar[str] = "vision-language model"
    exempt: ClassVar[Mapping[str, str]] = {
        "dense at sparsity 0": "tokens leave by the elbow, whatever the neurons' sparsity",
        "reads data": "it reads only the prompt",
    }

    sparsity: float = 0.6
    layer: float = 0.5
    reference: Reference = "core"
    prune_tokens: bool = True
    layers: tuple[float, float] = (6 / 32, 27 / 32)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reference not in get_args(Reference):
            raise GossamerError(
                f"reference is {self.reference!r}; choose from {', '.join(get_args(Reference))}"
            )
        if not 0.0 <= self.layer < 1.0:
            raise GossamerError(f"layer is {self.layer!r}; it is a share of the depth below 1")
        if len(self.layers) != 2 or not 0 <= self.layers[0] < self.layers[1] <= 1:
            raise GossamerError(
                f"layers is {self.layers!r}; give two shares of the depth, 0 <= from < to <= 1"
            )

    def apply(
        self, model: nn.Module, data: Any = None, *, progress: Progress | None = None
    ) -> MatchedModel:
        """Put both prunings to work.

        Parameters
        ----------
        model : a vision-language model whose config names its image token. data : not read.

        Raises
        ------
        GossamerError
            If the model has no image tokens.
        """
        image_token(model)
        sites = find_sites(model)
        blocks = blocks_between(len(sites.blocks), self.layers)
        plan = make_plan(model, sites, blocks, self.sparsity, "active", 1.0)
        return MatchedModel(self, model, sites, plan)

    def reattach(
        self, model: nn.Module, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> MatchedModel:
        """Put the method to work on a loaded model; it stores nothing."""
        return self.apply(model)
