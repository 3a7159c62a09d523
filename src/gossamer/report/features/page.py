"""Page: features as one HTML file that needs nothing else, or as the shell of a served one."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from gossamer.report import numbers
from gossamer.report.build import write_page
from gossamer.report.features.records import Example, Feature, Histogram, rounded

__all__ = ["as_json", "build_page", "render", "row"]

Spell = Callable[[str], Any]


class _Interned:
    """Every text once: examples then name tokens by number."""

    def __init__(self) -> None:
        self.texts: dict[str, int] = {}

    def __call__(self, text: str) -> int:
        return self.texts.setdefault(text, len(self.texts))


def row(feature: Feature) -> dict[str, Any]:
    """What the table shows of a feature."""
    largest = feature.top if feature.top >= -feature.bottom else feature.bottom
    return {
        "i": feature.index,
        "fires": list(feature.fires),
        "density": None if feature.density is None else rounded(feature.density),
        "top": rounded(largest),
        "mean": None if feature.mean is None else rounded(feature.mean),
        "says": [token for token, _ in feature.positive[:3]],
        "words": feature.explanation,
    }


def as_json(feature: Feature, spell: Spell) -> dict[str, Any]:
    """A feature in full.

    Parameters
    ----------
    spell : makes of a token's text what stands for it.
    """
    return {
        **row(feature),
        "low": rounded(feature.bottom),
        "bars": _bars(feature.histogram),
        "up": [[spell(token), value] for token, value in feature.positive],
        "down": [[spell(token), value] for token, value in feature.negative],
        "near": [list(pair) for pair in feature.neighbours],
        "groups": [
            {
                "kind": group.kind,
                "low": group.low,
                "high": group.high,
                "share": group.share,
                "examples": [_example(example, spell) for example in group.examples],
            }
            for group in feature.groups
        ],
    }


def _bars(made: Histogram) -> dict[str, Any]:
    return {"low": rounded(made.low), "high": rounded(made.high), "counts": list(made.counts)}


def _example(example: Example, spell: Spell) -> dict[str, Any]:
    fired = [[place, value] for place, value in enumerate(example.values) if value]
    return {"t": [spell(token) for token in example.tokens], "v": fired, "at": example.at}


def render(features: Sequence[Feature] | None, facts: Mapping[str, Any]) -> str:
    """The page as text.

    Parameters
    ----------
    features : all that are shown; None for a page that asks its server.
    facts : ``title``; ``lede``, a sentence; ``figures``, pairs of a name and a figure; ``notes``,
        sentences; ``table``, pairs of a name and a value for the end of the page.
    """
    spell = _Interned()
    shown = None if features is None else [as_json(feature, spell) for feature in features]
    data = {"features": shown, "tokens": list(spell.texts)}
    # No text of a model may end the script element it is embedded in.
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    defaults = {"title": "", "lede": "", "figures": (), "notes": (), "table": (), "logits": True}
    context = {**defaults, **facts, "data": Markup(text), "served": features is None}
    return _environment().get_template("features/page.html.j2").render(context)


def build_page(features: Sequence[Feature], facts: Mapping[str, Any], out: str | Path) -> Path:
    """Write the page: one HTML file, complete in itself, whole or not at all.

    Parameters
    ----------
    out : the file, or a folder that gets ``index.html``.

    Raises
    ------
    GossamerError
        If the file cannot be written.
    """
    return write_page(render(features, facts), out)


def _environment() -> Environment:
    made = Environment(
        loader=PackageLoader("gossamer.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["percent"] = numbers.percent
    return made
