"""CRATE: blocks against their formulas, rates against determinants, models of both kinds."""

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from gossamer.core import GossamerError
from gossamer.methods.activations.crate import CRATE
from gossamer.methods.activations.crate_blocks.block import ISTA, MSSA, CRATEBlock
from gossamer.methods.activations.crate_blocks.rates import coding_rate, compressed_rate
from gossamer.models import Inputs
from tests.models.clips import labelled_images
from tests.models.subjects import random_tokens
from tests.models.tiny import DECODERS, tiny_model


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_ista_is_one_step_on_the_columns_of_the_paper():
    ista = ISTA(5, step=0.1, penalty=0.3).double()
    x = noise(2, 3, 5)
    D = ista.dictionary.detach()
    for row, out in zip(x.view(-1, 5), ista(x).detach().view(-1, 5), strict=True):
        wanted = row + 0.1 * (D.T @ row - D.T @ D @ row) - 0.1 * 0.3
        assert torch.allclose(out, wanted.clamp_min(0), atol=1e-12)
        other = row + 0.1 * (D.T @ row - D @ D.T @ row) - 0.1 * 0.3
        assert not torch.allclose(out, other.clamp_min(0), atol=1e-3)


@pytest.mark.parametrize("causal", [False, True])
def test_mssa_uses_one_projection_for_all(causal):
    mssa = MSSA(6, 2).double()
    x = noise(2, 4, 6)
    parts = []
    for head in range(2):
        p = x @ mssa.subspaces.weight[3 * head : 3 * head + 3].T
        scores = p @ p.mT / 3**0.5
        if causal:
            scores = scores.masked_fill(torch.ones(4, 4).triu(1).bool(), float("-inf"))
        parts.append(scores.softmax(-1) @ p)
    wanted = torch.cat(parts, -1) @ mssa.join.weight.T + mssa.join.bias
    assert torch.allclose(mssa(x, causal=causal), wanted, atol=1e-12)
    assert len(list(mssa.parameters())) == 3


def test_the_block_has_a_residual_around_compression_only():
    block = CRATEBlock(6, 2).double()
    z = noise(2, 4, 6)
    middle = z + block.compress(F.layer_norm(z, (6,)))
    wanted = block.sparsify(F.layer_norm(middle, (6,)))
    assert torch.allclose(block(z), wanted, atol=1e-12)
    assert bool((block(z) >= 0).all())


def test_heads_divide_the_width():
    with pytest.raises(GossamerError, match="heads is 4; give a divisor of the width 6"):
        MSSA(6, 4)


@pytest.mark.parametrize("shape", [(3, 7), (7, 3)])
def test_coding_rate_is_the_determinant(shape):
    z = noise(*shape)
    n, d = shape
    wanted = 0.5 * torch.logdet(torch.eye(d).double() + d / (n * 0.25) * z.T @ z)
    assert torch.allclose(coding_rate(z, 0.5), wanted)
    assert float(coding_rate(torch.zeros(n, d))) == 0


def test_compressed_rate_sums_over_subspaces():
    mssa = MSSA(6, 2).double()
    z = noise(2, 5, 6)
    wanted = torch.zeros(2).double()
    for head in range(2):
        p = (z @ mssa.subspaces.weight[3 * head : 3 * head + 3].T).detach()
        gram = torch.eye(3).double() + 3 / (5 * 0.25) * p.mT @ p
        wanted += 0.5 * torch.logdet(gram)
    assert torch.allclose(compressed_rate(z, mssa, 0.5), wanted)


def test_a_model_in_orthogonal_subspaces_has_the_lowest_compressed_rate():
    mssa = MSSA(4, 2).double()
    with torch.no_grad():
        mssa.subspaces.weight.copy_(torch.eye(4))
    inside, across = torch.zeros(8, 4).double(), torch.zeros(8, 4).double()
    inside[:, 0] = 1.0
    across[:4, 0] = across[4:, 2] = 1.0
    rates = compressed_rate(torch.stack([inside, across]), mssa)
    assert bool(rates[0] < rates[1])


@pytest.mark.parametrize("name", DECODERS)
def test_language_models_stay_causal_and_generate_with_a_cache(name):
    model = tiny_model(name)
    dense = model(random_tokens().input_ids).logits.detach()
    with CRATE(steps=0).apply(model, random_tokens()) as work, torch.no_grad():
        ids = random_tokens(3).input_ids[:2, :10]
        whole = model(ids).logits
        assert torch.allclose(model(ids[:, :6]).logits, whole[:, :6], atol=1e-5)
        options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        cached = model.generate(ids, **options)
        assert torch.equal(cached, model.generate(ids, use_cache=False, **options))
        assert any("untrained" in text for text in work.report().warnings)
    assert torch.equal(model(random_tokens().input_ids).logits, dense)


def test_padding_on_the_left_changes_nothing():
    model = tiny_model("llama")
    with CRATE(steps=0).apply(model, random_tokens()), torch.no_grad():
        ids = random_tokens(3).input_ids[:2]
        mask = torch.ones_like(ids)
        mask[:, :5] = 0
        found = model(ids, attention_mask=mask).logits[:, 5:]
        assert torch.allclose(found, model(ids[:, 5:]).logits, atol=1e-5)


def test_training_lowers_the_loss_of_both_kinds():
    for name, data in (("vit", labelled_images()), ("llama", random_tokens())):
        model = tiny_model(name)
        with CRATE(steps=40, lr=3e-3, batch_size=6).apply(model, data) as work:
            assert work.losses[-1] < 0.8 * work.losses[0]
            assert 0.2 < work.report().sparsity < 0.95
            assert not work.report().warnings[1:]


def test_blocks_have_a_quarter_of_the_parameters():
    model = tiny_model("vit")
    usual = sum(p.numel() for p in model.vit.layers.parameters())
    with CRATE(steps=0).apply(model, labelled_images()):
        assert sum(p.numel() for p in model.vit.layers.parameters()) < 0.45 * usual


def test_stored_blocks_of_another_width_are_refused():
    model = tiny_model("vit")
    with CRATE(steps=0).apply(model, labelled_images()) as work:
        state = work.state()
    tensors = {name: value[..., :-1] for name, value in state.tensors.items()}
    with pytest.raises(GossamerError, match="does not fit this model"):
        CRATE(steps=0).reattach(model, state.meta, tensors)


def test_measuring_needs_no_labels():
    model = tiny_model("vit")
    with CRATE(steps=0).apply(model, labelled_images()) as work:
        pixels = labelled_images().values["pixel_values"]
        rates = work.measure(Inputs({"pixel_values": pixels}))
    assert all(r.rate > 0 and r.compressed > 0 and 0 < r.nonzero < 1 for r in rates.values())


@pytest.mark.parametrize("values", [{"step": 0.0}, {"penalty": -0.1}, {"heads": 0}])
def test_impossible_values_are_refused(values):
    with pytest.raises(GossamerError, match=next(iter(values))):
        CRATE(**values)
