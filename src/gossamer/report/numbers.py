"""Numbers as the page prints them: one style for each kind of figure."""

from math import floor, log10

__all__ = ["ABSENT", "count", "duration", "fixed", "megabytes", "percent", "perplexity", "rate"]

ABSENT = "–"
"""Printed where a figure does not exist."""
_GLUE = "\u202f"
"""Narrow space that no line breaks at, between a number and its unit."""
_RAISED = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")


def perplexity(value: float | None) -> str:
    """Two decimals to a thousand, whole to a million, then a power of ten."""
    if value is None:
        return "not finite"
    if value < 1000:
        return f"{value:.2f}"
    if value < 1e6:
        return f"{value:,.0f}"
    power = floor(log10(value))
    return f"{value / 10**power:.1f} × 10{str(power).translate(_RAISED)}"


def percent(value: float | None, digits: int | None = None) -> str:
    """A share as per cent, with a decimal only where it says something."""
    if value is None:
        return ABSENT
    if digits is None:
        digits = 0 if abs(value * 100 - round(value * 100)) < 0.05 else 1
    return f"{value * 100:.{digits}f}{_GLUE}%"


def fixed(value: float | None, digits: int, sign: bool = False) -> str:
    """A fixed number of decimals, with a true minus sign."""
    if value is None:
        return ABSENT
    text = f"{value:{'+' if sign else ''}.{digits}f}"
    return text.replace("-", "−")


def megabytes(value: float | None) -> str:
    """Bytes in a fitting decimal unit, three digits."""
    if value is None:
        return ABSENT
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            scaled = value / size
            return f"{scaled:.{2 if scaled < 10 else 1 if scaled < 100 else 0}f}{_GLUE}{unit}"
    return f"{value:.0f} B"


def rate(value: float | None) -> str:
    """Tokens per second."""
    if value is None:
        return ABSENT
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def count(value: float | None) -> str:
    """A whole number, with millions and billions in words' letters."""
    if value is None:
        return ABSENT
    for letter, size in (("B", 1e9), ("M", 1e6)):
        if value >= size:
            return f"{value / size:.2f}{_GLUE}{letter}"
    return f"{value:,.0f}"


def duration(seconds: float | None) -> str:
    """Seconds, minutes or hours, whichever reads best."""
    if seconds is None:
        return ABSENT
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"
