"""SAE embeddings: a document is what its tokens' latents say, and every number has a name.

Dense embeddings compare documents well and cannot say in what they differ. Pooled codes of a
sparse autoencoder can: they are compared, related, grouped and searched latent by latent.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from gossamer.core import Card, GossamerError, unknown
from gossamer.methods.features.autoencoder import Dictionary
from gossamer.methods.features.base import CountedMethod
from gossamer.methods.features.embeddings.embed import POOLINGS, Pooling, embed, token_labels
from gossamer.methods.features.embeddings.store import Embeddings
from gossamer.methods.features.measure import DictionaryScore, score_rows
from gossamer.methods.features.rules import Rule, TopK
from gossamer.methods.features.splicing import SplicedModel
from gossamer.models import Progress, Report, as_tokens

__all__ = ["EmbeddingModel", "SAEEmbeddings"]

_SCORED_ROWS = 1 << 15


@dataclass(frozen=True, kw_only=True)
class SAEEmbeddings(CountedMethod):
    """Learn a TopK dictionary, and embed documents as the pooled codes of their tokens.

    The embeddings are read off by :meth:`EmbeddingModel.embed`; ``differences``,
    ``associations``, ``clusters`` and ``retrieve`` of
    :mod:`gossamer.methods.features.embeddings` analyse them, with p-values and false discovery
    rates. A dictionary there already is embeds by ``embeddings.embed``.

    Parameters
    ----------
    k : latents kept of each token, 1 <= k <= width.
    pooling : ``max``, ``mean`` or ``top``, see :func:`gossamer.methods.features.embeddings.embed`.
    share : of a document's tokens that ``top`` averages, above 0, at most 1.

    Source: arXiv 2512.10092. Departs from the paper: latents are labelled by their tokens or by
    the caller instead of a language model; findings carry exact tests and false discovery rates;
    the dictionary is trained here.
    """

    card: ClassVar[Card] = Card(
        title="Interpretable Embeddings with Sparse Autoencoders: A Data Analysis Toolkit",
        year=2025,
        arxiv="2512.10092",
        system="sae_embeddings",
        family="features",
        when="after training",
        start="dense",
        masks="dynamic",
        site="output of any module",
        score="pre-activation of a latent",
        pattern="unstructured per document",
        budget="k latents of each token",
        schedule="constant",
        update="learned dictionary",
        kernel="sparse_code",
        departs="labels from tokens or the caller, not from a language model; exact tests and "
        "false discovery rates",
    )

    example: ClassVar[Mapping[str, Any]] = {"k": 8}

    pooling: Pooling = "max"
    share: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pooling not in POOLINGS:
            raise unknown("pooling", self.pooling, POOLINGS)
        if not 0 < self.share <= 1:
            raise GossamerError(f"share is {self.share!r}; give a share above 0, at most 1")

    def rule(self) -> Rule:
        return TopK(self.k)

    def apply(
        self,
        model: nn.Module,
        data: Any = None,
        *,
        keep_error: bool = False,
        progress: Progress | None = None,
    ) -> "EmbeddingModel":
        """Fit a dictionary and splice it in, so that what embeddings leave out can be measured.

        Parameters
        ----------
        keep_error : add back what the dictionary misses, so that the model is unchanged.
        """
        source = self.source(model, data)
        method, made = self._fit(model, source, progress)
        score = score_rows(made, source.head(_SCORED_ROWS))
        made.metadata["score"] = vars(score)
        assert method.hook is not None
        return EmbeddingModel(method, model, made, method.hook, score, keep_error=keep_error)

    def reattach(
        self, model: nn.Module, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> "EmbeddingModel":
        """Splice in a stored dictionary again."""
        made = Dictionary.from_tensors(meta["config"], tensors).eval().requires_grad_(False)
        made.to(next(model.parameters()).device)
        score = DictionaryScore(**meta["score"])
        keep = meta["keep_error"]
        return EmbeddingModel(self, model, made, meta["hook"], score, keep_error=keep)


class EmbeddingModel(SplicedModel):
    """A dictionary at work in a model, and what embeds documents with it."""

    def embed(
        self,
        data: Any,
        *,
        exclude: Sequence[int] = (),
        names: Sequence[str] = (),
        words: Sequence[str] | None = None,
    ) -> Embeddings:
        """Documents, the windows of the data, as sparse vectors.

        The splice does not change them: the module's own output is what is encoded.

        Parameters
        ----------
        data : as for :func:`gossamer.models.as_tokens`; a window is a document.
        exclude : token ids that do not count. names : of the documents.
        words : of the vocabulary, by token id; labels every latent by the tokens it speaks on.
        """
        method = self.method
        assert isinstance(method, SAEEmbeddings)
        tokens = as_tokens(data, self.model, seed=method.seed)
        self._splice.remove()
        try:
            made = embed(
                self.model, self.dictionary, self.hook, tokens,
                pooling=method.pooling, share=method.share, exclude=exclude, names=names,
            )  # fmt: skip
            if words is None:
                return made
            where = self.model, self.dictionary, self.hook
            return made.labelled(token_labels(*where, tokens, words))
        finally:
            self._respliced()

    def _respliced(self) -> None:
        from gossamer.methods.features.splicing import Splice

        self._splice = Splice(self.model, self.hook, self.dictionary, keep_error=self.keep_error)

    def report(self) -> Report:
        base = super().report()
        told = "embed(documents) gives their embeddings; analyse them with features.embeddings"
        return Report(
            base.method, base.rows, base.unit, base.all_size, base.simulated, (*base.notes, told)
        )
