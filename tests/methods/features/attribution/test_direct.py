import dataclasses

import pytest
import torch

from gossamer.core import GossamerError
from gossamer.methods.features.attribution.direct import (
    attribute,
    check_sum,
    constants,
    direct,
    head_shares,
    readers,
)
from gossamer.methods.features.attribution.view import views
from gossamer.methods.features.autoencoder import Dictionary
from gossamer.methods.features.rules import ReLU
from tests.models.tiny import tiny_model

IDS = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(3))


def dictionary(width, latents=24):
    made = Dictionary.random(width, latents, ReLU(), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        made.b_enc.normal_(generator=generator)
        made.b_dec.normal_(generator=generator)
    return made.eval().requires_grad_(False)


def view_of(name="llama"):
    return views(tiny_model(name), {"input_ids": IDS}, (1,))[1]


def asked(count=40, latents=24):
    generator = torch.Generator().manual_seed(2)
    return tuple(
        torch.randint(high, (count,), generator=generator) for high in (latents, *IDS.shape)
    )


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "qwen3", "opt"])
def test_parts_and_constant_sum_to_the_pre_activation(name):
    view = view_of(name)
    made = dictionary(view.mixed.shape[2] * view.mixed.shape[3])
    latents, rows, at = asked()
    found = direct(view, made, latents, rows, at)
    given = view.mixed.flatten(2)
    wanted = torch.stack(
        [made.pre_activations(given[r, [t]])[0, i] for i, r, t in zip(*asked(), strict=True)]
    )
    torch.testing.assert_close(found.pre_activation, wanted)
    torch.testing.assert_close(
        found.parts.sum((1, 2)) + found.constant, wanted, rtol=1e-4, atol=1e-4
    )
    assert found.error.abs().max() < 1e-4
    torch.testing.assert_close(found.by_head.sum(1), found.by_source.sum(1))
    # Nothing comes from tokens that are not seen.
    later = torch.arange(IDS.shape[1]) > at[:, None]
    assert torch.equal(found.by_source[later], torch.zeros_like(found.by_source[later]))


def test_each_part_is_map_times_value_read_by_the_latent():
    view = view_of()
    made = dictionary(32)
    found = direct(view, made, torch.tensor([5]), torch.tensor([1]), torch.tensor([6]))
    reading = made.W_enc[:, 5].view(4, 8)
    for head in range(4):
        for source in range(7):
            value = view.values[1, head // 2, source]
            wanted = view.maps[1, head, 6, source] * (value @ reading[head])
            torch.testing.assert_close(found.parts[0, head, source], wanted)


def test_forgotten_constants_break_the_sum(monkeypatch):
    view, made = view_of(), dictionary(32)
    module = "gossamer.methods.features.attribution.direct.constants"
    monkeypatch.setattr(module, lambda made: made.b_enc)
    with pytest.raises(GossamerError, match="parts of a latent's pre-activation sum to"):
        direct(view, made, *asked())


def test_another_window_s_maps_break_the_sum():
    view = view_of()
    other = dataclasses.replace(view, maps=view.maps.flip(0))
    with pytest.raises(GossamerError, match="parts of a reading"):
        direct(other, dictionary(32), *asked())


def test_check_sum_allows_rounding_alone():
    parts = torch.tensor([[1.0, -1.0, 1e-6]])
    check_sum(parts, torch.zeros(1), "it", torch.float32)
    with pytest.raises(GossamerError, match="sum to 0.5, not to 0"):
        check_sum(torch.tensor([[1.0, -0.5]]), torch.zeros(1), "it", torch.float32)
    with pytest.raises(GossamerError):
        check_sum(torch.tensor([[float("nan")]]), torch.zeros(1), "it", torch.float32)


def test_constants_are_the_pre_activation_of_nothing():
    made = dictionary(32)
    torch.testing.assert_close(constants(made), made.pre_activations(torch.zeros(1, 32))[0])


def test_head_shares_are_slices_of_the_atoms():
    made = dictionary(4, 2)
    with torch.no_grad():
        made.W_dec.copy_(torch.tensor([[3.0, 4.0, 0.0, 0.0], [0.0, 1.0, 0.0, 3.0]]))
    torch.testing.assert_close(head_shares(made, 2), torch.tensor([[1.0, 0.0], [0.25, 0.75]]))


def test_wrong_questions_are_refused():
    view, made = view_of(), dictionary(32)
    one = torch.tensor([0])
    with pytest.raises(GossamerError, match="latents run from 0 to 23"):
        direct(view, made, torch.tensor([24]), one, one)
    with pytest.raises(GossamerError, match="outside the 2 windows of 9 tokens"):
        direct(view, made, one, one, torch.tensor([9]))
    with pytest.raises(GossamerError, match="reads 16 channels; 4 heads of 8"):
        direct(view, dictionary(16), one, one, one)
    with pytest.raises(GossamerError, match="2 latents, 1 windows and 1 destinations"):
        direct(view, made, torch.tensor([0, 1]), one, one)
    assert attribute(view, readers(made, one, 4), one, one).shape == (1, 4, 9)
