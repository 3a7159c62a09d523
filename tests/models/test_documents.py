"""Texts are read whole, and files that hold none say so in one line."""

import json

import pytest

from gossamer.core import GossamerError
from gossamer.models import halves, read_documents


def test_text_jsonl_and_parquet_hold_the_same_documents(tmp_path) -> None:
    texts = ["one\ntwo", "drei – vier\u2028fünf"]
    (tmp_path / "a.txt").write_text(texts[1], encoding="utf-8")
    assert read_documents(tmp_path / "a.txt") == texts[1:]
    lines = "\n".join(json.dumps({"text": t, "id": 3}, ensure_ascii=False) for t in texts)
    (tmp_path / "a.jsonl").write_text(lines + "\n\n", encoding="utf-8")
    assert read_documents(str(tmp_path / "a.jsonl")) == texts
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"text": [*texts, None, ""]}), tmp_path / "a.parquet")
    assert read_documents(tmp_path / "a.parquet") == texts


@pytest.mark.parametrize("split", ["heldout", "calibration"])
def test_the_packaged_texts(split) -> None:
    documents = read_documents(None, split)
    assert len(documents) > 1
    assert any("def " in text for text in documents)


def test_the_packaged_splits_share_no_document() -> None:
    assert not set(read_documents(None, "heldout")) & set(read_documents(None, "calibration"))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"", "holds no text"),
        ("a.txt", b" \n ", "holds no text"),
        ("a.txt", b"\xff\xfe\x00", "not UTF-8 text"),
        ("a.txt", b"abc\0def", "binary"),
        ("a.jsonl", b'{"text": "a"}\n{"tex', "line 2 is not JSON"),
        ("a.jsonl", b'{"body": "a"}', 'no string "text"'),
        ("a.jsonl", b"[1]", 'no string "text"'),
        ("a.jsonl", b"[" * 100_000, "line 1 is not JSON"),
        ("a.jsonl", b"\n", "holds no text"),
        ("a.parquet", b"PAR1 no", "no readable parquet"),
    ],
)
def test_files_without_text(tmp_path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(GossamerError, match=words) as caught:
        read_documents(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_missing_files_and_folders(tmp_path) -> None:
    with pytest.raises(GossamerError, match="no file"):
        read_documents(tmp_path / "none.txt")
    with pytest.raises(GossamerError, match="is no file"):
        read_documents(tmp_path)


def test_parquet_without_the_column(tmp_path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(GossamerError, match='no column "text"; it has body'):
        read_documents(tmp_path / "a.parquet")
    parquet.write_table(arrow.table({"text": [1, 2]}), tmp_path / "b.parquet")
    with pytest.raises(GossamerError, match="does not hold strings"):
        read_documents(tmp_path / "b.parquet")


def test_parquet_without_pyarrow(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(GossamerError, match=r"pip install 'gossamer\[parquet\]'"):
        read_documents(tmp_path / "a.parquet")


def test_halves_have_equal_text():
    assert halves(["abcd"]) == (["ab"], ["cd"])
    assert halves(["ab", "cdef"]) == (["ab", "c"], ["def"])
    first, second = halves(["a", "b" * 99])
    assert len("".join(first)) == len("".join(second)) == 50


def test_a_text_in_place_of_a_path():
    with pytest.raises(GossamerError, match=r"give texts in a list, \[text\]"):
        read_documents("def f():\n    return 1\n")
