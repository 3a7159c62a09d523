"""Relative drift, by hand and on a model."""

import torch

from gossamer.methods.attention.token_choice.drift import (
    calm_layers,
    profile_drift,
    relative_drift,
)
from gossamer.models import Tokens
from tests.models.subjects import random_tokens
from tests.models.tiny import tiny_model


def test_drift_is_relative_to_the_input():
    before = torch.tensor([[[3.0, 4.0], [0.0, 2.0]]])
    after = torch.tensor([[[3.0, 9.0], [0.0, 1.0]]])
    assert relative_drift(before, after) == 0.75
    assert relative_drift(before, after, torch.tensor([[True, False]])) == 1.0


def test_the_calmest_layers_are_taken():
    assert calm_layers([3.0, 1.0, 2.0, 4.0], 0.5) == (1, 2)
    assert calm_layers([3.0, 1.0, 2.0, 4.0], 1.0) == (0, 1, 2, 3)
    assert calm_layers([3.0, 1.0, 2.0, 4.0], 0.0) == (1,)


def test_a_profile_is_what_hidden_states_say():
    model, tokens = tiny_model("llama"), random_tokens()
    found = profile_drift(model, tokens)
    assert not any(m._forward_hooks for m in model.modules())
    with torch.no_grad():
        hidden = model.base_model(tokens.input_ids, output_hidden_states=True).hidden_states
    first = relative_drift(hidden[0], hidden[1])
    assert abs(found[0] - first) < 1e-4
    assert len(found) == 2


def test_padding_does_not_count():
    model, ids = tiny_model("llama"), random_tokens().input_ids[:1]
    mask = torch.ones_like(ids).bool()
    padded = torch.nn.functional.pad(ids, (8, 0))
    with_padding = Tokens(padded, torch.nn.functional.pad(mask, (8, 0)))
    for a, b in zip(
        profile_drift(model, Tokens(ids, mask)), profile_drift(model, with_padding), strict=True
    ):
        assert abs(a - b) < 1e-4
