import math

import pytest
import torch

from gossamer.core import GossamerError
from gossamer.methods.attention.executor import Call
from gossamer.methods.attention.flexprefill import FlexPrefill
from gossamer.methods.attention.index import BlockIndex
from gossamer.methods.attention.layout import Layout
from gossamer.methods.attention.measure import kept_mass
from tests.methods.attention.planted import planted, probabilities

PLANTS = ("sink+band", "columns+diagonals", "blocks", "band", "noise")


def blocks_of(call, layout, **fields):
    selector = FlexPrefill(**{"block_size": 16, "budget_tokens": 16, **fields}).plan(None, None, 0)
    index = selector.select(call, layout, 0)
    assert isinstance(index, BlockIndex)
    return index.blocks()


def fewest(mass, gamma, least):
    """The largest entries until gamma is reached, by hand."""
    order = sorted(range(len(mass)), key=lambda i: (-mass[i], i))
    kept, total = [], 0.0
    for place in order:
        if kept and total >= gamma and len(kept) >= least:
            break
        kept.append(place)
        total += mass[place]
    return set(kept)


def by_hand(plant, head, size, gamma, tau, least):
    """The algorithm for one head in plain loops: (query-aware, set of blocks)."""
    weights = probabilities(plant)[head, 0]
    length = len(weights)
    count = length // size
    tail = weights[-size:]
    vertical = [float(tail[:, j * size : (j + 1) * size].sum()) / size for j in range(count)]
    slash = [0.0] * count
    for i in range(size):
        for j in range(length - size + i + 1):
            apart = length - size + i - j
            share = (apart % size) / size
            slash[apart // size] += float(tail[i, j]) * (1 - share) / size
            over = min(apart // size + 1, count - 1)
            slash[over] += float(tail[i, j]) * share / size
    query = plant.query[0, head].double().view(count, size, -1).mean(1)
    key = plant.key[0, head].double().view(count, size, -1).mean(1)
    score = query @ key.T / math.sqrt(key.shape[1])
    guess = (
        plant.query[0, head, -size:].double().mean(0) @ key.T / math.sqrt(key.shape[1])
    ).softmax(0)
    true = torch.tensor(vertical)
    middle = (guess + true) / 2
    divergence = sum(torch.special.xlogy(p, p / middle).sum() / 2 for p in (guess, true))
    aware = math.sqrt(max(0.0, float(divergence))) < tau
    columns = fewest(vertical, 0.0 if aware else gamma, least)
    diagonals = fewest(slash, 0.0 if aware else gamma, least)
    kept = {
        (i, j) for i in range(count) for j in range(i + 1) if j in columns or i - j in diagonals
    }
    kept |= {(i, i) for i in range(count)} | {(i, 0) for i in range(count)}
    if aware:
        causal = torch.ones(count, count, dtype=torch.bool).tril()
        share = score.masked_fill(~causal, -torch.inf).softmax(1) / count
        flat = fewest(share.flatten().tolist(), gamma, 1)
        kept |= {(p // count, p % count) for p in flat if p // count >= p % count}
    return aware, kept


@pytest.mark.parametrize("gamma", [0.6, 0.9])
def test_blocks_are_those_found_by_hand(gamma):
    plant = planted(PLANTS, 256)
    blocks = blocks_of(plant.call, Layout(1, 256, 256), gamma=gamma, budget_tokens=32)[0]
    for head, name in enumerate(PLANTS):
        aware, kept = by_hand(plant, head, 16, gamma, 0.1, 2)
        assert aware == (name in ("blocks", "noise")), name
        assert {tuple(pair) for pair in blocks[head].nonzero().tolist()} == kept, name


def test_more_gamma_keeps_more_mass_and_about_gamma():
    plant = planted(PLANTS, 512)
    layout, before = Layout(1, 512, 512), torch.zeros(len(PLANTS))
    for gamma in (0.5, 0.8, 0.9, 0.99):
        selector = FlexPrefill(gamma=gamma, block_size=16, budget_tokens=16).plan(None, None, 0)
        mass = kept_mass(plant.call, selector.select(plant.call, layout, 0))
        assert (mass >= before).all()
        assert (mass >= gamma - 0.05).all()
        before = mass


def test_tau_zero_trusts_no_block_means():
    plant = planted(["blocks"], 256)
    selector = FlexPrefill(block_size=16, budget_tokens=16, tau=0.0).plan(None, None, 0)
    assert not selector.query_aware(plant.call, Layout(1, 256, 256)).any()


def test_short_prompts_and_gamma_one_stay_full():
    plant = planted(["band"], 64)
    layout = Layout(1, 64, 64)
    for fields in ({"gamma": 1.0}, {"block_size": 32}, {"budget_tokens": 64}):
        method = FlexPrefill(**{"block_size": 16, "budget_tokens": 16, **fields})
        assert method.plan(None, None, 0).select(plant.call, layout, 0).whole


def test_padding_of_whole_blocks_moves_the_blocks():
    plant = planted(PLANTS, 128)
    alone = blocks_of(plant.call, Layout(1, 128, 128))

    def padded(left, right):
        real = torch.nn.functional.pad(torch.ones(1, 128, dtype=torch.bool), (left, right))
        sides = (0, 0, left, right)
        tensors = [
            torch.nn.functional.pad(t, sides, value=3.0)
            for t in (plant.query, plant.key, plant.value)
        ]
        return tensors, real

    (left, real_left), (right, real_right) = padded(32, 0), padded(0, 32)
    call = Call(*(torch.cat(pair) for pair in zip(left, right, strict=True)))
    layout = Layout(2, 160, 160, padding=torch.cat([real_left, real_right]))
    both = blocks_of(call, layout)
    assert torch.equal(both[0, :, 2:, 2:], alone[0])
    assert torch.equal(both[1, :, :8, :8], alone[0])


def test_every_chunk_reads_its_own_keys_and_the_first():
    plant = planted(PLANTS, 128, repeat=2)
    for start, stop in ((0, 48), (40, 99), (99, 128)):
        call = Call(plant.query[:, :, start:stop], plant.key[:, :, :stop], plant.value[:, :, :stop])
        layout = Layout(1, stop - start, stop, query_offset=start)
        mask = FlexPrefill(gamma=0.3, block_size=16, budget_tokens=16).plan(None, None, 0)
        mask = mask.select(call, layout, 0).mask()[0]
        assert mask.shape == (len(PLANTS), stop - start, stop)
        at = torch.arange(stop - start)
        assert mask[:, at, at + start].all()
        assert mask[:, :, 0].all()


@pytest.mark.parametrize("fields", [{"gamma": 0.0}, {"gamma": 1.5}, {"tau": -1}, {"block_size": 0}])
def test_impossible_parameters_are_refused(fields):
    with pytest.raises(GossamerError, match=next(iter(fields))):
        FlexPrefill(**fields)


def test_sinks_do_not_make_every_diagonal_read():
    plant = planted(["sink+band"], 512)
    kept = blocks_of(plant.call, Layout(1, 512, 512))[0, 0]
    assert int(kept.sum()) < 0.2 * 32 * 33 / 2
