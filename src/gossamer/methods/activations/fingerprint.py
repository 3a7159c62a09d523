"""Fingerprint: tells whether thresholds belong to the model at hand, at the cost of a few weights.

Shapes alone would let a plan slip onto another training of the same architecture, where its
thresholds are silently wrong. The signs of some weights are the same in every dtype a model is
loaded in, and differ between any two trainings.
"""

import hashlib

import torch
from torch import nn

from gossamer.core import GossamerError
from gossamer.models import SiteMap

__all__ = ["check_fingerprint", "fingerprint"]

SAMPLES = 64


def fingerprint(model: nn.Module, sites: SiteMap) -> str:
    """16 hexadecimal digits from the names, shapes and 64 signs of every matrix of the blocks."""
    digest = hashlib.sha256()
    for site in sites.sites:
        weight = site.weight(model)
        rows, columns = weight.shape
        # Spread over both axes without flattening: a transposed view would be copied.
        at = torch.arange(SAMPLES)
        picked = weight[(at * rows // SAMPLES) % rows, (at * 31) % columns] > 0
        digest.update(f"{site.name} {rows} {columns} ".encode())
        digest.update(bytes(picked.cpu().tolist()))
    return digest.hexdigest()[:16]


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
