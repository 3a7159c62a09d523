"""Parameters at work, counted and averaged over tokens."""

import pytest
import torch
from torch import nn

from gossamer.core import GossamerError
from gossamer.methods.training.scaling.parameters import average_parameters, count_parameters
from gossamer.methods.training.sparse_pretraining import SparsePretraining
from tests.models.tiny import tiny_model


def test_the_average_is_over_tokens():
    assert average_parameters([(1.0, 10.0), (3.0, 2.0)]) == 4.0
    assert average_parameters([(0.0, 99.0), (5.0, 7.0)]) == 7.0


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ([], "no tokens"),
        ([(0.0, 5.0)], "no tokens"),
        ([(-1.0, 5.0)], "stretch"),
        ([(1.0, float("nan"))], "stretch"),
    ],
)
def test_no_schedule_is_refused(schedule, message):
    with pytest.raises(GossamerError, match=message):
        average_parameters(schedule)


def test_matrices_of_the_vocabulary_are_in_or_out():
    model = tiny_model("llama")
    everything = sum(p.numel() for p in model.parameters())
    vocabulary = {
        id(p): p.numel()
        for module in (model.get_input_embeddings(), model.get_output_embeddings())
        for p in module.parameters()
    }
    inside, outside = (count_parameters(model, embeddings=e) for e in (True, False))
    assert inside.total == everything
    assert outside.total == everything - sum(vocabulary.values())
    assert inside.removable == outside.removable
    assert outside.others == sum(p.numel() for n, p in model.named_parameters() if "norm" in n)


def test_skipped_layers_are_others():
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 2))
    count = count_parameters(model, skip="1")
    assert (count.removable, count.others) == (100, 10 + 22)


def test_operations_of_a_training_are_six_times_average_times_tokens():
    # With every parameter in a pruned layer without bias, C = 6 N̄ D holds to the last digit.
    model = nn.Sequential(nn.Linear(20, 30, bias=False), nn.Linear(30, 10, bias=False))
    trains = torch.optim.SGD(model.parameters(), lr=0.1)
    method = SparsePretraining(sparsity=0.8, steps=60, every=3)
    sparsifier = method.attach(model, trains)
    for _ in range(60):
        model(torch.ones(2, 20)).sum().backward()
        trains.step()
        sparsifier.step()
        trains.zero_grad()
    count = count_parameters(model)
    mean = average_parameters(method.active_parameters(count.removable, count.others))
    assert sparsifier.flops.total == pytest.approx(6 * mean * 60, rel=1e-3)
    assert sparsifier.flops.share == pytest.approx(method.share, abs=2e-3)
