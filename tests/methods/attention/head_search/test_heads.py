import json

import pytest

from gossamer.core import GossamerError
from gossamer.methods.attention.head_search import Head, read_heads, write_heads


def file_of(tmp_path, layers):
    path = tmp_path / "heads.json"
    path.write_text(json.dumps(layers))
    return path


def test_minference_s_file_is_read(tmp_path):
    layers = [
        {"0": ["vertical_and_slash", 1000, 6096, 0.97], "1": ["stream_llm", 100, 800, 0.9]},
        {"1": ["block_sparse", 100, 1, 0.5]},
    ]
    found = read_heads(file_of(tmp_path, layers), heads=2)
    assert found[0] == [Head("vertical_slash", 1000, 6096, 0.97), Head("a_shape", 100, 800, 0.9)]
    assert found[1] == [Head("vertical_slash", 1000, 6096), Head("block_sparse", 100, 1, 0.5)]
    assert read_heads(file_of(tmp_path, layers), 2, block_size=16)[1][1].first == 400


def test_written_file_is_read_alike_and_shared_heads_are_repeated(tmp_path):
    layers = [[Head("a_shape", 4, 60, 0.9), Head("block_sparse", 8, 1, 0.8)]]
    path = tmp_path / "out.json"
    write_heads(path, layers, heads=4, block_size=16)
    assert json.loads(path.read_text()) == [
        {
            "0": ["stream_llm", 4, 60, 0.9],
            "1": ["stream_llm", 4, 60, 0.9],
            "2": ["block_sparse", 2, 1, 0.8],
            "3": ["block_sparse", 2, 1, 0.8],
        }
    ]
    again = read_heads(path, 4, block_size=16)[0]
    assert again == [layers[0][0], layers[0][0], layers[0][1], layers[0][1]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"0": ["vertical", 1, 2, 1.0]}], "did you mean vertical_and_slash"),
        ([{"7": ["stream_llm", 1, 2, 1.0]}], "heads 0 to 1"),
        ([{"0": "stream_llm"}], "not \\[kind"),
        ({"0": []}, "no list"),
    ],
)
def test_wrong_files_are_refused(tmp_path, content, message):
    with pytest.raises(GossamerError, match=message):
        read_heads(file_of(tmp_path, content), heads=2)


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(GossamerError, match="missing.json is no readable"):
        read_heads(tmp_path / "missing.json", 2)
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(GossamerError, match="bad.json is no readable"):
        read_heads(tmp_path / "bad.json", 2)


def test_dense_heads_have_no_name_in_the_file(tmp_path):
    with pytest.raises(GossamerError, match="no name for a dense head"):
        write_heads(tmp_path / "x.json", [[Head("dense", 0, 0)]], 1)
    assert not (tmp_path / "x.json").exists()
