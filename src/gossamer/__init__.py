"""gossamer: neural networks made sparse.

>>> import gossamer
>>> model, tokenizer = gossamer.load("nano")
>>> applied = gossamer.Wanda(sparsity=0.5, pattern="2:4").apply(model)
>>> print(applied.report())  # doctest: +SKIP
>>> applied.restore()

Names load lazily; every method's class is here by name: ``gossamer.Wanda``, ``gossamer.TEAL``.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gossamer.core import Budget, GossamerError, Pattern, Selection
    from gossamer.evaluate import score, speed
    from gossamer.execute import accelerate
    from gossamer.methods.training.scaling.law import fit_scaling_law
    from gossamer.methods.training.scaling.parameters import average_parameters
    from gossamer.models import Tokens, find_sites
    from gossamer.recipes.compare import compare
    from gossamer.recipes.recipe import Recipe, load

__version__ = version("gossamer")

_PUBLIC = {
    "Budget": "gossamer.core",
    "GossamerError": "gossamer.core",
    "Pattern": "gossamer.core",
    "Recipe": "gossamer.recipes.recipe",
    "Selection": "gossamer.core",
    "Tokens": "gossamer.models",
    "accelerate": "gossamer.execute",
    "average_parameters": "gossamer.methods.training.scaling.parameters",
    "compare": "gossamer.recipes.compare",
    "find_sites": "gossamer.models",
    "fit_scaling_law": "gossamer.methods.training.scaling.law",
    "load": "gossamer.recipes.recipe",
    "score": "gossamer.evaluate",
    "speed": "gossamer.evaluate",
}

__all__ = [
    "Budget",
    "GossamerError",
    "Pattern",
    "Recipe",
    "Selection",
    "Tokens",
    "__version__",
    "accelerate",
    "average_parameters",
    "compare",
    "find_sites",
    "fit_scaling_law",
    "load",
    "method",
    "score",
    "speed",
]


def method(text: str, **values: Any) -> Any:
    """A method by key: ``method("wanda", sparsity=0.5)`` or ``method("wanda:pattern=2:4")``.

    Raises
    ------
    GossamerError
        For an unknown method or field (offering the nearest), or a value out of range.
    """
    from gossamer.methods import make, split_text, text_fields

    key, *parts = split_text(text)
    return make(key, **{**text_fields(parts), **values})


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    if not name.startswith("_"):
        from gossamer.methods import by_class_name

        if (found := by_class_name(name)) is not None:
            return found
    raise AttributeError(f"module 'gossamer' has no attribute {name!r}")


def __dir__() -> list[str]:
    from gossamer.methods import get, keys

    return sorted([*__all__, *(get(key).__name__ for key in keys())])
