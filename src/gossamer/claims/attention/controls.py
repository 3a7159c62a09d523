"""What the claims of ceilings and floors share: mass kept on the packaged model at one density."""

from gossamer.claims.base import Figures
from gossamer.claims.lm import heldout, nano
from gossamer.methods.attention.base import AttentionMethod
from gossamer.models import Tokens

__all__ = ["LENGTH", "kept", "window_of"]

LENGTH = 256


def window_of(seed: int) -> Tokens:
    """One held-out window of 256 tokens."""
    tokens = heldout(3, LENGTH)
    return Tokens(tokens.input_ids[seed % 3][None], tokens.attention_mask[seed % 3][None])


def kept(method: AttentionMethod, seed: int) -> Figures:
    """Density and mass of a method over all layers, weighted by pairs."""
    with method.apply(nano().model) as work:
        rows = [row for row in work.measure(window_of(seed), decode=0) if row.phase == "prefill"]
    total = sum(row.total for row in rows)
    return {
        "density": sum(row.kept for row in rows) / total,
        "mass": sum(row.mass * row.total for row in rows) / total,
    }
