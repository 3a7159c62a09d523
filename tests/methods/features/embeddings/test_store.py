"""Embeddings: rows, labels, and both files read back to the bit."""

import sys

import pytest
import torch

from gossamer.core import GossamerError, SparseRows
from gossamer.methods.features.embeddings import Embeddings


def made():
    dense = torch.tensor([[0.0, 1.5, 0, -2], [0, 0, 0, 0], [3, 0, 0.25, 0]])
    return Embeddings(
        SparseRows.from_dense(dense), ("a", "b", "ç"), {1: "sea", 3: "fear"}, {"hook": "x"}
    )


def same(one, two):
    assert torch.equal(one.codes.to_dense(), two.codes.to_dense())
    assert one.names == two.names
    assert dict(one.labels) == dict(two.labels)
    assert dict(one.metadata) == dict(two.metadata)
    return True


def test_safetensors_and_arrow_are_read_back(tmp_path):
    assert same(made(), Embeddings.load(made().save(tmp_path / "e")))
    assert same(made(), Embeddings.from_arrow(made().to_arrow(tmp_path / "e.arrow")))


def test_arrow_is_an_arrow_file_others_read(tmp_path):
    import pyarrow as pa

    with pa.memory_map(str(made().to_arrow(tmp_path / "e.arrow"))) as source:
        table = pa.ipc.open_file(source).read_all()
    assert table["latents"].to_pylist() == [[1, 3], [], [0, 2]]
    assert table["values"].to_pylist() == [[1.5, -2], [], [3, 0.25]]


def test_rows_are_picked_by_place_and_by_mask():
    assert made().rows([2, 0]).names == ("ç", "a")
    picked = made().rows(torch.tensor([True, False, True]))
    assert torch.equal(picked.codes.to_dense(), made().codes.to_dense()[[0, 2]])
    assert made().present().toarray().tolist() == [[0, 1, 0, 1], [0, 0, 0, 0], [1, 0, 1, 0]]


def test_what_cannot_be_is_refused(tmp_path, monkeypatch):
    codes = made().codes
    with pytest.raises(GossamerError, match="2 names for 3"):
        Embeddings(codes, ("a", "b"))
    with pytest.raises(GossamerError, match="latent 9"):
        Embeddings(codes, labels={9: "x"})
    with pytest.raises(GossamerError, match="no readable embeddings"):
        Embeddings.load(tmp_path)
    (tmp_path / "bad.arrow").write_bytes(b"nothing")
    with pytest.raises(GossamerError, match="no readable embeddings"):
        Embeddings.from_arrow(tmp_path / "bad.arrow")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(GossamerError, match="pip install"):
        made().to_arrow(tmp_path / "e.arrow")
