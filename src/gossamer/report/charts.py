"""Charts: inline SVG drawn here, so that the page needs nothing from outside.

Colours are the classes s0 to s9 of the page's style sheet, which has a set for dark and one for
light. Every chart is drawn for a wide and a narrow page; the style sheet shows one of them.
"""

from collections.abc import Sequence

from markupsafe import Markup, escape

from gossamer.report.axes import Scale, linear_ticks, log_ticks, spread
from gossamer.report.numbers import percent, perplexity, rate
from gossamer.report.rows import BLOCKS, Row, Series, Table
from gossamer.report.svg import Frame, clip, svg, tag

__all__ = ["COLOURS", "quality_chart", "series_class", "speed_chart"]

COLOURS = 10
_CAP = 25.0
"""Perplexities beyond this multiple of dense are drawn on the upper edge."""
_LABEL_GAP = 15.0
_LETTER = 7.2
"""Width of a letter at the size of labels in a wide font, pixels."""


def series_class(line: Series) -> str:
    """Style classes of a line: its colour, and a dash where the colours are used up."""
    if line.role == "random":
        return "random"
    return f"s{line.colour % COLOURS} d{line.colour // COLOURS % 3}"


def _axes(
    frame: Frame, x: Scale, y: Scale, x_ticks: list[tuple[float, str]], x_title: str
) -> list[Markup]:
    parts = []
    for tick in log_ticks(y.low, y.high):
        at = y(tick)
        text = f"{tick:,.0f}" if tick >= 10 else f"{tick:.3g}"
        parts.append(tag("line", class_="grid", x1=frame.left, x2=frame.x1, y1=at, y2=at))
        parts.append(
            tag("text", text, class_="tick", x=frame.left - 8, y=at + 4, text_anchor="end")
        )
    for value, text in x_ticks:
        at = x(value)
        parts.append(tag("line", class_="axis", x1=at, x2=at, y1=frame.y1, y2=frame.y1 + 4))
        parts.append(tag("text", text, class_="tick", x=at, y=frame.y1 + 18, text_anchor="middle"))
    middle = (frame.left + frame.x1) / 2
    parts.append(tag("line", class_="axis", x1=frame.left, x2=frame.x1, y1=frame.y1, y2=frame.y1))
    parts.append(
        tag("text", x_title, class_="title", x=middle, y=frame.height - 6, text_anchor="middle")
    )
    parts.append(tag("text", "perplexity", class_="title", x=4, y=10))
    return parts


def _tooltip(table: Table, row: Row) -> str:
    head = f"{row.label}{f', pattern {row.pattern}' if row.pattern and not row.fixed else ''}"
    lines = [head, f"{percent(row.achieved)} of {row.unit} removed"]
    if row.read is not None:
        lines.append(f"{percent(row.read, 1)} of {BLOCKS} read")
    lines.append(f"perplexity {perplexity(row.perplexity)}")
    over = table.loss_over_dense(row)
    if over is not None and not row.dense:
        lines.append(f"loss {over:+.3f} nats on dense".replace("-", "−"))
    if row.tokens_per_second is not None:
        paired = row.speedup is not None and not row.dense
        gain = f", {row.speedup:.2f}× dense" if paired else ""
        lines.append(f"{rate(row.tokens_per_second)} tokens/s{gain}")
    if row.simulated:
        lines.append("simulated: no speed")
    return "\n".join(lines)


def _marker(kind: str, x: float, y: float, tooltip: str, class_: str) -> Markup:
    """A point with a tooltip and a target wide enough for a finger."""
    shapes = {
        "dot": tag("circle", cx=x, cy=y, r=3.6),
        "diamond": tag("path", d=f"M{x:.1f} {y - 5.2:.1f}l5.2 5.2-5.2 5.2-5.2-5.2z"),
        "above": tag("path", d=f"M{x - 5:.1f} {y + 4:.1f}h10l-5-9z"),
        "broken": tag("path", class_="cross", d=f"M{x - 4:.1f} {y - 4:.1f}l8 8m0-8l-8 8"),
    }
    hit = tag("circle", class_="hit", cx=x, cy=y, r=11)
    return Markup('<g class="point {}">{}{}{}</g>').format(
        class_, tag("title", tooltip), hit, shapes[kind]
    )


def _y_scale(table: Table, rows: Sequence[Row], frame: Frame) -> Scale:
    values = [r.perplexity for r in rows if r.perplexity is not None and r.perplexity > 0]
    base = table.dense.perplexity if table.dense and table.dense.perplexity else None
    low: float = min([*values, base] if base else values, default=1.0)
    high = max([*values, low * 1.25])
    high = min(high, max(_CAP * base, low * 1.25)) if base else high
    margin = (high / low) ** 0.05
    return Scale(low / margin, high * margin, frame.y1, frame.top, logarithmic=True)


def _place(row: Row, x: Scale, y: Scale) -> tuple[float, float, str]:
    """Pixels of a row and the marker it gets."""
    at = x(row.share)
    if row.perplexity is None:
        return at, y.end, "broken"
    if row.perplexity > y.high:
        return at, y.end + 4, "above"
    return at, y(row.perplexity), "diamond" if row.fixed else "dot"


def _path(line: Series, x: Scale, y: Scale) -> Markup:
    """The line through a series; it leaves the chart where a value is beyond the edge."""
    points = [(x(r.share), r.perplexity) for r in line.rows]
    known = [(a, p) for a, p in points if p is not None]
    if len(known) < 2:
        return Markup("")
    d = "M" + "L".join(f"{a:.1f} {y.beyond(p):.1f}" for a, p in known)
    return tag("path", class_=f"line {series_class(line)}", d=d)


def quality_chart(
    table: Table, lines: Sequence[Series], unit: str, width: int, height: int
) -> Markup:
    """Perplexity (logarithmic) against the share removed, one line per method.

    Lines are named at their right ends; on narrow pages, or beyond 16 lines, by the legend.
    """
    labelled = width >= 480 and len(lines) <= 16
    frame = Frame(width, height, right=(150 if width > 700 else 128) if labelled else 16)
    rows = [row for line in lines for row in line.rows]
    x = _sparsity_scale(rows, frame)
    y = _y_scale(table, rows, frame)
    ticks = [(t, percent(t)) for t in linear_ticks(x.low, x.high, 6)]
    gone = f"share of {unit} {'unread' if unit == BLOCKS else 'removed'}"
    parts = _axes(frame, x, y, ticks, gone)
    ends: list[tuple[str, str, float, float]] = []
    if table.dense is not None and table.dense.perplexity is not None:
        at = y(table.dense.perplexity)
        parts.append(tag("line", class_="dense", x1=frame.left, x2=frame.x1, y1=at, y2=at))
        text = f"dense {perplexity(table.dense.perplexity)}"
        ends.append((text, "dense", frame.x1, at))
        if not labelled:
            parts.append(
                tag("text", text, class_="label dense", x=frame.x1, y=at - 6, text_anchor="end")
            )
    box = tag(
        "rect", x=frame.left, y=frame.top, width=frame.x1 - frame.left, height=frame.y1 - frame.top
    )
    name = f"clip-{unit.replace(' ', '-')}-{width}"
    parts.append(Markup('<clipPath id="{}">{}</clipPath>').format(name, box))
    paths = Markup("").join(_path(line, x, y) for line in lines)
    parts.append(Markup('<g clip-path="url(#{})">{}</g>').format(name, paths))
    for line in lines:
        for row in line.rows:
            at, up, kind = _place(row, x, y)
            parts.append(_marker(kind, at, up, _tooltip(table, row), series_class(line)))
        ends.append((line.label, series_class(line), at, up))
    if labelled:
        parts += _end_labels(ends, frame)
    return svg(frame, f"Perplexity against the {gone}", parts)


def _sparsity_scale(rows: Sequence[Row], frame: Frame) -> Scale:
    values = [row.share for row in rows] or [0.0, 1.0]
    low, high = min(values), max(values)
    room = max(0.05, (high - low) * 0.06)
    low = max(0.0, low - room)
    return Scale(low, min(1.0, max(high + room / 2, low + 0.1)), frame.left, frame.x1 - 6)


def _end_labels(ends: Sequence[tuple[str, str, float, float]], frame: Frame) -> list[Markup]:
    """Names at the right edge, moved apart, each joined to its line by a thin leader."""
    places = spread([up for *_, up in ends], _LABEL_GAP, frame.top, frame.y1)
    parts = []
    for (text, class_, at, up), place in zip(ends, places, strict=True):
        edge = frame.x1 + 10
        if class_ != "dense":
            d = f"M{at + 6:.1f} {up:.1f}L{frame.x1:.1f} {place:.1f}H{edge:.1f}"
            parts.append(tag("path", class_=f"leader {class_}", d=d))
        label = tag("title", text) + escape(clip(text, 20))
        parts.append(tag("text", label, class_=f"label {class_}", x=edge + 4, y=place + 4))
    return parts


def speed_chart(table: Table, width: int, height: int) -> Markup:
    """Perplexity against decoding speed over dense; simulated rows have none and are left out."""
    rows = [r for r in table.rows if r.speedup is not None and r.perplexity is not None]
    colours = {
        row.index: series_class(line)
        for lines in table.series().values()
        for line in lines
        for row in line.rows
    }
    frame = Frame(width, height)
    speeds = [row.speedup or 0.0 for row in rows]
    low, high = min(speeds), max(speeds)
    room = max((high - low) * 0.15, high * 0.05)
    x = Scale(max(0.0, low - room), high + room, frame.left, frame.x1)
    y = _y_scale(table, rows, frame)
    ticks = [(t, f"{t:g}×") for t in linear_ticks(x.low, x.high, 6 if width > 500 else 4)]
    parts = _axes(frame, x, y, ticks, "decoding speed over dense, timed side by side")
    marks = [(x(r.speedup or 0.0), _place(r, x, y)[1]) for r in rows]
    taken = [(at - 6, up - 6, at + 6, up + 6) for at, up in marks]
    # Labels go to the best rows first; one that finds no free place is left to the tooltip.
    ranked = sorted(zip(rows, marks, strict=True), key=lambda pair: pair[0].perplexity or 0.0)
    for row, (at, up) in ranked:
        class_ = "dense" if row.dense else colours[row.index]
        kind = "above" if (row.perplexity or 0.0) > y.high else "diamond" if row.dense else "dot"
        parts.append(_marker(kind, at, up, _tooltip(table, row), class_))
        text = "dense" if row.dense else f"{table.name(row)} {percent(row.achieved)}"
        shown = clip(text, 28)
        box = _free_place(at, up, len(shown) * _LETTER, taken, frame)
        if box is not None:
            taken.append(box)
            label = tag("title", text) + escape(shown)
            middle = (box[1] + box[3]) / 2 + 4
            parts.append(tag("text", label, class_=f"label {class_}", x=box[0], y=middle))
    return svg(frame, "Perplexity against decoding speed over dense", parts)


Box = tuple[float, float, float, float]


def _free_place(
    at: float, up: float, width: float, taken: Sequence[Box], frame: Frame
) -> Box | None:
    """Right of a point, left of it, above or below: the first place where nothing lies yet."""
    for left, top in (
        (at + 9, up - 7),
        (at - 9 - width, up - 7),
        (at - 20, up - 24),
        (at - 20, up + 9),
    ):
        box = (left, top, left + width, top + 14)
        inside = left >= frame.left and box[2] <= frame.width and top >= 0 and box[3] <= frame.y1
        clear = all(box[2] < b[0] or b[2] < box[0] or box[3] < b[1] or b[3] < box[1] for b in taken)
        if inside and clear:
            return box
    return None
