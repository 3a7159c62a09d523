"""SVG: elements, escaped, and the frame of a chart."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

__all__ = ["Frame", "clip", "svg", "tag"]


@dataclass(frozen=True)
class Frame:
    """Where a chart's data area lies, in pixels."""

    width: int
    height: int
    left: int = 50
    right: int = 16
    top: int = 24
    bottom: int = 44

    @property
    def x1(self) -> int:
        """Right edge of the data area."""
        return self.width - self.right

    @property
    def y1(self) -> int:
        """Lower edge of the data area."""
        return self.height - self.bottom


def tag(name: str, text: object = None, **attributes: object) -> Markup:
    """An element. ``class_`` becomes class, other underscores dashes; everything is escaped."""
    pairs = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_plain(value))}"'
        for key, value in attributes.items()
    )
    inside = Markup("") if text is None else escape(text)
    return Markup(f"<{name}{pairs}>{inside}</{name}>")


def _plain(value: object) -> object:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value


def clip(text: str, most: int) -> str:
    """A text of at most so many letters, cut in the middle: both ends tell names apart."""
    if len(text) <= most:
        return text
    head = (most - 1) * 2 // 3
    return f"{text[:head]}…{text[len(text) - (most - 1 - head) :]}"


def svg(frame: Frame, label: str, parts: Sequence[Markup]) -> Markup:
    """A drawing with a name for screen readers."""
    return Markup(
        '<svg viewBox="0 0 {0} {1}" width="{0}" height="{1}" role="img" aria-label="{2}">{3}</svg>'
    ).format(frame.width, frame.height, label, Markup("").join(parts))
