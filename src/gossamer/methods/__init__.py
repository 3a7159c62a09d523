"""All methods. The directory is the registry: a method is a file in a family's folder.

``methods/<family>/<key>.py`` holds one public :class:`~gossamer.core.Method` whose class name,
lower-cased, is the key without underscores. Adding a method touches its file and its claim.
"""

import re
from dataclasses import MISSING, fields
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

import gossamer.kernels  # noqa: F401 - registers the kernels that core selects with
from gossamer.core import FAMILIES, GossamerError, Method, Pattern, parse_pattern, unknown

__all__ = [
    "by_class_name",
    "get",
    "has_field",
    "keys",
    "make",
    "parse_method",
    "split_sum",
    "split_text",
    "text_fields",
]

_HERE = Path(__file__).parent


@cache
def _files() -> dict[str, str]:
    """Key to module name, families in their order, keys sorted."""
    found = {}
    for family in FAMILIES:
        for path in sorted((_HERE / family).glob("*.py")):
            module = f"{__name__}.{family}.{path.stem}"
            if path.stem not in ("__init__", "base") and _class_name(path):
                found[path.stem] = module
    return found


def _class_name(path: Path) -> str | None:
    """Name of the public class a file's name announces; None for a helper module."""
    flat = path.stem.replace("_", "")
    # A protocol such as ``class Executor(ABC)`` in executor.py is no method, nor is an iterator.
    bases = r"^class (\w+)\((?!(?:ABC|Iterator|Protocol)\b)"
    names = re.findall(bases, path.read_text(encoding="utf-8"), re.MULTILINE)
    return next((name for name in names if name.lower() == flat), None)


def keys(family: str | None = None) -> tuple[str, ...]:
    """Keys of all methods, or of one family's."""
    if family is not None and family not in FAMILIES:
        raise unknown("family", family, FAMILIES)
    return tuple(k for k, m in _files().items() if family in (None, m.split(".")[-2]))


@cache
def get(key: str) -> type[Method]:
    """The method class with this key.

    Raises
    ------
    GossamerError
        For an unknown key, offering the nearest.
    """
    if key not in _files():
        raise unknown("method", key, keys())
    module = import_module(_files()[key])
    flat = key.replace("_", "")
    return next(getattr(module, name) for name in module.__all__ if name.lower() == flat)


def by_class_name(name: str) -> type[Method] | None:
    """The method class called ``name``, or None; imports nothing else."""
    flat = name.lower()
    key = next((k for k in _files() if k.replace("_", "") == flat), None)
    if key is None or get(key).__name__ != name:
        return None
    return get(key)


def _convert(cls: type[Method], name: str, value: Any) -> Any:
    """A field's value from text or plain data, checked against its annotation."""
    hint = get_type_hints(cls)[name]
    if name == "pattern" and isinstance(value, str):
        return parse_pattern(value)
    if isinstance(value, Pattern):
        return value
    if isinstance(value, str) and value.lower() in ("none", "null"):
        value = None
    try:
        adapter = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
        return adapter.validate_python(value)
    except ValidationError as error:
        reason = error.errors()[0]["msg"].lower()
        raise GossamerError(f"{cls.key()}: {name} is {value!r}; {reason}") from None


def make(key: str, **values: Any) -> Method:
    """A method by key, its fields given as values or as text.

    >>> make("wanda", sparsity="0.5", pattern="2:4").pattern
    NM(keep=2, of=4)

    Raises
    ------
    GossamerError
        For an unknown method or field, a value of the wrong kind, or one out of range.
    """
    cls = get(key)
    known = tuple(f.name for f in fields(cls) if f.init)
    for name in values:
        if name not in known:
            raise unknown(f"parameter of {key}", name, known)
    for f in fields(cls):
        if (
            f.init
            and f.default is MISSING
            and f.default_factory is MISSING
            and f.name not in values
        ):
            raise GossamerError(f"{key} needs a value for {f.name}")
    return cls(**{name: _convert(cls, name, value) for name, value in values.items()})


def has_field(key: str, name: str) -> bool:
    """Whether a method with this key exists and has a parameter of this name."""
    return key in _files() and any(f.name == name and f.init for f in fields(get(key)))


def split_text(text: str) -> list[str]:
    """The parts of a method's text form: its key, then ``field=value`` strings."""
    return re.split(r":(?=[a-z_]+=)", text.strip())


def split_sum(text: str) -> list[str]:
    """The terms of a sum of methods in text form; one where there is no sum."""
    return re.split(r"\+(?=[a-z])", text.strip())


def text_fields(parts: list[str]) -> dict[str, str]:
    """Fields of ``field=value`` strings; naming one twice is an error."""
    given: dict[str, str] = {}
    for part in parts:
        name, _, value = part.partition("=")
        if name in given:
            raise GossamerError(f"{name} is given twice; keep one")
        given[name] = value
    return given


def parse_method(text: str, **values: Any) -> Method:
    """A method from its text form ``key`` or ``key:field=value:field=value``.

    ``first+second`` is the sum of two methods, where a family defines one. Keyword values fill
    fields that the text leaves open and the method has; fields that the method does not have are
    passed over, so one grid serves methods of several families.
    """
    first, *others = split_sum(text)
    if others:
        total: Any = parse_method(first, **values)
        for other in others:
            term = parse_method(other, **values)
            if not hasattr(total, "__add__"):
                raise GossamerError(f"{first} and {other} do not add up; give one of them")
            total = total + term
        return total
    key, *parts = split_text(text)
    cls = get(key)
    given = text_fields(parts)
    names = {f.name for f in fields(cls) if f.init}
    rest = {k: v for k, v in values.items() if k in names and k not in given and v is not None}
    return make(key, **given, **rest)
