"""ZF plot: norms of inputs against norms of codes, a point a token."""

from markupsafe import Markup

from gossamer.methods.features.measure import NormMatch
from gossamer.report.axes import Scale, linear_ticks
from gossamer.report.svg import Frame, svg, tag

__all__ = ["zf_plot"]

_MOST = 2000
_STYLE = (
    "text{font:12px sans-serif;fill:#777}.axis{stroke:#999}"
    ".diagonal{stroke:#999;stroke-dasharray:4 3}.point{fill:#2a78c2;fill-opacity:.45}"
)


def zf_plot(match: NormMatch, *, size: int = 420, label: str = "") -> Markup:
    """The ZF plot of a dictionary of any rule, as a drawing that stands alone.

    Tokens on the dashed diagonal have codes as long as themselves, as orthogonal atoms would
    give; above it codes are too long. At most 2000 tokens are drawn, evenly chosen.

    Parameters
    ----------
    match : of :func:`gossamer.methods.features.measure.norm_match`.
    size : width and height, pixels. label : what the title says beside the mismatch.

    Returns
    -------
    An ``<svg>`` element; write ``str(...)`` to a file.

    Source: arXiv 2503.24277, §3.
    """
    every = max(1, -(-len(match.inputs) // _MOST))
    points = list(zip(match.inputs[::every].tolist(), match.codes[::every].tolist(), strict=True))
    frame = Frame(size, size)
    most = max((max(pair) for pair in points), default=1.0) * 1.05 or 1.0
    x = Scale(0.0, most, frame.left, frame.x1)
    y = Scale(0.0, most, frame.y1, frame.top)
    parts = [Markup("<style>{}</style>").format(Markup(_STYLE))]
    ends = {"x1": x.start, "y1": y.start}
    parts.append(tag("line", class_="diagonal", **ends, x2=x.end, y2=y.end))
    parts.append(tag("line", class_="axis", **ends, x2=x.end, y2=y.start))
    parts.append(tag("line", class_="axis", **ends, x2=x.start, y2=y.end))
    for tick in linear_ticks(0.0, most, 5):
        text = f"{tick:g}"
        parts.append(tag("text", text, x=x(tick), y=frame.y1 + 18, text_anchor="middle"))
        parts.append(tag("text", text, x=frame.left - 6, y=y(tick) + 4, text_anchor="end"))
    parts += [tag("circle", class_="point", cx=x(a), cy=y(b), r=1.8) for a, b in points]
    middle = (frame.left + frame.x1) / 2
    parts.append(tag("text", "norm of the input", x=middle, y=size - 8, text_anchor="middle"))
    head = f"norm of the code; median mismatch {match.mismatch:.3f}"
    parts.append(tag("text", f"{label}: {head}" if label else head, x=4, y=14))
    made = svg(frame, "Norms of codes against norms of inputs", parts)
    return Markup(str(made).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1))
