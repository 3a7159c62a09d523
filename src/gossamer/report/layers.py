"""Per-layer sparsity: a small map for each row, blocks across, matrices down."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from gossamer.report.numbers import percent
from gossamer.report.rows import Row, Table
from gossamer.report.svg import Frame, svg, tag

__all__ = ["LayerMap", "heat_key", "layer_maps"]

_CELL, _LEFT, _MOST = 15, 62, 24


@dataclass(frozen=True)
class LayerMap:
    """One row's map with its caption."""

    row: Row
    low: float
    high: float
    svg: Markup


def layer_maps(table: Table) -> tuple[list[LayerMap], list[Row], int]:
    """Maps of the rows whose layers differ.

    Returns
    -------
    (maps, rows that remove the same share everywhere, number of maps left out beyond 24).
    """
    maps: list[LayerMap] = []
    even: list[Row] = []
    for row in table.rows:
        values = [float(layer["sparsity"]) for layer in row.layers if _known(layer)]
        if not values:
            continue
        # Rounding to whole weights makes equal shares differ in the third place.
        if max(values) - min(values) < 0.005:
            even.append(row)
        else:
            maps.append(LayerMap(row, min(values), max(values), _draw(row, table.name(row))))
    return maps[:_MOST], even, max(0, len(maps) - _MOST)


def heat_key(share: float) -> Markup:
    """A cell of the colour that a share removed has in the maps."""
    frame = Frame(13, 13)
    size = {"width": 13, "height": 13}
    fill = tag("rect", class_="heat", fill_opacity=_opacity(share), **size)
    return svg(
        frame, f"colour of {percent(share)}", [tag("rect", class_="heat-back", **size), fill]
    )


def _opacity(share: float) -> float:
    # Steeper than linear: most layers lie in a narrow range that must still be told apart.
    return share**1.5


def _known(layer: Mapping[str, Any]) -> bool:
    value = layer.get("sparsity")
    return isinstance(value, int | float) and 0 <= value <= 1


def _grid(layers: Sequence[Mapping[str, Any]]) -> dict[tuple[str, int], list[Mapping[str, Any]]]:
    """Layers by (role, block); the experts of a stack share a cell."""
    cells: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for layer in layers:
        if _known(layer):
            key = (str(layer.get("role") or "layer"), int(layer.get("block") or 0))
            cells.setdefault(key, []).append(layer)
    return cells


def _draw(row: Row, label: str) -> Markup:
    cells = _grid(row.layers)
    roles = list(dict.fromkeys(role for role, _ in cells))
    blocks = sorted({block for _, block in cells})
    wide = max(4.0, min(22.0, 210 / len(blocks)))
    frame = Frame(round(_LEFT + wide * len(blocks) + 2), _CELL * len(roles) + 18)
    parts = []
    for line, role in enumerate(roles):
        text = role.rpartition(".")[2][:9]
        at = line * _CELL
        parts.append(tag("text", text, class_="tick", x=_LEFT - 6, y=at + 11, text_anchor="end"))
    for (role, block), layers in cells.items():
        mean = sum(float(layer["sparsity"]) for layer in layers) / len(layers)
        name = str(layers[0].get("name") or role) + (" and others" if len(layers) > 1 else "")
        tip = f"{name}\n{percent(mean, 1)} removed"
        place = {"x": _LEFT + blocks.index(block) * wide, "y": float(roles.index(role) * _CELL)}
        size = {"width": wide - 1, "height": _CELL - 1.0}
        back = tag("rect", class_="heat-back", **place, **size)
        fill = tag(
            "rect", tag("title", tip), class_="heat", fill_opacity=_opacity(mean), **place, **size
        )
        parts += [back, fill]
    for block in {blocks[0], blocks[-1]}:
        middle = _LEFT + (blocks.index(block) + 0.5) * wide
        at = _CELL * len(roles) + 13
        parts.append(tag("text", block, class_="tick", x=middle, y=at, text_anchor="middle"))
    return svg(frame, f"Sparsity of each layer: {label}", parts)
