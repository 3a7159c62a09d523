"""Dark matter: most of what a sparse autoencoder misses is missed predictably.

A linear map of the activation predicts about half of the error, and nearly all of its size. The
error is split into that linear part and the rest, and either can be put back into the model.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from gossamer.core import Card, GossamerError
from gossamer.methods.features.autoencoder import Dictionary
from gossamer.methods.features.base import CountedMethod
from gossamer.methods.features.dark.split import ErrorSplit, split_error, with_linear_error
from gossamer.methods.features.measure import DictionaryScore, score_rows
from gossamer.methods.features.rules import Rule, TopK
from gossamer.methods.features.splicing import SplicedModel
from gossamer.models import Progress, Report

__all__ = ["DarkMatter", "SplitModel"]

_PARTS = ("none", "linear", "nonlinear")
_ROWS = 1 << 15


@dataclass(frozen=True, kw_only=True)
class DarkMatter(CountedMethod):
    """Fit a TopK dictionary, split its error, and splice it in with one part of the error.

    :meth:`split` does the analysis alone, for any dictionary. The spliced model shows what a part
    is worth: compare the loss with ``put_back`` set to ``none``, ``linear`` and ``nonlinear``.

    Parameters
    ----------
    put_back : part of the error that is added to the reconstruction: ``none``, ``linear`` (what
        a linear map of the activation predicts) or ``nonlinear`` (the rest).
    k : latents kept of each token, 1 <= k <= width.

    Source: arXiv 2410.14670, §3 to §5. Departs from the paper: rows are all tokens of the data,
    early ones included unless the data leave them out; the dictionary is trained here.
    """

    card: ClassVar[Card] = Card(
        title="Decomposing The Dark Matter of Sparse Autoencoders",
        year=2024,
        arxiv="2410.14670",
        system="dark_matter",
        family="features",
        when="after training",
        start="dense",
        masks="dynamic",
        site="output of any module",
        score="pre-activation of a latent",
        pattern="unstructured per token",
        budget="k latents of each token",
        schedule="constant",
        update="learned dictionary and a linear map of its error",
        kernel="sparse_code",
        departs="early tokens are left out only where the data leave them out; the dictionary is "
        "trained here",
    )
    example: ClassVar[Mapping[str, Any]] = {"k": 4, "width": 64}

    put_back: str = "linear"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.put_back not in _PARTS:
            raise GossamerError(f"put_back is {self.put_back!r}; give one of {', '.join(_PARTS)}")

    def rule(self) -> Rule:
        return TopK(self.k)

    def split(self, model: nn.Module, data: Any, dictionary: Dictionary) -> ErrorSplit:
        """Split the error of a dictionary of this method's hook; the model is not changed.

        Raises
        ------
        GossamerError
            If the data have too few tokens.
        """
        return split_error(dictionary, self.source(model, data).head(_ROWS), seed=self.seed)

    def apply(
        self, model: nn.Module, data: Any = None, *, progress: Progress | None = None
    ) -> "SplitModel":
        """Fit, split, and splice in the reconstruction with the chosen part of its error."""
        source = self.source(model, data)
        method, made = self._fit(model, source, progress)
        split = split_error(made, source.head(_ROWS), seed=self.seed)
        full = with_linear_error(made, split.linear, self.put_back)
        score = score_rows(made, source.head(_ROWS))
        full.metadata |= {"score": vars(score), "split": split.figures()}
        assert method.hook is not None
        return SplitModel(method, model, full, method.hook, score)

    def reattach(
        self, model: nn.Module, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> "SplitModel":
        """Splice in a stored dictionary and its part of the error again."""
        made = Dictionary.from_tensors(meta["config"], tensors).eval().requires_grad_(False)
        made.to(next(model.parameters()).device)
        return SplitModel(self, model, made, meta["hook"], DictionaryScore(**meta["score"]))


class SplitModel(SplicedModel):
    """A model in which a module's output is a reconstruction with a part of its error.

    Attributes
    ----------
    split : figures of :class:`ErrorSplit` without its map.
    """

    @property
    def split(self) -> dict[str, float]:
        """How much of the error is linear, on rows not fitted on."""
        return dict(self.dictionary.metadata["split"])

    def report(self) -> Report:
        plain, s = super().report(), self.split
        part = getattr(self.method, "put_back", "none")
        said = (
            f"a linear map predicts R² {s['error_r2']:.3f} of the error and {s['norm_r2']:.3f} of "
            f"its squared norm, on {s['held']:,} rows not fitted on (shuffled "
            f"{s['shuffled_r2']:.3f}, {s['shuffled_norm_r2']:.3f})",
            f"FVU {s['fvu']:.4f} alone, {s['nonlinear_fvu']:.4f} with the linear part",
            f"put back: {part}",
        )
        few = s["fitted"] < 2 * self.dictionary.d_in
        warned = f"{s['fitted']:,} rows are few for a map of {self.dictionary.d_in} channels; "
        return replace(
            plain,
            notes=(*plain.notes, *said),
            warnings=(f"{warned}its prediction may not carry over",) if few else (),
        )
