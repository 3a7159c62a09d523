"""Receptive fields: a picture of a dictionary's atoms, complete in itself.

The atoms lie in a PNG inside the drawing, so that the file opens offline and stays small.
"""

import base64
import struct
import zlib
from pathlib import Path

from markupsafe import Markup
from torch import Tensor

from gossamer.core import GossamerError
from gossamer.methods.features.vision import gabor_fit, gabor_like, mosaic
from gossamer.report.svg import Frame, svg, tag

__all__ = ["png", "receptive_fields"]

_EDGE, _FOOT = 8, 28


def png(picture: Tensor) -> bytes:
    """A grey picture, uint8 (H, W), as a PNG file."""
    high, wide = picture.shape
    lines = b"".join(b"\0" + row.numpy().tobytes() for row in picture.cpu().contiguous())

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", wide, high, 8, 0, 0, 0, 0)
    end = chunk(b"IEND", b"")
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + end
    )


def receptive_fields(
    atoms: Tensor, out: str | Path | None = None, *, title: str = "Receptive fields", scale: int = 4
) -> Markup:
    """Draw atoms (M, P²) side by side, the most Gabor-like first; the drawing as SVG text.

    Parameters
    ----------
    out : file to write it to, ``.svg``; None: none.
    scale : screen pixels of a pixel, at least 1.

    Raises
    ------
    GossamerError
        If the atoms are no square patches or the file cannot be written.
    """
    if scale < 1:
        raise GossamerError(f"scale is {scale}; give at least 1")
    fit = gabor_fit(atoms)
    picture = mosaic(atoms[fit.argsort(descending=True, stable=True)])
    high, wide = (scale * side for side in picture.shape)
    data = "data:image/png;base64," + base64.b64encode(png(picture)).decode()
    caption = (
        f"{title}: {len(atoms)} atoms, {float(gabor_like(atoms).float().mean()):.0%} Gabor-like"
    )
    place = {"x": _EDGE, "y": _EDGE, "width": wide, "height": high}
    parts = [
        tag("image", href=data, style="image-rendering:pixelated", **place),
        tag("text", caption, x=_EDGE, y=high + _EDGE + 18, font_size=13, font_family="sans-serif"),
    ]
    drawing = svg(Frame(wide + 2 * _EDGE, high + _EDGE + _FOOT), caption, parts)
    if out is not None:
        text = drawing.replace("<svg ", Markup('<svg xmlns="http://www.w3.org/2000/svg" '), 1)
        try:
            Path(out).write_text(text, encoding="utf-8")
        except OSError as error:
            raise GossamerError(f"{out} cannot be written: {error.strerror}") from None
    return drawing
