"""Denoising steps: which one a forward pass is, told to whoever wants to know.

Samplers of masked-diffusion models call a model once a step and tell it nothing. A sparse
attention that acts by step needs the number, and a place to keep what one generation decided.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from gossamer.core import check_count

__all__ = ["Denoising", "denoising", "now"]


@dataclass(eq=False)
class Denoising:
    """One generation under way.

    Parameters
    ----------
    prompt : tokens of the prompt, at the front. steps : denoising steps in all, >= 1.

    Attributes
    ----------
    step : the step of the next forward pass, counted from 1; whoever runs it counts it up.
    memo : what was decided for this generation, by owner; gone when it ends.
    """

    prompt: int
    steps: int
    step: int = 1
    memo: dict[Any, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        check_count("prompt", self.prompt, 0)
        check_count("steps", self.steps, 1)


_NOW: ContextVar[Denoising | None] = ContextVar("gossamer_denoising", default=None)


def now() -> Denoising | None:
    """The generation under way, or None."""
    return _NOW.get()


@contextmanager
def denoising(*, prompt: int, steps: int) -> Iterator[Denoising]:
    """Say that the forward passes inside are the steps of one generation.

    :func:`gossamer.methods.attention.diffusion.sampler.sample` says it itself; put this around
    another sampler, such as LLaDA's ``generate``.

    Parameters
    ----------
    prompt : tokens of the prompt. steps : forward passes the sampler will make.
    """
    token = _NOW.set(Denoising(prompt, steps))
    try:
        current = _NOW.get()
        assert current is not None
        yield current
    finally:
        _NOW.reset(token)
