"""Coding rates: how many bits the tokens of a sample need, alone and inside subspaces.

Shapes: B samples, N tokens, d width, H heads, p = d / H.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.methods.activations.crate_blocks.block import MSSA, CRATEBlock
from gossamer.models import Inputs, Tokens
from gossamer.models.capture import evaluating

__all__ = ["LayerRates", "coding_rate", "compressed_rate", "measure_rates"]

EPSILON = 0.5


@dataclass(frozen=True)
class LayerRates:
    """What one block does to the tokens, averaged over samples.

    Parameters
    ----------
    nonzero : share of non-zero entries behind ISTA.
    rate : R of the tokens behind ISTA, in nats.
    compressed : Rᶜ of the tokens behind the compression step Z', in the block's subspaces.
    """

    nonzero: float
    rate: float
    compressed: float


def coding_rate(tokens: Tensor, epsilon: float = EPSILON) -> Tensor:
    """R(Z) = ½ logdet(I + d / (N ε²) ZᵀZ) of every sample, in nats.

    Parameters
    ----------
    tokens : (..., N, d). epsilon : coding precision, above 0.

    Returns
    -------
    (...), at least 0.

    Source: arXiv 2311.13110, eq. 3.
    """
    wide = tokens.double()
    count, width = wide.shape[-2:]
    # Both Gram matrices have the same determinant here; the smaller one is cheaper.
    gram = wide @ wide.mT if count < width else wide.mT @ wide
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return 0.5 * torch.logdet(eye + width / (count * epsilon**2) * gram)


def compressed_rate(tokens: Tensor, subspaces: MSSA, epsilon: float = EPSILON) -> Tensor:
    """Rᶜ(Z | U) = ½ Σ_k logdet(I + p / (N ε²) (U_kᵀZ)ᵀ(U_kᵀZ)) of every sample, in nats.

    Parameters
    ----------
    tokens : (B, N, d). subspaces : holds the bases U_k.

    Source: arXiv 2311.13110, eq. 8.
    """
    return coding_rate(subspaces.split(tokens), epsilon).sum(-1)


@torch.no_grad()
def measure_rates(
    model: nn.Module,
    blocks: Mapping[str, CRATEBlock],
    data: Tokens | Inputs,
    *,
    epsilon: float = EPSILON,
    batch_size: int = 32,
) -> dict[str, LayerRates]:
    """Rates and non-zero share of every block over some data; padding counts as tokens.

    Parameters
    ----------
    blocks : by path, in their order.
    """
    sums = {name: torch.zeros(3, dtype=torch.float64) for name in blocks}
    seen = dict.fromkeys(blocks, 0)

    def behind(name: str, block: CRATEBlock) -> Any:
        def look(module: nn.Module, args: Any, output: Tensor) -> None:
            nonzero = (output != 0).double().mean((1, 2)).sum()
            rate = coding_rate(output, epsilon).sum()
            sums[name][:2] += torch.stack([nonzero, rate]).cpu()
            seen[name] += len(output)

        return block.register_forward_hook(look)

    def between(name: str, block: CRATEBlock) -> Any:
        def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            sums[name][2] += compressed_rate(args[0], block.compress, epsilon).sum().cpu()

        return block.sparsify_norm.register_forward_pre_hook(look)

    names = signature(model.forward).parameters
    device = next(model.parameters()).device
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        for name, block in blocks.items():
            stack.callback(behind(name, block).remove)
            stack.callback(between(name, block).remove)
        for batch in data.batches(batch_size, device):
            model(**{k: v for k, v in batch.items() if k in names and k != "labels"})
    return {name: LayerRates(*(sums[name] / max(1, seen[name])).tolist()) for name in blocks}
