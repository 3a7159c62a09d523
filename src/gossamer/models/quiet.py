"""Quiet: transformers says nothing while it loads or saves; the user gets our own lines."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging as verbosity

__all__ = ["quiet"]


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from printing; its settings are put back."""
    level, bars = verbosity.get_verbosity(), verbosity.is_progress_bar_enabled()
    try:
        verbosity.set_verbosity(verbosity.CRITICAL)
        verbosity.disable_progress_bar()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        verbosity.set_verbosity(level)
        if bars:
            verbosity.enable_progress_bar()
