"""Errors a user can act on: each names the value, the limit and the cure.

Our own invariants use ``assert``; everything a user can cause is a ``ValueError``.
"""

from difflib import get_close_matches

__all__ = ["GossamerError", "UnsupportedModel", "nearest", "unknown"]


class GossamerError(ValueError):
    """A user's input is outside what a method, model or file allows."""


class UnsupportedModel(GossamerError):  # noqa: N818
    """The model's modules match no architecture whose sites are known."""


def nearest(name: str, known: list[str] | tuple[str, ...], count: int = 3) -> list[str]:
    """The known names closest to a misspelt one, best first."""
    return get_close_matches(name, known, n=count, cutoff=0.5)


def unknown(kind: str, name: object, known: list[str] | tuple[str, ...]) -> GossamerError:
    """The error for a name that is not among the known ones, offering the nearest."""
    close = nearest(str(name), tuple(known))
    hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(known)}"
    return GossamerError(f"unknown {kind} {name!r}; {hint}")
