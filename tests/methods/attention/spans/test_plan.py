"""Spans: lengths, files, and files of other models."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.core import GossamerError
from gossamer.methods.attention.spans.plan import Spans, read_spans, round_up, write_spans

SPANS = Spans(((64.0, -32.0), (0.0, 0.0)), ((0.0, 0.5), (1.0, 0.25)), block=32)


def test_spans_grow_by_their_own_rule_in_whole_blocks():
    assert SPANS.at(0, 100) == (64, 32)
    assert SPANS.at(0, 1000) == (64, 480)
    assert SPANS.at(1, 1000) == (1024, 256)
    assert round_up(0.3 * 640, 64) == 192


@given(
    alpha=st.floats(-200, 200),
    beta=st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 1)),
    block=st.sampled_from([1, 4, 64]),
    length=st.integers(1, 1500),
)
@settings(max_examples=60, deadline=None)
def test_no_later_query_reads_before_the_reach(alpha, beta, block, length):
    spans = Spans(((alpha,),), ((beta,),), block)
    (reach,) = spans.reach(0, length)
    later = range(length, length + 700)
    oldest = min(n - spans.at(0, n)[0] for n in later)
    assert reach <= oldest
    # What is held beyond that is a block, not the text.
    far = min(n - spans.at(0, n)[0] for n in range(length, length + 4000, 7))
    assert reach >= min(oldest, far) - block - 8 or beta > 0.99


def test_a_file_gives_the_spans_back(tmp_path):
    write_spans(SPANS, tmp_path / "spans.json", repeat=2)
    stored = json.loads((tmp_path / "spans.json").read_text())
    assert stored["alphas"][0] == [64.0, 64.0, -32.0, -32.0]
    assert read_spans(tmp_path / "spans.json", [2, 2], block=32) == SPANS
    assert [p.name for p in tmp_path.iterdir()] == ["spans.json"]


def test_heads_that_share_keys_take_the_longest_span(tmp_path):
    path = tmp_path / "spans.json"
    path.write_text(json.dumps({"alphas": [[64, 0, 64, 128]], "betas": [[0, 0.5, 0.1, 0.1]]}))
    found = read_spans(path, [2])
    assert (found.alphas, found.betas) == (((0.0, 128.0),), ((0.5, 0.1),))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "no 'alphas'"),
        ("no", "no JSON"),
        ('{"alphas": [[1]], "betas": [[1]]}', "1 layers, the model has 2"),
        ('{"alphas": [[1, 1, 1], [1]], "betas": [[0, 0, 0], [0]]}', "layer 0"),
        ('{"alphas": [[1, 1], [1, 1]], "betas": [[0, 2], [0, 0]]}', "outside 0 to 1"),
    ],
)
def test_other_files_are_refused(tmp_path, text, message):
    path = tmp_path / "spans.json"
    path.write_text(text)
    with pytest.raises(GossamerError, match=message):
        read_spans(path, [2, 2])


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(GossamerError, match=r"nothing\.json"):
        read_spans(tmp_path / "nothing.json", [1])
