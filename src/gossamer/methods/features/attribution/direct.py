"""Direct feature attribution: a latent's pre-activation as a sum over heads and source tokens.

With attention held as it was, a head's output is a weighted sum of values, and a latent reads it
linearly. The sum is therefore exact, and every call checks that it is.
Shapes: N = questions, H = heads, S = sources, E = width of a head, M = latents.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.core import GossamerError
from gossamer.methods.features.attribution.view import AttentionView, tolerance
from gossamer.methods.features.autoencoder import Dictionary

__all__ = [
    "Attribution",
    "attribute",
    "check_sum",
    "constants",
    "direct",
    "head_shares",
    "readers",
]


@dataclass(frozen=True)
class Attribution:
    """Where pre-activations come from.

    Parameters
    ----------
    parts : (N, H, S), from each head and source.
    constant : (N,), what biases add. pre_activation : (N,); the parts and the constant sum to it.
    """

    parts: Tensor
    constant: Tensor
    pre_activation: Tensor

    @property
    def by_source(self) -> Tensor:
        """(N, S)."""
        return self.parts.sum(1)

    @property
    def by_head(self) -> Tensor:
        """(N, H)."""
        return self.parts.sum(2)

    @property
    def error(self) -> Tensor:
        """(N,), what is missing from the sum; rounding alone."""
        return self.parts.sum((1, 2)) + self.constant - self.pre_activation


def check_sum(parts: Tensor, wanted: Tensor, what: str, dtype: torch.dtype) -> None:
    """Refuse parts (N, P) that do not sum to what they claim to explain (N,).

    The difference may be rounding of the dtype, relative to the summed sizes of the parts.

    Raises
    ------
    GossamerError
        Otherwise.
    """
    parts, wanted = parts.double(), wanted.double()
    missing = (parts.sum(1) - wanted).abs()
    size = parts.abs().sum(1).clamp_min(1e-30)
    bad = ~(missing <= tolerance(dtype) * size)
    if bool(bad.any()):
        at = int(bad.float().argmax())
        raise GossamerError(
            f"parts of {what} sum to {float(parts[at].sum()):.6g}, not to {float(wanted[at]):.6g}; "
            "the model computes it in another way than attribution assumes"
        )


def constants(made: Dictionary) -> Tensor:
    """What a latent's pre-activation is where the rows are zero, (M,)."""
    zero = made.b_enc.detach()
    return zero if made.transcoder else zero - made.b_dec.detach() @ made.W_enc.detach()


def readers(made: Dictionary, latents: Tensor, heads: int) -> Tensor:
    """The directions in which latents read every head's output: (N, H, E)."""
    if bool(((latents < 0) | (latents >= made.d_sae)).any()):
        raise GossamerError(f"latents run from 0 to {made.d_sae - 1}; got {latents.tolist()[:5]}")
    return made.W_enc.detach()[:, latents].T.unflatten(1, (heads, -1))


@torch.no_grad()
def attribute(view: AttentionView, reading: Tensor, rows: Tensor, at: Tensor) -> Tensor:
    """What each head and source adds to linear readings of a block's mixed values: (N, H, S).

    The reading is applied to the values first, so that nothing of size S E is made per
    destination.

    Parameters
    ----------
    reading : (N, H, E). rows, at : int64 (N,), window and destination of each reading.

    Raises
    ------
    GossamerError
        If the parts do not sum to the reading of what the heads handed over.
    """
    windows, heads, length = view.maps.shape[0], view.maps.shape[1], view.maps.shape[2]
    if len(rows) and not (
        0 <= int(rows.min()) <= int(rows.max()) < windows
        and 0 <= int(at.min()) <= int(at.max()) < length
    ):
        raise GossamerError(
            f"a window or destination lies outside the {windows} windows of {length} tokens"
        )
    by_group = reading.unflatten(1, (heads // view.group, view.group)).to(view.values)
    heard = torch.einsum("ngse,nghe->nghs", view.values[rows], by_group).flatten(1, 2)
    parts = heard * view.maps[rows, :, at]
    wanted = (view.mixed[rows, at] * reading.to(view.mixed)).sum((1, 2))
    check_sum(parts.flatten(1), wanted, "a reading", view.mixed.dtype)
    return parts


@torch.no_grad()
def direct(
    view: AttentionView, made: Dictionary, latents: Tensor, rows: Tensor, at: Tensor
) -> Attribution:
    """Attribute latents of an attention-output dictionary at destinations.

    Parameters
    ----------
    view : of the dictionary's block. latents, rows, at : int64 (N,), which latent, in which
        window, at which token.

    Raises
    ------
    GossamerError
        If the dictionary reads another width than the heads hand over, or the sum is not exact.
    """
    if not latents.shape == rows.shape == at.shape == (len(latents),):
        raise GossamerError(
            f"{len(latents)} latents, {len(rows)} windows and {len(at)} destinations; give one "
            "window and one destination for each latent"
        )
    heads, width = view.mixed.shape[2:]
    if made.d_in != heads * width:
        raise GossamerError(
            f"the dictionary reads {made.d_in} channels; {heads} heads of {width} hand over "
            f"{heads * width}: fit it on the input of the output projection"
        )
    parts = attribute(view, readers(made, latents, heads), rows, at)
    constant = constants(made)[latents].to(parts)
    given = view.mixed[rows, at].flatten(1).to(made.W_enc.dtype)
    pre = made.pre_activations(given).gather(1, latents[:, None])[:, 0].to(parts)
    whole = torch.cat([parts.flatten(1), constant[:, None]], 1)
    check_sum(whole, pre, "a latent's pre-activation", view.mixed.dtype)
    return Attribution(parts, constant, pre)


@torch.no_grad()
def head_shares(made: Dictionary, heads: int) -> Tensor:
    """How much of each latent's atom lies in each head's slice: (M, H), rows sum to 1."""
    norms = made.W_dec.unflatten(1, (heads, -1)).norm(dim=2)
    return norms / norms.sum(1, keepdim=True).clamp_min(1e-30)
