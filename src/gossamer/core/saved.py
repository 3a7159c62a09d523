"""States of trainings as they come back: refused in one line where they are something else."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import cast

import torch

from gossamer.core.errors import GossamerError

__all__ = ["check_parts", "taking"]


def check_parts(state: object, parts: Mapping[str, type], of: str, by: str) -> None:
    """Refuse what has not the parts of a state.

    Parameters
    ----------
    of : what it should be a state of. by : the name of what gives it.

    Raises
    ------
    GossamerError
        Naming the first part that is missing or of another type.
    """
    lacks = "it is no dict"
    if isinstance(state, Mapping):
        found = cast("Mapping[str, object]", state)
        wrong = [name for name, kind in parts.items() if not _is(found.get(name), kind)]
        if not wrong:
            return
        kind = f"a {type(found[wrong[0]]).__name__}" if wrong[0] in found else "missing"
        lacks = f"its {wrong[0]} is {kind}"
    raise GossamerError(f"this is no state of {of} ({lacks}); pass {by}.state_dict()")


def _is(value: object, kind: type) -> bool:
    # To Python, True is a whole number.
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


@contextmanager
def taking(by: str = "sparsifier") -> Generator[None, None, None]:
    """Turn what a damaged state raises while it is taken up into one line.

    Parameters
    ----------
    by : the name of what gives states.

    Raises
    ------
    GossamerError
        Naming what is missing or does not fit.
    """
    try:
        yield
    except (GossamerError, torch.OutOfMemoryError):
        raise
    except (AttributeError, KeyError, RuntimeError, StopIteration, TypeError, ValueError) as error:
        raise GossamerError(
            f"the state is damaged ({type(error).__name__}: {str(error).partition(chr(10))[0]}); "
            f"pass what {by}.state_dict() gave"
        ) from error
