"""FAST: every dialogue is read alone, in its own template.

Instruction models see one conversation at a time. Block training joins conversations and cuts
them anywhere, so tokens attend to strangers' text; the activations a dictionary then learns are
not those it will meet.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

from torch import nn

from gossamer.core import Card, GossamerError, check_count, unknown
from gossamer.methods.features.base import DictionaryMethod
from gossamer.methods.features.packing import Packed, chat_documents, pack, special_ids
from gossamer.methods.features.rules import JumpReLU, ReLU, Rule
from gossamer.methods.features.training import Recipe
from gossamer.models import Inputs, Tokens, as_tokens, context_length, read_documents
from gossamer.models.loading import find_tokenizer

__all__ = ["FastSAE"]

_L1, _TARGET = 5.0, 10.0


@dataclass(frozen=True, kw_only=True)
class FastSAE(DictionaryMethod):
    """Learn a dictionary from conversations that do not see one another.

    The data are conversations (lists of messages with ``role`` and ``content``, rendered by the
    model's chat template), texts, a file of texts, or windows of tokens, each a sample of its
    own. Special tokens are kept: at template tokens instruction models keep what steers them.

    Parameters
    ----------
    packing : None or ``none``: a window for every sample. ``varlen``: several in one, attention and
        positions apart: the same activations in fewer windows. ``concat``: block training, the
        baseline, in which samples are joined, see one another and are cut anywhere.
    length : most tokens of a sample; what is beyond is cut off.
    special_tokens : ``keep`` them as rows, or ``mask`` them: computed and seen, but no rows.
    code : ``jumprelu`` with a target of ``target_l0`` latents, or ``relu`` with an L1 penalty.
    coefficient : weight of the penalty; None: 10 for JumpReLU, 5 for ReLU.
    target_l0 : mean number of latents of a token that JumpReLU steers to.

    Source: arXiv 2506.07691, §3. Departs from the paper: samples are shuffled as rows, kept
    in memory where they fit, instead of in a half-refilled buffer; JumpReLU steers to a target
    count.
    """

    card: ClassVar[Card] = Card(
        title="Training Superior Sparse Autoencoders for Instruct Models",
        year=2025,
        arxiv="2506.07691",
        system="fast_sae",
        family="features",
        when="after training",
        start="dense",
        masks="dynamic",
        site="output of any module, conversations apart",
        score="pre-activation of a latent",
        pattern="unstructured per token",
        budget="emergent: a penalty on the codes",
        schedule="penalty rises over the first 5 % of the run",
        update="learned dictionary",
        kernel="sparse_code",
        departs="rows are shuffled in memory where they fit; JumpReLU steers to a target count",
    )

    example: ClassVar[Mapping[str, Any]] = {"target_l0": 8.0}

    packing: Literal["none", "concat", "varlen"] | None = None
    length: int = 1024
    special_tokens: Literal["keep", "mask"] = "keep"
    code: Literal["jumprelu", "relu"] = "jumprelu"
    coefficient: float | None = None
    target_l0: float = 32.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("length", self.length, 2)
        if self.packing == "none":
            object.__setattr__(self, "packing", None)
        for name, known in (
            ("packing", (None, "concat", "varlen")),
            ("special_tokens", ("keep", "mask")),
            ("code", ("jumprelu", "relu")),
        ):
            if getattr(self, name) not in known:
                words = tuple(str(word).lower() for word in known)
                raise unknown(name, str(getattr(self, name)), words)
        if not 0 < self.target_l0 < float("inf"):
            raise GossamerError(f"target_l0 is {self.target_l0!r}; give a number above 0")
        self._rule(self.width or max(1, round(self.target_l0)))

    def _rule(self, width: int) -> Rule:
        if self.code == "relu":
            return ReLU(_L1 if self.coefficient is None else self.coefficient, self.warmup_rows)
        return JumpReLU(
            width,
            target=min(self.target_l0, width),
            coefficient=_TARGET if self.coefficient is None else self.coefficient,
            bandwidth=0.2,
            warmup=self.warmup_rows,
        )

    def rule(self) -> Rule:
        assert self.width is not None
        return self._rule(self.width)

    def recipe(self, steps: int, batch_size: int) -> Recipe:
        return replace(super().recipe(steps, batch_size), aux_k=0)

    def prepared(self, model: nn.Module, data: Any) -> Packed | Inputs:
        """The samples packed; ready-made inputs, such as images, are taken as they are."""
        if isinstance(data, Inputs):
            return data
        samples, special = self._samples(model, data)
        limit = context_length(model)
        length = self.length if limit is None else min(self.length, limit)
        return pack(
            [sample[:length] for sample in samples],
            length=length,
            packing=self.packing or "none",
            special=special if self.special_tokens == "mask" else (),
        )

    def _samples(self, model: nn.Module, data: Any) -> tuple[list[list[int]], tuple[int, ...]]:
        """Token ids of every sample, and the tokenizer's special ids where they are known."""
        texts = data is None or isinstance(data, str | Path) or _of(data, str)
        if not texts and not _of(data, Sequence):
            tokens: Tokens = as_tokens(data, model, seed=self.seed)
            if self.special_tokens == "mask":
                raise GossamerError(
                    "which ids of ready-made tokens are special is not known; give texts or "
                    "conversations, or special_tokens='keep'"
                )
            pairs = zip(tokens.input_ids, tokens.attention_mask, strict=True)
            return [ids[real].tolist() for ids, real in pairs], ()
        tokenizer = find_tokenizer(model)
        if not texts:
            conversations = cast(Sequence[Sequence[dict[str, str]]], data)
            return chat_documents(tokenizer, conversations), special_ids(tokenizer)
        listed = cast(list[str], data) if _of(data, str) else None
        documents = read_documents(data, "calibration") if listed is None else list(listed)
        return tokenizer(documents, verbose=False)["input_ids"], special_ids(tokenizer)


def _of(data: Any, kind: type) -> bool:
    """Whether the data is a list of this kind, and not empty."""
    many = isinstance(data, Sequence) and not isinstance(data, str) and len(data) > 0
    return many and all(isinstance(item, kind) for item in data)
