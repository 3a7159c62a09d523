import pytest
import torch

from gossamer.methods.attention.decoding.labels import (
    channel_loads,
    decode_labels,
    encode_labels,
    label_weights,
    remembered_labels,
)
from gossamer.methods.attention.executor import Call
from gossamer.methods.attention.layout import Layout
from gossamer.methods.attention.memory import LayerState


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_loads_by_hand():
    query = torch.tensor([[1.0, -2.0], [3.0, 0.0]]).view(1, 1, 2, 1, 2)
    key = torch.tensor([[-4.0, 5.0]]).view(1, 1, 1, 2)
    assert channel_loads(query, key).tolist() == [[2 * 4.0, 1 * 5.0]]
    assert channel_loads(query, key, torch.tensor([[False]])).tolist() == [[0.0, 0.0]]


def test_loads_pair_a_query_with_its_own_key():
    query, key = normal(2, 3, 2, 5, 4), normal(2, 3, 5, 4, seed=1)
    want = torch.zeros(3, 4, dtype=torch.double)
    for b in range(2):
        for g in range(3):
            for t in range(5):
                want[g] += (query[b, g, :, t].abs().mean(0) * key[b, g, t].abs()).double()
    torch.testing.assert_close(channel_loads(query, key), want)


@pytest.mark.parametrize("channels", [1, 4, 5])
def test_four_bit_labels_come_back_within_half_a_step(channels):
    labels = normal(2, 3, 7, channels)
    codes, scale = encode_labels(labels)
    assert codes.shape == (2, 3, 7, -(-channels // 2))
    back = decode_labels(codes, scale, channels)
    assert ((back - labels).abs() <= scale[..., :1] / 2 * 1.0001 + 1e-7).all()


def test_all_channels_give_the_true_weights():
    query, key = normal(1, 2, 2, 1, 4), normal(1, 2, 6, 4, seed=1)
    seen = torch.ones(1, 1, 1, 6, dtype=torch.bool)
    seen[..., 5] = False
    got = label_weights(query, key, 0.5, seen)
    score = torch.einsum("bgrqd,bgkd->bgrqk", query, key)[..., :5] * 0.5
    torch.testing.assert_close(got[..., :5], score.softmax(-1).mean(2))
    assert (got[..., 5] == 0).all()


@pytest.mark.parametrize("quantized", [False, True])
def test_appending_equals_building_anew(quantized):
    key, channels = normal(2, 2, 40, 6), torch.tensor([[0, 3, 5], [1, 2, 4]])
    state = LayerState()
    for end in (1, 2, 9, 10, 40):
        call = Call(normal(2, 2, 1, 6), key[:, :, :end], key[:, :, :end], state=state)
        layout = Layout(2, 1, end, query_offset=end - 1)
        got = remembered_labels(call, layout, channels, quantized)
        fresh = remembered_labels(
            Call(call.query, call.key, call.value), layout, channels, quantized
        )
        assert torch.equal(got, fresh)
    assert state.seen == 40
    if not quantized:
        assert torch.equal(got[:, 1], key[:, 1][..., [1, 2, 4]])


def test_room_of_a_static_cache_is_left_alone():
    key, channels = normal(1, 1, 12, 4), torch.tensor([[0, 1]])
    call = Call(normal(1, 1, 1, 4), key, key)
    labels = remembered_labels(call, Layout(1, 1, 12, query_offset=6), channels, False)
    assert labels.shape == (1, 1, 12, 2)
    assert call.state.seen == 7
    assert (labels[:, :, 7:] == 0).all()
