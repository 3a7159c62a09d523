"""The protocol of the features family: fit a dictionary on a module's activations, splice it in.

A method adds its card, its fields, a selection :class:`Rule`, and a training :class:`Recipe`.
Encoder, decoder, trainer, activation source, files and splice are shared.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from gossamer.core import GossamerError, Method
from gossamer.methods.features.autoencoder import Dictionary
from gossamer.methods.features.hooks import find_module, split_path
from gossamer.methods.features.measure import DictionaryScore, score_rows
from gossamer.methods.features.objective import Layout
from gossamer.methods.features.packing import Packed
from gossamer.methods.features.readers import Reader
from gossamer.methods.features.rules import Rule, check_k
from gossamer.methods.features.source import ActivationSource, check_sink_multiple
from gossamer.methods.features.splicing import SplicedModel
from gossamer.methods.features.training import Recipe, train
from gossamer.models import Inputs, Progress, Tokens, as_tokens, find_sites

__all__ = ["CountedMethod", "DictionaryMethod", "RevivedMethod"]

_EXPANSION = 8
_PASSES = 16
_SCORED_ROWS = 1 << 15
_WARMUP = 20


@dataclass(frozen=True, kw_only=True)
class DictionaryMethod(Method):
    """Base of the methods that learn a sparse dictionary of one module's activations.

    Parameters
    ----------
    hook : path of the module; None: the middle block.
    width : number of latents; None: 8 times the width of the activations.
    tokens : rows trained on, repeats counted; None: 16 passes over the data.
    batch_size : rows of an update, at most those of one pass.
    lr : peak learning rate; None: the recipe's rule.
    sink_multiple : tokens whose activation norm exceeds so many times the median are neither
        trained on nor replaced; None treats all alike.
    seed : of the first atoms and of the order of the rows.
    """

    exempt: ClassVar[Mapping[str, str]] = {
        "dense at sparsity 0": "a reconstruction is lossy at any number of latents",
        "exact sparsity": "the amount is k latents of each token, not a sparsity",
        "sparsity range": "the amount is k latents of each token, not a sparsity",
    }

    hook: str | None = None
    width: int | None = None
    tokens: int | None = None
    batch_size: int = 1024
    lr: float | None = None
    sink_multiple: float | None = 10.0
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hook is not None and not isinstance(self.hook, str):
            raise GossamerError(
                f"hook is {self.hook!r}; give a module's path, such as model.layers.3"
            )
        for name in ("width", "tokens", "batch_size"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise GossamerError(f"{name} is {value!r}; give a whole number, at least 1")
        if self.lr is not None and not 0 < self.lr < float("inf"):
            raise GossamerError(f"lr is {self.lr!r}; give a positive number")
        check_sink_multiple(self.sink_multiple)

    @abstractmethod
    def rule(self) -> Rule:
        """A fresh selection rule with this method's parameters, all of them resolved."""

    def layout(self, source: ActivationSource) -> Layout:
        """Which columns of the source's rows are what."""
        return Layout(source.width)

    def options(self, source: ActivationSource) -> dict[str, Any]:
        """What the trainer needs to know beside the layout."""
        return {}

    def facts(self, source: ActivationSource) -> dict[str, Any]:
        """What a splice needs to know of the dictionary, for its metadata."""
        return {}

    def paths(self, model: nn.Module) -> str | tuple[str, ...]:
        """What is read: the hook, or the middle block."""
        if self.hook is not None:
            return self.hook
        blocks = find_sites(model).blocks
        return blocks[len(blocks) // 2]

    def path_for(self, model: nn.Module, dictionary: Dictionary) -> str:
        """The module to read for a dictionary that is given: the hook, else the dictionary's own.

        Raises
        ------
        GossamerError
            If the model has no module of the dictionary's name.
        """
        named = dictionary.metadata.get("hook_name") if self.hook is None else None
        path = str(named) if named else self.paths(model)
        assert isinstance(path, str)
        find_module(model, split_path(path)[0])
        return path

    def prepared(self, model: nn.Module, data: Any) -> Tokens | Packed | Inputs:
        """The data as windows."""
        return data if isinstance(data, Inputs) else as_tokens(data, model, seed=self.seed)

    @property
    def warmup_rows(self) -> int:
        """Rows over which a penalty rises to its weight: 5 % of the run."""
        return (self.tokens or 0) // _WARMUP

    def recipe(self, steps: int, batch_size: int) -> Recipe:
        """How to train; a method overrides this to add its own terms."""
        return Recipe(steps=steps, batch_size=batch_size, lr=self.lr, seed=self.seed)

    def resolved(self, source: ActivationSource) -> Self:
        """This method with every open field that a source decides filled in."""
        rows = source.count
        return replace(
            self,
            hook=source.paths[-1],
            width=_EXPANSION * self.layout(source).reads if self.width is None else self.width,
            tokens=_PASSES * rows if self.tokens is None else self.tokens,
            batch_size=min(self.batch_size, max(1, rows)),
        )

    def source(self, model: nn.Module, data: Any = None) -> ActivationSource:
        """The rows this method trains on.

        Raises
        ------
        GossamerError
            If the hook names no module, or the data is unusable.
        """
        paths = self.paths(model)
        for path in (paths,) if isinstance(paths, str) else paths:
            find_module(model, split_path(path)[0])
        return ActivationSource(
            model,
            paths,
            self.prepared(model, data),
            seed=self.seed,
            sink_multiple=self.sink_multiple,
            reader=self.reader(paths if isinstance(paths, str) else paths[-1]),
        )

    def reader(self, hook: str) -> Reader | None:
        """What reads other columns than the hook's output; None where that is all."""
        return None

    def fit(
        self, model: nn.Module, data: Any = None, *, progress: Progress | None = None
    ) -> Dictionary:
        """Train a dictionary on the model's activations; the model itself is not changed.

        Parameters
        ----------
        data : as for :func:`gossamer.models.as_tokens`, or ``Inputs``.
        progress : called with steps done, steps in all, and what runs.
        """
        return self._fit(model, self.source(model, data), progress)[1]

    def _fit(
        self, model: nn.Module, source: ActivationSource, progress: Progress | None
    ) -> tuple[Self, Dictionary]:
        """The method with every open field filled in, and its dictionary."""
        method = self.resolved(source)
        assert method.width is not None
        assert method.tokens is not None
        steps = max(1, method.tokens // method.batch_size)
        layout = method.layout(source)
        recipe = method.recipe(steps, method.batch_size).resolved(layout.reads, method.width)
        batches, width = source.batches(method.batch_size), method.width
        method = replace(method, lr=recipe.lr)
        made = train(
            batches,
            width=width,
            rule=method.rule(),
            recipe=recipe,
            layout=layout,
            **method.options(source),
            progress=progress,
        )
        made.metadata |= source.metadata() | self.facts(source) | {"method": method.to_dict()}
        return method, made

    def apply(
        self,
        model: nn.Module,
        data: Any = None,
        *,
        keep_error: bool = False,
        progress: Progress | None = None,
    ) -> SplicedModel:
        """Fit a dictionary, then put its reconstruction in place of the module's output.

        Parameters
        ----------
        keep_error : add back what the dictionary misses, so that the model is unchanged.
        """
        source = self.source(model, data)
        method, made = self._fit(model, source, progress)
        score = score_rows(made, source.head(_SCORED_ROWS), method.layout(source))
        made.metadata["score"] = vars(score)
        assert method.hook is not None
        return SplicedModel(method, model, made, method.hook, score, keep_error=keep_error)

    def reattach(
        self, model: nn.Module, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> SplicedModel:
        """Splice in a stored dictionary again."""
        made = Dictionary.from_tensors(meta["config"], tensors).eval().requires_grad_(False)
        made.to(next(model.parameters()).device)
        score = DictionaryScore(**meta["score"])
        keep_error = meta["keep_error"]
        return SplicedModel(self, model, made, meta["hook"], score, keep_error=keep_error)


@dataclass(frozen=True, kw_only=True)
class RevivedMethod(DictionaryMethod):
    """Base of the methods that bring silent latents back with an auxiliary loss.

    Parameters
    ----------
    aux_k : underused latents that model the error of a token; None: half the activations'
        width; 0 turns the auxiliary loss off.
    aux_coefficient : weight of the auxiliary loss, >= 0.
    """

    aux_k: int | None = None
    aux_coefficient: float = 1 / 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.aux_k is not None and self.aux_k < 0:
            raise GossamerError(f"aux_k is {self.aux_k}; give a whole number, at least 0")
        if not 0 <= self.aux_coefficient < float("inf"):
            raise GossamerError(f"aux_coefficient is {self.aux_coefficient}; it is at least 0")

    def recipe(self, steps: int, batch_size: int) -> Recipe:
        base = super().recipe(steps, batch_size)
        return replace(base, aux_k=self.aux_k, aux_coefficient=self.aux_coefficient)


@dataclass(frozen=True, kw_only=True)
class CountedMethod(RevivedMethod):
    """Base of the methods that keep k latents of a token, each or on average.

    Parameters
    ----------
    k : latents kept of each token, 1 <= k <= width.
    """

    k: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        check_k(self.k)
        if self.width is not None and self.width < self.k:
            raise GossamerError(f"k is {self.k}, above the width {self.width}; lower k")
