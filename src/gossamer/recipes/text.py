"""Recipes as text: a strict subset of YAML.

Plain YAML 1.1 would read the pattern ``2:4`` as the number 124, take the last of two equal keys,
and let aliases grow a small file into gigabytes. Here numbers are those of YAML 1.2, equal keys
and aliases are errors.
"""

import re
from typing import Any

import yaml

from gossamer.core import GossamerError

__all__ = ["MAX_BYTES", "dump", "parse"]

MAX_BYTES = 1 << 20
_INT = re.compile(r"[-+]?\d+")


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 scalars, no aliases, no repeated keys."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - yaml's own class attribute

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            line = self.peek_event().start_mark.line + 1
            raise GossamerError(f"line {line}: aliases (*name) are not allowed in a recipe")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen:
                raise GossamerError(
                    f"line {key.start_mark.line + 1}: key {name!r} is given twice; keep one"
                )
            seen.add(name)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"(?:true|false)\Z"), list("tf"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:null", re.compile(r"(?:null|~|)\Z"), ["n", "~", ""]
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(_INT.pattern + r"\Z"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:\d+\.\d*|\.\d+|\d+)(?:[eE][-+]?\d+)?\Z|[-+]?\.(?:inf|nan)\Z"),
    list("-+.0123456789"),
)


def parse(text: str) -> Any:
    """Plain values of a recipe's text.

    Raises
    ------
    GossamerError
        On text that is too large, is no YAML, repeats a key, or uses an alias.
    """
    if len(text.encode("utf-8")) > MAX_BYTES:
        raise GossamerError(f"a recipe has at most {MAX_BYTES:,} bytes")
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark is not None else ""
        problem = getattr(error, "problem", None) or "not valid YAML"
        raise GossamerError(f"{where}{problem}") from None
    except (ValueError, KeyError, AttributeError, TypeError, IndexError) as error:
        if isinstance(error, GossamerError):
            raise
        # An explicit tag, such as !!int on a word, or a number too long to read.
        raise GossamerError(f"a value cannot be read ({error})") from None
    except RecursionError:
        raise GossamerError("the recipe is nested too deeply") from None


def dump(values: Any) -> str:
    """Text that :func:`parse` reads back to the same values."""
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
