"""Gradient pursuit: better codes for the same atoms, found one atom at a time.

An encoder says at once which atoms speak. Pursuit adds the atom that the error points to most,
then moves all chosen values along the gradient, and so on until the row has its number of atoms.
Shapes: R = rows, D = width, M = latents, K = most atoms of a row.
"""

import torch
from torch import Tensor

from gossamer.core import GossamerError, SparseRows
from gossamer.methods.features.autoencoder import Dictionary

__all__ = ["pursue"]

_GRAM = 1 << 13


@torch.no_grad()
def pursue(made: Dictionary, x: Tensor, counts: Tensor | int) -> SparseRows:
    """Codes of rows by gradient pursuit with a dictionary's atoms.

    At each step r = x - b_dec - W_decᵀ z; the atom with the largest d_i · r joins the support S;
    g = (W_dec r) on S, c = W_decᵀ g, and z becomes max(0, z + g <c, r> / <c, c>). Up to 8192
    latents all inner products of atoms are made once, and a step costs K M a row instead of D M.

    Parameters
    ----------
    x : (R, D). counts : int64 (R,), or one number for all rows: how many steps a row takes, as
        many as the encoder keeps latents, to compare at equal sparsity.

    Returns
    -------
    Padded rows (R, M); values are not negative, and a row has at most its count.

    Raises
    ------
    GossamerError
        For a transcoder, a count below 0 or above M, or NaN in x.
    """
    if made.transcoder:
        raise GossamerError(
            "a transcoder's atoms do not make up what it reads; give an autoencoder"
        )
    if bool(x.isnan().any()):
        raise GossamerError("activations hold NaN; load the model in float32")
    counts = torch.as_tensor(counts, device=x.device).expand(len(x))
    most = int(counts.max()) if len(counts) else 0
    if len(counts) and not 0 <= int(counts.min()) <= most <= made.d_sae:
        raise GossamerError(
            f"counts run from {int(counts.min())} to {most}; a code of {made.d_sae} latents keeps "
            f"0 to {made.d_sae}"
        )
    atoms = made.W_dec
    goal = (x - made.b_dec).to(atoms.dtype) @ atoms.T
    gram = atoms @ atoms.T if made.d_sae <= _GRAM else None
    support = x.new_full((len(x), most), -1, dtype=torch.int64)
    values = goal.new_zeros(len(x), most)
    for step in range(most):
        at = support[:, :step].clamp_min(0)
        pull = goal - _spread(values[:, :step], at, atoms, gram)
        # An atom joins once: those already chosen are out of the running.
        best = pull.scatter(1, at, -torch.inf) if step else pull
        on = step < counts
        support[:, step] = torch.where(on, best.argmax(1), -1)
        chosen = support[:, : step + 1]
        real = (chosen >= 0) & on[:, None]
        gradient = pull.gather(1, chosen.clamp_min(0)) * real
        # <c, r> = |g|²: g holds the very products d_i · r of the support.
        along = gradient.square().sum(1)
        moved = _spread(gradient, chosen.clamp_min(0), atoms, gram)
        across = (moved.gather(1, chosen.clamp_min(0)) * gradient).sum(1)
        rate = torch.where(across > 0, along / across.clamp_min(1e-30), 0.0)
        values[:, : step + 1] = (values[:, : step + 1] + rate[:, None] * gradient).clamp_min(0)
    support = support.masked_fill(values <= 0, -1)
    return SparseRows(values, support, (len(x), made.d_sae))


def _spread(values: Tensor, at: Tensor, atoms: Tensor, gram: Tensor | None) -> Tensor:
    """Inner products of every atom with sum_j values_j atoms[at_j]: (R, M)."""
    dense = values.new_zeros(len(values), len(atoms)).scatter_add(1, at, values)
    return dense @ gram if gram is not None else dense @ atoms @ atoms.T
