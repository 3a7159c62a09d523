"""GraSP: better than random, and what shuffling, new weights and inverting do to it."""

from gossamer.claims.training.at_start import loss_on_images, score_claims
from gossamer.methods.training.grasp import GraSP

__all__ = ["CLAIMS"]

CLAIMS = score_claims(
    GraSP, loss_on_images, "above SNIP at 95 and 98 % on CIFAR and Tiny-ImageNet (from memory)"
)
