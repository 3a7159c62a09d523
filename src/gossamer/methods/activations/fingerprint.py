"""Fingerprint: tells whether thresholds belong to the model at hand, at the cost of a few weights.

Shapes alone would let a plan slip onto another training of the same architecture, where its
thresholds are silently wrong. A few values of every parameter tell two trainings, another scale
or other embeddings apart; what changes none of the values looked at is not noticed.
"""

import hashlib

import torch
from torch import Tensor, nn

from gossamer.core import GossamerError
from gossamer.models import SiteMap

__all__ = ["check_fingerprint", "fingerprint"]

SAMPLES = 64


def fingerprint(model: nn.Module, sites: SiteMap) -> str:
    """16 hexadecimal digits from names, shapes and at most 64 values of every parameter.

    Covered are the matrices of the blocks (every expert's), embeddings, norms, biases and an
    untied head. Values count as bfloat16 has them, so casts between bfloat16 and float32, and of
    bfloat16 values to float16, keep the fingerprint; float32 values cast to float16 round twice
    and may change it.
    """
    digest = hashlib.sha256()
    for site in sites.sites:
        weight = site.weight(model)
        rows, columns = weight.shape
        # Spread over both axes without flattening: a transposed view would be copied.
        at = torch.arange(SAMPLES)
        picked = weight[(at * rows // SAMPLES) % rows, (at * 31) % columns]
        digest.update(f"{site.name} {rows} {columns} ".encode())
        digest.update(_bytes(picked))
    matrices = {id(getattr(site.owner(model), site.parameter)) for site in sites.sites}
    for name, parameter in model.named_parameters():
        if id(parameter) not in matrices and parameter.numel():
            digest.update(f"{name} {tuple(parameter.shape)} ".encode())
            at = torch.arange(SAMPLES) * parameter.numel() // SAMPLES
            digest.update(_bytes(parameter.detach().take(at.to(parameter.device))))
    return digest.hexdigest()[:16]


def _bytes(values: Tensor) -> bytes:
    """Values rounded to bfloat16; minus zero as zero, for masks leave either."""
    rounded = values.detach().to(torch.bfloat16).cpu() + 0.0
    return bytes(rounded.contiguous().view(torch.uint8).tolist())


def check_fingerprint(stored: str | None, model: nn.Module, sites: SiteMap) -> None:
    """Refuse a plan that was made on other weights; plans without a fingerprint pass.

    Raises
    ------
    GossamerError
        Naming both fingerprints.
    """
    if stored is not None and stored != (found := fingerprint(model, sites)):
        raise GossamerError(
            f"the saved thresholds belong to a model with hash {stored}, this one has {found}; "
            "use the model they were calibrated on, or calibrate again"
        )
