import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import gossamer.kernels  # noqa: F401  # registers the operator NM uses
from gossamer.core import (
    NM,
    Block,
    Budget,
    Channels,
    GossamerError,
    Pattern,
    Selection,
    Unstructured,
    Window,
    parse_pattern,
)

PATTERNS = [
    Unstructured("row"),
    Unstructured("layer"),
    Unstructured("model"),
    NM(2, 4),
    NM(1, 16),
    Block(16, 16),
    Block(1, 8),
    Channels("in"),
    Channels("out"),
    Window(4, 252),
    Window(0, 1),
]


def score_of(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_text_form_reads_back(pattern: Pattern):
    assert parse_pattern(str(pattern)) == pattern
    assert parse_pattern(f"  {pattern} ") == pattern


@pytest.mark.parametrize(
    "text",
    ["", "rows", "2:", ":4", "5:4", "0:4", "2:4:8", "-2:4", "block:16", "block:0x4", "channels:up",
     "window:4", "window:-1+4", "window:4+0"],
)  # fmt: skip
def test_text_that_is_no_pattern_is_refused(text: str):
    with pytest.raises(GossamerError, match=r"pattern|window"):
        parse_pattern(text)


def test_a_misspelt_pattern_is_offered_the_nearest():
    with pytest.raises(GossamerError, match="channels:in"):
        parse_pattern("channel:in")


# -- unstructured --------------------------------------------------------------------------------


@given(st.integers(1, 7), st.integers(1, 40), st.floats(0, 1), st.sampled_from(["row", "layer"]))
def test_unstructured_counts(rows: int, columns: int, sparsity: float, per: str):
    score = score_of(rows, columns, seed=columns)
    selection = Unstructured(per).select(score, Budget(sparsity=sparsity))  # type: ignore[arg-type]
    mask = selection.mask()
    if per == "row":
        assert mask.sum(1).tolist() == [round((1 - sparsity) * columns)] * rows
    else:
        assert selection.kept == round((1 - sparsity) * rows * columns)
    if mask.any() and not mask.all() and per == "layer":
        assert score[mask].min() >= score[~mask].max()


def test_rows_of_a_convolution_are_its_output_channels():
    selection = Unstructured("row").select(score_of(3, 2, 3, 3), Budget(sparsity=0.5))
    assert selection.shape == (3, 2, 3, 3)
    assert selection.mask().flatten(1).sum(1).tolist() == [9, 9, 9]


def test_a_vector_is_one_row():
    assert Unstructured("row").select(score_of(10), Budget(keep=3)).kept == 3


def test_one_competition_over_layers():
    scores = {"a": torch.tensor([[9.0, 8.0], [7.0, 1.0]]), "b": torch.tensor([[2.0, 8.0, 0.0]])}
    chosen = Unstructured("model").select_model(scores, Budget(keep=3))
    assert chosen["a"].mask().tolist() == [[True, True], [False, False]]
    assert chosen["b"].mask().tolist() == [[False, True, False]]
    assert Unstructured("model").select_model({}, Budget(keep=3)) == {}
    scores["b"][0, 0] = float("nan")
    with pytest.raises(GossamerError, match="score of b holds 1 NaN"):
        Unstructured("model").select_model(scores, Budget(keep=3))


# -- N:M -----------------------------------------------------------------------------------------


@given(st.integers(1, 9), st.data())
def test_nm_keeps_the_best_of_every_group(of: int, data: st.DataObject):
    keep = data.draw(st.integers(1, of))
    rows, groups = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5))
    score = (score_of(rows, groups * of, seed=data.draw(st.integers(0, 99))) * 3).round()
    pattern = NM(keep, of)
    selection = pattern.select(score)
    pattern.check(selection)
    assert selection.kept == rows * groups * keep == int(selection.mask().sum())
    for values, mask in zip(
        score.view(-1, of).tolist(), selection.mask().view(-1, of).tolist(), strict=True
    ):
        best = sorted(range(of), key=lambda i: (-values[i], i))[:keep]
        assert {i for i in range(of) if mask[i]} == set(best)


def test_nm_without_kernel_agrees(monkeypatch: pytest.MonkeyPatch):
    score = (score_of(6, 32) * 4).round()
    with_kernel = NM(2, 4).select(score)
    monkeypatch.setattr("gossamer.core.pattern._nm_kernel", lambda: None)
    assert NM(2, 4).select(score) == with_kernel


def test_nm_respects_protected_entries():
    score = torch.tensor([[9.0, 8.0, 7.0, 1.0]])
    protect = torch.tensor([[False, False, False, True]])
    assert NM(2, 4).select(score, protect=protect).mask().tolist() == [[True, False, False, True]]


@pytest.mark.parametrize("budget", [Budget(sparsity=0.4), Budget(keep=1), Budget(threshold=0.5)])
def test_nm_refuses_a_budget_that_says_something_else(budget: Budget):
    with pytest.raises(GossamerError, match=r"2:4 fixes the sparsity at 0\.5"):
        NM(2, 4).select(score_of(2, 8), budget)


def test_nm_takes_a_budget_that_says_the_same():
    score = score_of(2, 8)
    assert NM(2, 4).select(score, Budget(sparsity=0.5)) == NM(2, 4).select(score, Budget(keep=2))


def test_nm_refuses_a_width_it_does_not_divide_and_nan():
    with pytest.raises(GossamerError, match="divisible by 4; got 6"):
        NM(2, 4).select(score_of(2, 6))
    score = score_of(2, 8)
    score[0, 3] = float("nan")
    with pytest.raises(GossamerError, match="1 NaN of 16"):
        NM(2, 4).select(score)


def test_nm_check_counts_wrong_groups():
    mask = torch.ones(1, 8, dtype=torch.bool)
    with pytest.raises(GossamerError, match="2 of 2 groups"):
        NM(2, 4).check(Selection.from_mask(mask))


# -- blocks and channels -------------------------------------------------------------------------


def test_blocks_are_ranked_by_their_sums():
    score = torch.tensor([[1.0, 1.0, 9.0, 0.0], [1.0, 1.0, 0.0, 0.0]])
    selection = Block(2, 2).select(score, Budget(sparsity=0.5))
    assert selection.mask().tolist() == [[False, False, True, True]] * 2
    Block(2, 2).check(selection)
    with pytest.raises(GossamerError, match="in part"):
        Block(2, 4).check(selection)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), st.floats(0, 1))
def test_block_counts(high: int, wide: int, down: int, across: int, sparsity: float):
    selection = Block(high, wide).select(
        score_of(high * down, wide * across), Budget(sparsity=sparsity)
    )
    assert selection.kept == round((1 - sparsity) * down * across) * high * wide
    assert selection.kept == int(selection.mask().sum())


def test_blocks_keep_protected_tiles_and_refuse_shapes():
    protect = torch.zeros(4, 4, dtype=torch.bool)
    protect[3, 3] = True
    assert Block(2, 2).select(torch.zeros(4, 4), Budget(keep=1), protect).mask()[2:, 2:].all()
    with pytest.raises(GossamerError, match="divisible by 2 and 3; got 4x4"):
        Block(2, 3).select(torch.zeros(4, 4), Budget(keep=1))


def test_half_precision_sums_do_not_tie():
    score = torch.zeros(2, 4096, dtype=torch.bfloat16)
    score[0], score[1] = 1.0, 1.0
    score[1, 0] = 1.5  # 4096.5 and 4096 are one bfloat16
    assert Channels("out").select(score, Budget(keep=1)).mask()[1].all()
    assert Block(1, 4096).select(score, Budget(keep=1)).mask()[1].all()


@pytest.mark.parametrize("axis", ["in", "out"])
@given(sparsity=st.floats(0, 1))
def test_channel_counts(axis: str, sparsity: float):
    score = score_of(6, 10)
    pattern = Channels(axis)  # type: ignore[arg-type]
    selection = pattern.select(score, Budget(sparsity=sparsity))
    pattern.check(selection)
    channels, length = (10, 6) if axis == "in" else (6, 10)
    assert selection.kept == round((1 - sparsity) * channels) * length


def test_channels_by_summed_score():
    score = torch.tensor([[1.0, 5.0, 2.0], [1.0, 0.0, 2.0]])
    kept = Channels("in").select(score, Budget(keep=1))
    assert kept.mask().tolist() == [[False, True, False]] * 2
    with pytest.raises(GossamerError, match="in part"):
        Channels("out").check(kept)


# -- window --------------------------------------------------------------------------------------


@given(st.integers(0, 6), st.integers(1, 8), st.integers(1, 24))
def test_window_against_its_definition(sink: int, recent: int, length: int):
    pattern = Window(sink, recent)
    selection = pattern.select(torch.zeros(length, length))
    expected = [
        [k <= q and (k < sink or q - k < recent) for k in range(length)] for q in range(length)
    ]
    assert selection.mask().tolist() == expected
    assert pattern.kept_pairs(length) == selection.kept
    pattern.check(selection)


def test_the_last_queries_see_what_they_would_see_in_the_whole_map():
    whole = Window(2, 3).select(torch.zeros(9, 9)).mask()
    assert torch.equal(Window(2, 3).select(torch.zeros(4, 9)).mask(), whole[5:])


@given(st.floats(0, 0.9), st.integers(8, 64))
def test_the_widest_window_for_a_sparsity(sparsity: float, length: int):
    try:
        pattern = Window.for_sparsity(sparsity, length, sink=2)
    except GossamerError:
        assert Window(2, 1).sparsity_at(length) < sparsity
        return
    assert pattern.sparsity_at(length) >= sparsity
    if pattern.recent < length - 2:
        assert Window(2, pattern.recent + 1).sparsity_at(length) < sparsity


def test_window_refuses_budgets_and_shapes():
    with pytest.raises(GossamerError, match="leave the budget out"):
        Window().select(torch.zeros(4, 4), Budget(keep=1))
    with pytest.raises(GossamerError, match="queries"):
        Window().select(torch.zeros(5, 4))
    with pytest.raises(GossamerError, match="are removed"):
        Window(0, 2).check(Selection.from_mask(torch.eye(4, dtype=torch.bool)))


@pytest.mark.parametrize(
    ("pattern", "shape"),
    [
        (NM(2, 4), (4, 6)),
        (NM(2, 4), ()),
        (Block(2, 2), (3, 4)),
        (Channels(), (4,)),
        (Window(), (5, 4)),
    ],
)
def test_shapes_are_refused_before_anything_is_scored(pattern: Pattern, shape: tuple[int, ...]):
    with pytest.raises(GossamerError):
        pattern.check_shape(shape)


def test_infinities_rank_at_the_ends():
    score = torch.tensor([[1.0, float("inf"), -float("inf"), 2.0]])
    for pattern in (Unstructured("row"), NM(2, 4)):
        assert pattern.select(score, Budget(sparsity=0.5)).mask().tolist() == [
            [False, True, False, True]
        ]
