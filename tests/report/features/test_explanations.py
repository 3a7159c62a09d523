import gzip
import json
from pathlib import Path

import pytest

from gossamer.core import GossamerError
from gossamer.report.features import read_explanations


def test_every_form_people_keep(tmp_path: Path):
    plain = tmp_path / "a.json"
    plain.write_text('{"12": "brackets", "3": {"explanation": " dots ", "score": 0.5}}')
    assert read_explanations(plain) == {12: "brackets", 3: "dots"}
    rows = [{"index": "4", "description": "tabs"}, {"feature_index": 9, "text": "ü"}]
    listed = tmp_path / "b.json"
    listed.write_text(json.dumps(rows))
    assert read_explanations(listed) == {4: "tabs", 9: "ü"}
    lines = tmp_path / "c.jsonl.gz"
    lines.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    assert read_explanations(lines) == {4: "tabs", 9: "ü"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no readable JSON"),
        ('{"twelve": "brackets"}', "holds .*twelve"),
        ('[{"index": 4}]', "index and description"),
        ("[7]", "holds '7'"),
    ],
)
def test_anything_else_is_one_line(tmp_path: Path, text: str, message: str):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(GossamerError, match=message) as caught:
        read_explanations(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file(tmp_path: Path):
    with pytest.raises(GossamerError, match="no readable JSON"):
        read_explanations(tmp_path / "none.json")
