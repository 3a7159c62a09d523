from itertools import pairwise

import pytest
import torch

from gossamer.core import GossamerError
from gossamer.methods.features.attribution.direct import direct
from gossamer.methods.features.attribution.trace import trace
from gossamer.methods.features.attribution.view import views
from gossamer.methods.features.autoencoder import Dictionary
from gossamer.methods.features.rules import TopK
from tests.methods.features.attribution.test_direct import IDS, dictionary
from tests.models.tiny import tiny_model


def streams():
    return {
        block: Dictionary.random(32, 48, TopK(5), seed=block).eval().requires_grad_(False)
        for block in range(2)
    }


def test_the_first_hop_is_the_largest_source():
    model, made = tiny_model("llama"), dictionary(32)
    hops = trace(model, {"input_ids": IDS}, made, 1, latent=7, at=6, row=1, streams={})
    (hop,) = hops
    view = views(model, {"input_ids": IDS}, (1,))[1]
    found = direct(view, made, torch.tensor([7]), torch.tensor([1]), torch.tensor([6]))
    assert hop.source == int(found.by_source.argmax())
    assert hop.given == pytest.approx(float(found.by_source.max()))
    assert hop.latent is None
    assert hop.head == int(found.parts[0, :, hop.source].argmax())
    assert str(hop).startswith(f"block 1 head {hop.head}: token {hop.source} to token 6")


def test_later_hops_start_where_the_one_before_ended():
    model, made = tiny_model("llama"), dictionary(32)
    lengths = set()
    for latent in range(24):
        hops = trace(model, {"input_ids": IDS}, made, 1, latent=latent, at=8, streams=streams())
        lengths.add(len(hops))
        assert all(hop.latent is not None for hop in hops)
        for one, other in pairwise(hops):
            assert other.block < one.block
            assert other.at == one.source >= other.source
    assert lengths == {1, 2}


def test_depth_ends_a_trace():
    model, made = tiny_model("llama"), dictionary(32)
    for latent in range(24):
        hops = trace(
            model, {"input_ids": IDS}, made, 1, latent=latent, at=8, streams=streams(), depth=1
        )
        assert len(hops) == 1
    with pytest.raises(GossamerError, match="depth is 0"):
        trace(model, {"input_ids": IDS}, made, 1, latent=0, at=8, streams={}, depth=0)
    with pytest.raises(GossamerError, match="token 9 of window 0 is not there"):
        trace(model, {"input_ids": IDS}, made, 1, latent=0, at=9, streams={})
