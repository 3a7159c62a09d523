"""Correlations kept batch by batch are those of all batches, weighted."""

from threading import Barrier, Thread, current_thread

import pytest
import torch

from gossamer.methods.training.modular import correlation
from gossamer.methods.training.modular.correlation import Comoments

CPU = torch.device("cpu")


def batches(count=6, rows=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for index in range(count):
        common = torch.randn(rows, 1, generator=generator, dtype=torch.float64)
        before = torch.randn(rows, 4, generator=generator, dtype=torch.float64)
        behind = torch.randn(rows, 3, generator=generator, dtype=torch.float64)
        before[:, 1] += 2 * common[:, 0] + index
        behind[:, 2] -= common[:, 0] + 0.3 * index
        yield before, behind


def reference(parts, decay):
    """Pearson correlations of all rows, each batch weighted as the average weighs it."""
    parts = list(parts)
    weights = [(1 - decay) * decay ** (len(parts) - 1 - i) for i in range(len(parts))]
    weights[0] = decay ** (len(parts) - 1)
    row = torch.cat(
        [torch.full((len(b),), w / len(b)) for (b, _), w in zip(parts, weights, strict=True)]
    ).double()
    before, behind = (torch.cat(side) for side in zip(*parts, strict=True))
    before = before - row @ before
    behind = behind - row @ behind
    covariance = (behind * row[:, None]).T @ before
    spread = [(row @ side.square()).sqrt() for side in (behind, before)]
    return covariance / spread[0][:, None] / spread[1]


def moments(parts, decay=0.9):
    found = Comoments((3, 4), decay, CPU)
    for before, behind in parts:
        found.update(before.float(), behind.float())
    return found


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
def test_weighted_pearson_correlation(decay):
    found = moments(batches(), decay).correlation().double()
    assert torch.allclose(found, reference(batches(), decay), atol=1e-5)


def test_one_batch_is_plain_correlation():
    (before, behind) = next(batches())
    found = moments([(before, behind)]).correlation().double()
    whole = torch.corrcoef(torch.cat([behind, before], 1).T)[:3, 3:]
    assert torch.allclose(found, whole, atol=1e-6)


def test_units_far_from_zero_lose_nothing():
    parts = [(before + 1e4, behind - 3e3) for before, behind in batches()]
    exact = reference(((b + 1e4, a - 3e3) for b, a in batches()), 0.9)
    assert torch.allclose(moments(parts).correlation().double(), exact, atol=1e-2)


def test_dead_and_constant_units_have_no_correlation():
    parts = []
    for before, behind in batches():
        before[:, 0], behind[:, 1] = 0.0, 123456.7
        parts.append((before, behind))
    found = moments(parts).correlation()
    assert found.isfinite().all()
    assert not found[:, 0].any()
    assert not found[1].any()
    assert abs(float(found[2, 1])) > 0.4


def test_batches_without_numbers_are_left_out():
    parts = list(batches())
    broken = parts[2][0].clone()
    broken[3, 1] = torch.inf
    empty = (torch.zeros(0, 4).double(), torch.zeros(0, 3).double())
    some = [*parts[:2], (broken, parts[2][1]), empty, *parts[3:]]
    expected = moments([*parts[:2], *parts[3:]])
    assert torch.equal(moments(some).correlation(), expected.correlation())
    assert not Comoments((3, 4), 0.9, CPU).correlation().any()


@pytest.fixture
def two_processes(monkeypatch):
    """Two threads in the place of processes: sums wait until both have given their part."""
    meet, given = Barrier(2), {}

    def summed(tensor):
        given[current_thread().name] = tensor
        meet.wait()
        total = sum(given.values())
        meet.wait()
        return total

    monkeypatch.setattr(correlation, "world", lambda: 2)
    monkeypatch.setattr(correlation, "_summed", summed)

    def run(parts):
        threads = [Thread(target=part.pool, name=str(i)) for i, part in enumerate(parts)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    return run


def test_processes_pool_what_they_saw(two_processes):
    sides = zip(*(next(batches(seed=rank)) for rank in range(2)), strict=True)
    joined = tuple(torch.cat(side) for side in sides)
    parts = [moments([next(batches(seed=rank))]) for rank in range(2)]
    two_processes(parts)
    for part in parts:
        assert torch.allclose(part.correlation().double(), reference([joined], 0.9), atol=1e-5)


def test_a_process_that_saw_nothing_takes_no_part(two_processes):
    parts = [moments([next(batches())]), Comoments((3, 4), 0.9, CPU)]
    alone = parts[0].correlation()
    two_processes(parts)
    for part in parts:
        assert torch.allclose(part.correlation(), alone, atol=1e-6)
