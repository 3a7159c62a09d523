import pytest
import torch

from gossamer.core import GossamerError
from gossamer.methods.attention.double_sparsity import DoubleSparsity, LabelSelector
from gossamer.methods.attention.executor import Call
from gossamer.methods.attention.layout import Layout
from tests.models.subjects import random_tokens
from tests.models.tiny import tiny_model


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_keys_are_ranked_by_the_labels_alone():
    key, query = normal(1, 1, 20, 4), normal(1, 2, 1, 4, seed=1)
    selector = LabelSelector(torch.tensor([[[1, 3]]]), None, 5, 1, False)
    got = selector.select(Call(query, key, key), Layout(1, 1, 20, query_offset=19), 0)
    score = torch.einsum("rd,kd->rk", query[0, :, 0, [1, 3]], key[0, 0][:, [1, 3]]) * 2**-0.5
    mass = score.softmax(-1).mean(0)
    mass[19] = 2.0
    want = mass.topk(5).indices.sort().values
    assert got.mask()[0, 0, 0].nonzero()[:, 0].tolist() == want.tolist()


def test_the_latest_keys_are_always_read():
    key, query = normal(1, 1, 20, 4), normal(1, 2, 1, 4, seed=1)
    selector = LabelSelector(torch.tensor([[[0]]]), None, 6, 4, True)
    mask = selector.select(Call(query, key, key), Layout(1, 1, 20, query_offset=19), 0).mask()
    assert mask[0, 0, 0, 16:].all()
    assert mask.sum() == 6


def test_channels_are_the_loudest_on_the_data():
    model = tiny_model("llama")
    with torch.no_grad():
        # Rotation mixes channel j with j + 4 of 8; two loud pairs stay loud.
        for layer in model.model.layers:
            weight = layer.self_attn.k_proj.weight.view(2, 8, -1)
            weight[:, [1, 5, 2, 6]] *= 30.0
    method = DoubleSparsity(channel_sparsity=0.5)
    with method.apply(model, random_tokens()) as work:
        assert work.selector.channels.tolist() == [[[1, 2, 5, 6]] * 2] * 2
        state = work.state()
    assert state.tensors["channels"].dtype == torch.int16
    assert torch.equal(
        method.replan(state.meta, state.tensors).channels, state.tensors["channels"].long()
    )


def test_at_least_one_channel_stays():
    with DoubleSparsity(channel_sparsity=0.999).apply(tiny_model("llama"), random_tokens()) as work:
        assert work.selector.channels.shape == (2, 2, 1)
        assert "labels hold 1 channels" in str(work.report())


def test_bad_input():
    with pytest.raises(GossamerError, match="channel_sparsity is 1.0"):
        DoubleSparsity(channel_sparsity=1.0)
    with pytest.raises(GossamerError, match="give it data"):
        DoubleSparsity().apply(tiny_model("llama"))
