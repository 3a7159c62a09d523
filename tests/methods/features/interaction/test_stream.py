import pytest
import torch

from gossamer.core import GossamerError
from gossamer.methods.features.hooks import record
from gossamer.methods.features.interaction.basis import pca_basis
from gossamer.methods.features.interaction.stream import _listening, stream_bases, stream_edges
from gossamer.models import Tokens
from tests.models.tiny import tiny_model

PATHS = ("model.layers.0", "model.layers.1")
IDS = torch.randint(3, 128, (3, 6), generator=torch.Generator().manual_seed(3))
TOKENS = Tokens.from_ids(IDS)


def whole_jacobians(model):
    """(B, T', D', T, D) of the second block's output by the first's, one gradient at a time."""
    leaf = record(model, PATHS[:1], {"input_ids": IDS})[PATHS[0]].requires_grad_()
    out = []
    first = model.model.layers[0].register_forward_hook(lambda m, a, o: leaf)
    second = model.model.layers[1].register_forward_hook(lambda m, a, o: out.append(o))
    with torch.enable_grad():
        model(input_ids=IDS)
    first.remove()
    second.remove()
    found = torch.zeros(3, 6, 32, 6, 32, dtype=torch.float64)
    for at in range(6):
        for channel in range(32):
            (grad,) = torch.autograd.grad(out[0][:, at, channel].sum(), leaf, retain_graph=True)
            found[:, at, channel] = grad.double()
    return found


def test_random_signs_agree_with_whole_jacobians():
    model = tiny_model("llama")
    rows = record(model, PATHS[1:], {"input_ids": IDS})[PATHS[1]].flatten(0, 1)
    after, slopes = pca_basis(rows), whole_jacobians(model)
    heard = torch.einsum("btdsc,dk->btksc", slopes, after.into)
    wanted = torch.einsum("btksc,btkse->ce", heard, heard) / IDS.numel()
    batches = [{"input_ids": IDS}]
    found = _listening(model, *PATHS, after, batches, 400, 0)
    assert (found - wanted).norm() < 0.1 * wanted.norm()
    assert not any(m._forward_hooks for m in model.modules())

    (basis, _) = stream_bases(model, PATHS, TOKENS, draws=1)
    exact = torch.einsum("btksc,jc->btksj", heard, basis.back).square().sum((0, 1, 3)) / IDS.numel()
    many = torch.stack(
        [stream_edges(model, *PATHS, basis, after, TOKENS, seed=s) for s in range(12)]
    ).mean(0)
    assert (many - exact).norm() < 0.15 * exact.norm()


def test_padding_is_left_out():
    model = tiny_model("llama")
    mask = torch.ones_like(IDS, dtype=torch.bool)
    mask[:, 4:] = False
    padded = stream_bases(model, PATHS, Tokens(IDS, mask), draws=2)
    short = stream_bases(model, PATHS, Tokens.from_ids(IDS[:, :4]), draws=2)
    torch.testing.assert_close(padded[1].mean, short[1].mean, rtol=1e-4, atol=1e-5)


def test_modules_out_of_order_are_refused():
    with pytest.raises(GossamerError, match="does not follow from"):
        stream_bases(tiny_model("llama"), PATHS[::-1], TOKENS)
