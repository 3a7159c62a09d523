"""templates: tasks whose truth is known, and a tiny model that solves them, shipped inside.

Analyses of a model's insides claim to find what it uses. Here what there is to find is written
down: every example of a task carries its attributes, its right answers and a corrupted twin. The
packaged model (0.2 million parameters, four layers) is trained on exactly these sentences by
``python -m gossamer.models.templates.train``.
"""

from pathlib import Path
from typing import Any

from gossamer.models.templates.tasks import TASKS, Examples, batch, encode, vocabulary, words

__all__ = ["TASKS", "Examples", "batch", "encode", "load", "path", "vocabulary", "words"]


def path() -> Path:
    """Folder of the packaged model, ready for ``from_pretrained``."""
    return Path(__file__).resolve().parent / "weights"


def load() -> Any:
    """A new copy of the packaged model, float32, on the CPU, in evaluation mode."""
    from gossamer.models.loading import load_model

    return load_model(path(), dtype="float32").model
