import pytest
import torch

from gossamer.core import GossamerError
from gossamer.evaluate import windows
from gossamer.models import Tokens


def tokens(rows: list[list[int]], pad: int = -1) -> Tokens:
    ids = torch.tensor(rows)
    return Tokens(ids.clamp_min(0), ids != pad)


def test_disjoint_windows_score_all_but_the_first_real_token():
    cut = windows(tokens([[5, 6, 7, 8], [9, 3, -1, -1], [-1, -1, 4, 2]]))
    assert cut.scored.tolist() == [
        [False, True, True, True],
        [False, True, False, False],
        [False, False, False, True],
    ]
    assert (cut.count, cut.context, cut.stride) == (5, 4, 4)


def test_sliding_windows_by_hand():
    # Joined: 0 1 2 3 4 5 6 7 8 9 (ten tokens), windows of 4, stride 2.
    cut = windows(tokens([[0, 1, 2, 3], [4, 5, -1, -1], [6, 7, 8, 9]]), stride=2)
    assert cut.input_ids.tolist() == [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 7], [6, 7, 8, 9]]
    assert cut.input_ids[cut.scored].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert cut.attention_mask.all()


def test_the_last_window_is_moved_back_to_the_end():
    # 8 tokens, windows of 4, stride 3: starts 0, 3 and then 4 instead of 6.
    cut = windows(tokens([[0, 1, 2, 3], [4, 5, 6, 7]]), stride=3)
    assert cut.input_ids[:, 0].tolist() == [0, 3, 4]
    assert cut.input_ids[cut.scored].tolist() == [1, 2, 3, 4, 5, 6, 7]
    # Token 7 alone is new in the last window.
    assert cut.scored[2].tolist() == [False, False, False, True]


@pytest.mark.parametrize("stride", range(1, 9))
def test_sliding_scores_every_token_once_with_enough_context(stride: int):
    total, length = 29, 8
    ids = torch.arange(32).view(4, 8)
    mask = ids < total
    cut = windows(Tokens(ids, mask), stride=stride)
    position = cut.input_ids  # token equals its position in the text
    seen = position[cut.scored]
    # Disjoint windows lose their first token; the last one is moved back over its own.
    lost = {0, 8, 16} if stride == length else {0}
    assert sorted(seen.tolist()) == sorted(set(range(total)) - lost)
    before = cut.scored.nonzero()
    later = before[before[:, 0] > 0]
    assert bool((later[:, 1] >= length - stride).all())


def test_text_shorter_than_a_window():
    cut = windows(tokens([[3, 1, -1, -1]]), stride=2)
    assert cut.input_ids.tolist() == [[3, 1]]
    assert cut.count == 1


@pytest.mark.parametrize("stride", [0, -1, 5, 1.5])
def test_impossible_stride(stride: object):
    with pytest.raises(GossamerError, match="stride is"):
        windows(tokens([[1, 2, 3, 4]]), stride=stride)  # type: ignore[arg-type]


@pytest.mark.parametrize("stride", [None, 1])
def test_nothing_to_score(stride: int | None):
    with pytest.raises(GossamerError, match="no token can be scored"):
        windows(tokens([[1, -1]]), stride=stride)


def test_fingerprint_sees_tokens_padding_and_stride():
    base = tokens([[1, 2, 3, 4], [5, 6, 7, 8]])
    prints = {
        windows(base).fingerprint(),
        windows(base, stride=2).fingerprint(),
        windows(tokens([[1, 2, 3, 4], [5, 6, 7, 9]])).fingerprint(),
        windows(tokens([[1, 2, 3, 4], [5, 6, 7, -1]])).fingerprint(),
    }
    assert len(prints) == 4
    assert windows(base).fingerprint() == windows(base).fingerprint()
