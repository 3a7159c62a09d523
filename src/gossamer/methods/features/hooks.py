"""Hooks: read a module's input or output in a forward pass that ends there, or replace it.

Plain forward hooks on any module of a transformers model; none outlives the call that set it.
Shapes: B = windows of a batch, T = tokens, D = width of the module's output.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core import GossamerError, nearest

__all__ = [
    "find_module",
    "hidden_of",
    "input_of",
    "record",
    "split_path",
    "with_hidden",
    "with_input",
]


class _Recorded(Exception):  # noqa: N818 - a signal, not an error
    """Ends a forward pass once every wanted module has spoken."""


def find_module(model: nn.Module, path: str) -> nn.Module:
    """The submodule at a dotted path.

    Raises
    ------
    GossamerError
        For an unknown path, offering the nearest ones.
    """
    modules = dict(model.named_modules())
    if path and path in modules:
        return modules[path]
    paths = [name for name in modules if name]
    # Deep paths are alike in their last part, so a wrong prefix is looked up by the tail too.
    tail = path.rpartition(".")[2]
    close = nearest(path, paths) or [name for name in paths if tail and name.endswith(tail)][:3]
    top = ", ".join(name for name, _ in model.named_children())
    hint = f"did you mean {' or '.join(close)}?" if close else f"it holds {top}"
    raise GossamerError(f"no module {path!r} in {type(model).__name__}; {hint}")


def hidden_of(output: Any, path: str) -> Tensor:
    """The activations in a module's output: the tensor itself, or the first of a tuple.

    Raises
    ------
    GossamerError
        If the output is neither, or not floating point.
    """
    first = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(first, Tensor) or not first.is_floating_point() or first.dim() < 2:
        raise GossamerError(
            f"module {path!r} returns {type(output).__name__}, not activations; hook a block, an "
            "attention, an MLP or a linear layer"
        )
    return first


def with_hidden(output: Any, hidden: Tensor) -> Any:
    """A module's output with its activations replaced, in the form it had."""
    if isinstance(output, Tensor):
        return hidden
    return type(output)([hidden, *output[1:]])


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout inside the block; every module's own mode comes back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def split_path(path: str) -> tuple[str, bool]:
    """A module's path, and whether ``:in`` behind it asks for its input."""
    return path.removesuffix(":in"), path.endswith(":in")


def input_of(args: Any, kwargs: Mapping[str, Any], path: str) -> Tensor:
    """The activations a module is called with: its first argument, or ``hidden_states``."""
    first = args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values()), None))
    return hidden_of(first, path)


def with_input(args: Any, kwargs: Mapping[str, Any], hidden: Tensor) -> tuple[Any, Any]:
    """A module's arguments with the activations it is called with replaced."""
    if args:
        return (hidden, *args[1:]), kwargs
    name = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))
    return args, {**kwargs, name: hidden}


@torch.no_grad()
def record(model: nn.Module, paths: tuple[str, ...], batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Activations of modules in one forward pass that ends at the last of them.

    Parameters
    ----------
    paths : dotted module paths; with ``:in`` behind it the module's input, else its output.
    batch : keyword arguments of the model.

    Returns
    -------
    Path to the activations as the module took or returned them.

    Raises
    ------
    GossamerError
        If a path is unknown, or its module does not run in this forward pass.
    """
    modules = {path: find_module(model, split_path(path)[0]) for path in paths}
    found: dict[str, Tensor] = {}

    def note(path: str, hidden: Tensor) -> None:
        found[path] = hidden
        if len(found) == len(modules):
            raise _Recorded

    def after(path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            note(path, hidden_of(output, path))

        return hook

    def before(path: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            # A copy: blocks may add to the tensor they were given.
            note(path, input_of(args, kwargs, path).clone())

        return hook

    with ExitStack() as stack:
        for path, module in modules.items():
            if split_path(path)[1]:
                handle = module.register_forward_pre_hook(before(path), with_kwargs=True)
            else:
                handle = module.register_forward_hook(after(path))
            stack.callback(handle.remove)
        stack.enter_context(_evaluating(model))
        try:
            model(**batch)
        except _Recorded:
            return found
    missing = ", ".join(path for path in paths if path not in found)
    raise GossamerError(f"module {missing} does not run in the model's forward pass; hook another")
