import torch

from gossamer.methods.attention.estimate import last_mass, tails
from gossamer.methods.attention.executor import Call
from gossamer.methods.attention.layout import Layout
from tests.methods.attention.planted import planted


def test_planted_columns_and_lags_stand_out():
    plant = planted(["columns+diagonals"], 256, repeat=2)
    vertical, slash = last_mass(plant.call, Layout(1, 256, 256), 32)
    kept = plant.kept[0]
    read = kept[-1].nonzero()[:, 0].tolist()
    columns = [c for c in read if bool(kept[c:, c].all())]
    lags = sorted(255 - c for c in read if c not in columns)
    assert sorted(vertical[0, 0].topk(len(columns)).indices.tolist()) == columns
    assert sorted(slash[0, 0].topk(len(lags)).indices.tolist()) == lags
    torch.testing.assert_close(vertical.sum(), torch.tensor(1.0))
    torch.testing.assert_close(slash.sum(), torch.tensor(1.0))


def test_padding_does_not_count_on_either_side():
    plant = planted(["sink+band"], 64)
    alone = last_mass(plant.call, Layout(1, 64, 64), 8)

    def padded(left, right):
        sides = (0, 0, left, right)
        pad = [torch.nn.functional.pad(t, sides) for t in (plant.query, plant.key, plant.value)]
        real = torch.nn.functional.pad(torch.ones(1, 64, dtype=torch.bool), (left, right))
        return pad, real

    (left, real_left), (right, real_right) = padded(5, 0), padded(0, 5)
    call = Call(*(torch.cat(pair) for pair in zip(left, right, strict=True)))
    layout = Layout(2, 69, 69, padding=torch.cat([real_left, real_right]))
    vertical, slash = last_mass(call, layout, 8)
    torch.testing.assert_close(vertical[0, :, 5:], alone[0][0])
    torch.testing.assert_close(vertical[1, :, :64], alone[0][0])
    for row in range(2):
        torch.testing.assert_close(slash[row, :, :64], alone[1][0])


def test_a_chunk_looks_at_its_own_last_queries():
    plant = planted(["band"], 64)
    call = Call(plant.query[:, :, 32:48], plant.key[:, :, :48], plant.value[:, :, :48])
    (tail,) = tails(call, Layout(1, 16, 48, query_offset=32), 4)
    torch.testing.assert_close(tail.query[0, 0, 0], plant.query[0, 0, 44:48])
    assert tail.seen.shape == (1, 1, 4, 48)
    assert tail.seen[0, 0].sum(-1).tolist() == [45, 46, 47, 48]


def test_an_empty_static_cache_is_left_out():
    plant = planted(["band"], 64)
    call = Call(plant.query[:, :, :16], plant.key, plant.value)
    vertical, _ = last_mass(call, Layout(1, 16, 64), 4)
    assert float(vertical[..., 16:].sum()) == 0.0
