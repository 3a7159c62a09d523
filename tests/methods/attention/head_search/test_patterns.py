import pytest
import torch

from gossamer.methods.attention.executor import Call
from gossamer.methods.attention.head_search import Head, Online
from gossamer.methods.attention.index import BlockIndex, WindowIndex
from gossamer.methods.attention.layout import Layout
from tests.methods.attention.planted import planted, probabilities

LENGTH, SIZE = 48, 4
PLANTS = ("columns+diagonals", "sink+band", "noise")


def online(plant, last=6, sink=2, local=3, layout=None):
    layout = layout or Layout(1, LENGTH, LENGTH)
    return Online(plant.call, layout, SIZE, last, sink, local)


def causal():
    return torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()


def test_columns_and_diagonals_by_hand():
    plant = planted(PLANTS, LENGTH, repeat=2)
    weights = probabilities(plant).mean(1)[:, -6:]
    mask = online(plant).of_all(Head("vertical_slash", 5, 6)).mask()[0]
    for head in range(len(PLANTS)):
        vertical = weights[head].sum(0)
        vertical[:2] = torch.inf
        slash = torch.zeros(LENGTH, dtype=torch.float64)
        for i in range(6):
            for j in range(LENGTH - 6 + i + 1):
                slash[LENGTH - 6 + i - j] += weights[head, i, j]
        slash[:3] = torch.inf
        want = torch.zeros(LENGTH, LENGTH, dtype=torch.bool)
        want[:, vertical.topk(5).indices] = True
        for o in slash.topk(6).indices.tolist():
            for q in range(o, LENGTH):
                i, j = q // SIZE, (q - o) // SIZE
                want[i * SIZE : (i + 1) * SIZE, j * SIZE : (j + 1) * SIZE] = True
        assert torch.equal(mask[head], want & causal()), PLANTS[head]


def test_blocks_by_hand():
    plant = planted(PLANTS, LENGTH)
    count = LENGTH // SIZE
    mask = online(plant).of_all(Head("block_sparse", 3, 1)).mask()[0]
    for head in range(len(PLANTS)):
        query, key = (t[0, head].view(count, SIZE, -1).mean(1) for t in (plant.query, plant.key))
        want = torch.zeros(count, count, dtype=torch.bool)
        for i in range(count):
            score = (query[i] @ key.T)[: i + 1]
            want[i, score.topk(min(3, i + 1)).indices] = True
        spread = want.repeat_interleave(SIZE, 0).repeat_interleave(SIZE, 1)
        assert torch.equal(mask[head], spread & causal())


@pytest.mark.parametrize(("start", "stop"), [(0, LENGTH), (17, 40)])
def test_a_shape_is_the_blocks_of_a_window(start, stop):
    plant = planted(["band"], LENGTH)
    call = Call(plant.query[:, :, start:stop], plant.key[:, :, :stop], plant.value[:, :, :stop])
    layout = Layout(1, stop - start, stop, query_offset=start)
    index = Online(call, layout, SIZE, 6, 0, 1).of_all(Head("a_shape", 3, 9))
    assert isinstance(index, BlockIndex)
    want = BlockIndex.from_index(WindowIndex(layout, 3, 9), (SIZE, SIZE))
    assert torch.equal(index.blocks(), want.blocks())


def test_heads_get_their_own_pattern_and_groups_the_union():
    plant = planted(PLANTS, LENGTH)
    one, two = Head("vertical_slash", 7, 4), Head("vertical_slash", 3, 9)
    three, four = Head("block_sparse", 2, 1), Head("a_shape", 2, 5)
    here = online(plant)
    mask = here.index([[one, two], [three], [four, one]]).mask()[0]
    alone = {head: here.of_all(head).mask()[0] for head in (one, two, three, four)}
    assert torch.equal(mask[0], alone[one][0] | alone[two][0])
    assert torch.equal(mask[1], alone[three].expand(3, -1, -1)[1])
    assert torch.equal(mask[2], alone[one][2] | alone[four].expand(3, -1, -1)[2])


def test_padding_takes_no_column():
    plant = planted(["columns+diagonals"], LENGTH)
    alone = online(plant).of_all(Head("vertical_slash", 9, 5)).mask()
    sides = (0, 0, 8, 0)
    padded = [torch.nn.functional.pad(t, sides) for t in (plant.query, plant.key, plant.value)]
    real = torch.nn.functional.pad(torch.ones(1, LENGTH, dtype=torch.bool), (8, 0))
    layout = Layout(1, LENGTH + 8, LENGTH + 8, padding=real)
    index = Online(Call(*padded), layout, SIZE, 6, 2, 3).of_all(Head("vertical_slash", 9, 5))
    assert torch.equal(index.mask()[..., 8:, 8:], alone)
    assert isinstance(index, BlockIndex)
    assert index.columns is not None
    assert (index.columns >= 8).all()


def test_dense_heads_read_everything():
    plant = planted(PLANTS, LENGTH)
    dense = Head("dense", 0, 0)
    assert online(plant).index([[dense]] * 3).whole
    mask = online(plant).index([[dense], [Head("a_shape", 1, 1)], [dense]]).mask()[0]
    assert torch.equal(mask[0], causal())
    assert mask[1].sum() < mask[0].sum()
