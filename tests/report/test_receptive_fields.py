"""Receptive fields: a drawing whose pixels are the atoms."""

import base64
import io
import re
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from PIL import Image

from gossamer.core import GossamerError
from gossamer.methods.features.vision import gabor_fit, mosaic
from gossamer.report.receptive_fields import png, receptive_fields


def atoms():
    return torch.randn(10, 25, generator=torch.Generator().manual_seed(0))


def opened(data):
    image = Image.open(io.BytesIO(data))
    return torch.tensor(list(image.tobytes()), dtype=torch.uint8).view(image.height, image.width)


def test_png_is_read_back_by_another_program():
    picture = torch.randint(256, (7, 5), dtype=torch.uint8)
    assert torch.equal(opened(png(picture)), picture)


def test_drawing_holds_all_atoms_best_first(tmp_path):
    drawing = receptive_fields(atoms(), tmp_path / "fields.svg", title="Fields <1>")
    tree = ElementTree.parse(tmp_path / "fields.svg").getroot()
    assert tree.tag == "{http://www.w3.org/2000/svg}svg"
    inside = re.search(r"base64,([A-Za-z0-9+/=]+)", str(drawing)).group(1)
    best = atoms()[gabor_fit(atoms()).argsort(descending=True, stable=True)]
    assert torch.equal(opened(base64.b64decode(inside)), mosaic(best))
    text = "".join(tree.itertext())
    assert "Fields <1>: 10 atoms" in text
    assert "http" not in str(drawing)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(GossamerError, match="cannot be written"):
        receptive_fields(atoms(), tmp_path / "no" / "fields.svg")
