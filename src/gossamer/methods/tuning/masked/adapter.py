"""An adapter whose frozen matrix is updated at low rank and pruned by a learned score."""

import torch
from torch import Tensor, nn

from gossamer.core import NM, Budget, GossamerError, Pattern, Selection, Unstructured, kept_count
from gossamer.methods.tuning.masked.linear import Scales, Scores, masked_linear, scores, updated
from gossamer.methods.tuning.tuner.adapter import Adapter

__all__ = ["Masked", "quota"]


def quota(shape: tuple[int, int], pattern: Pattern, sparsity: float) -> tuple[Pattern, Budget]:
    """The pattern and budget of one matrix at a sparsity; no group of it is emptied."""
    if isinstance(pattern, NM):
        keep = min(max(round((1.0 - sparsity) * pattern.of), 1), pattern.of)
        return NM(keep, pattern.of), Budget(keep=keep)
    group = shape[1] if pattern == Unstructured("row") else shape[0] * shape[1]
    return pattern, Budget(keep=max(kept_count(group, sparsity), 1))


class Masked(Adapter):
    """M ∘ (W + β U V) with M the largest of |W + β U V| + α₁ A B + α₂ (R 1ᵀ + 1 Cᵀ).

    U and A start as standard normal noise, all else at zero: the matrix is W, its score |W|, and
    the mask keeps everything.

    Parameters
    ----------
    weight : the frozen (O, I) matrix. name : of its site, for errors.
    rank, score_rank : of U V and of A B. generator : of the noise.
    """

    mask: Tensor

    def __init__(
        self,
        weight: Tensor,
        name: str,
        *,
        rank: int,
        score_rank: int,
        scales: Scales,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.name = name
        self.scales = scales
        out, into = weight.shape
        place = {"device": weight.device, "dtype": torch.float32}

        def noise(rank: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(out, rank, generator=generator).to(**place))

        def zeros(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(*shape, **place))

        self.u, self.v = noise(rank), zeros(rank, into)
        # A part whose factor is 0 would never learn: it is not there, and not counted.
        scored, lined = scales.alpha1 != 0, scales.alpha2 != 0
        self.a = noise(score_rank) if scored else None
        self.b = zeros(score_rank, into) if scored else None
        self.row = zeros(out) if lined else None
        self.column = zeros(into) if lined else None
        mask = torch.ones(out, into, dtype=torch.bool, device=weight.device)
        # Stored by the tuner at one bit an entry, not in the model's state dict at eight.
        self.register_buffer("mask", mask, persistent=False)

    @property
    def parts(self) -> Scores:
        """The learned parts of the score."""
        return Scores(self.a, self.b, self.row, self.column)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(M ∘ (W + β U V)) x + bias."""
        return masked_linear(x, weight, bias, self.mask, self.u, self.v, self.parts, self.scales)

    @torch.no_grad()
    def folded(self, weight: Tensor) -> Tensor:
        """M ∘ (W + β U V)."""
        whole = updated(weight, self.u, self.v, self.scales.beta).mul_(self.mask)
        # Products of negative numbers with 0 are -0; as sums with 0 they are 0.
        return whole.add_(0.0).to(weight.dtype)

    @torch.no_grad()
    def choose(self, weight: Tensor, pattern: Pattern, sparsity: float) -> None:
        """Choose the mask anew.

        Raises
        ------
        GossamerError
            If a score is NaN; the message names the site.
        """
        score = scores(weight, self.u, self.v, self.parts, self.scales)
        pattern, budget = quota((weight.shape[0], weight.shape[1]), pattern, sparsity)
        try:
            self.mask.copy_(pattern.select(score, budget).mask())
        except GossamerError as error:
            raise GossamerError(f"{self.name}: {error}") from None

    @property
    def selection(self) -> Selection:
        """What the mask keeps."""
        return Selection.from_mask(self.mask)
