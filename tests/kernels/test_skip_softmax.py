"""The definition of attention that skips tiles: exact at 0, bounded loss, order of the tiles."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.core import GossamerError
from gossamer.kernels.skip_softmax import skip_softmax, skip_softmax_decode

TILE = (4, 4)


def _dense(query, key, value, offset, first, softcap=None, sinks=None):
    heads = query.shape[1]
    key, value = (x.repeat_interleave(heads // x.shape[1], 1) for x in (key, value))
    score = query @ key.transpose(2, 3) / query.shape[3] ** 0.5
    score = score if softcap is None else softcap * torch.tanh(score / softcap)
    place = torch.arange(key.shape[2])
    seen = place <= offset + torch.arange(query.shape[2])[:, None]
    seen = seen & (place >= first.view(-1, 1, 1, 1))
    score = score.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        extra = sinks.view(1, -1, 1, 1).expand(*score.shape[:-1], 1)
        score = torch.cat([score, extra], -1)
    return score, score.softmax(-1).nan_to_num(0.0)[..., : key.shape[2]] @ value


def _case(seed, queries, past, heads):
    g = torch.Generator().manual_seed(seed)
    query = 3 * torch.randn(2, heads[0], queries, 6, generator=g, dtype=torch.float64)
    key, value = (
        torch.randn(2, heads[1], queries + past, 6, generator=g, dtype=torch.float64)
        for _ in range(2)
    )
    return query, key, value, torch.randint(0, past + 1, (2,), generator=g)


@given(
    queries=st.integers(1, 14),
    past=st.integers(0, 20),
    heads=st.sampled_from([(1, 1), (4, 2)]),
    softcap=st.sampled_from([None, 4.0]),
    seed=st.integers(0, 100),
)
@settings(max_examples=30, deadline=None)
def test_no_threshold_is_dense_attention(queries, past, heads, softcap, seed):
    query, key, value, first = _case(seed, queries, past, heads)
    options = {"first": first, "softcap": softcap}
    found, count = skip_softmax(query, key, value, 0.0, query_offset=past, tile=TILE, **options)
    torch.testing.assert_close(found, _dense(query, key, value, past, first, softcap)[1])
    assert int(count[..., 0].sum()) == 0
    one = query[:, :, -1:]
    sinks = torch.arange(float(heads[0]), dtype=torch.float64)
    found, _ = skip_softmax_decode(one, key, value, 0.0, sinks=sinks, tile=4, splits=3, **options)
    last = queries + past - 1
    torch.testing.assert_close(found, _dense(one, key, value, last, first, softcap, sinks)[1])


@given(past=st.integers(8, 40), threshold=st.floats(0.001, 0.5), seed=st.integers(0, 100))
@settings(max_examples=30, deadline=None)
def test_lost_mass_is_bounded_by_what_was_skipped(past, threshold, seed):
    query, key, _, first = _case(seed, 8, past, (2, 1))
    marks = torch.eye(past + 8, dtype=torch.float64).expand(2, 1, -1, -1)
    kept, count = skip_softmax(
        query, key, marks, threshold, query_offset=past, first=first, tile=TILE
    )
    score, dense = _dense(query, key, marks, past, first)
    lost = torch.where(kept == 0, dense, 0.0).sum(-1)
    skipped = count[..., 0].repeat_interleave(TILE[0], 2)[..., :8]
    # Each lost weight is below threshold times the largest of its row.
    largest = score.softmax(-1).amax(-1)
    assert bool((lost <= skipped * TILE[1] * threshold * largest + 1e-9).all())
    held = torch.where(kept == 0, 0.0, dense)
    torch.testing.assert_close(kept, held / held.sum(-1, keepdim=True))


def test_first_and_diagonal_tiles_come_first_and_stay() -> None:
    query, key = torch.ones(1, 1, 4, 4), torch.zeros(1, 1, 16, 4)
    key[:, :, 5] = 9.0  # tile 1
    key[:, :, 9] = 4.0  # tile 2: 10 below
    key[:, :, 13] = 8.0  # diagonal
    found, count = skip_softmax(
        query, key, torch.eye(16)[None, None], 1e-3, query_offset=12, tile=TILE
    )
    # Tile 1 is above all; tile 2 is skipped beside it; tile 0 was read before it was known.
    assert count.flatten().tolist() == [1, 4]
    assert bool((found[0, 0, :, 8:12] == 0).all())
    assert bool((found[0, 0, :, :8] > 0).all())


def test_errors_name_what_is_wrong() -> None:
    x = torch.randn(1, 2, 8, 4)
    with pytest.raises(GossamerError, match=r"threshold is 1\.5"):
        skip_softmax(x, x, x, 1.5)
    with pytest.raises(GossamerError, match="8 queries from key 4 on need as many keys"):
        skip_softmax(x, x, x, 0.1, query_offset=4)
    with pytest.raises(GossamerError, match="the kernel needs CUDA"):
        skip_softmax(x, x, x, 0.1, backend="triton")
    with pytest.raises(GossamerError, match="one query a row"):
        skip_softmax_decode(x, x, x, 0.1)
