"""SparseD by denoising step: full at first, then the blocks chosen once; any fused model."""

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM

from gossamer.core import GossamerError
from gossamer.methods.attention.diffusion.sampler import sample
from gossamer.methods.attention.diffusion.steps import denoising, now
from gossamer.methods.attention.sparsed import SparseD
from tests.models.diffusion import MASK, PROMPT, diffusion_lm, half_masked
from tests.models.tiny import tiny_model


@torch.no_grad()
def steps_of(model, method, steps=5):
    """Logits of every step over the same tokens, with the method at work."""
    with method.apply(model), denoising(prompt=PROMPT, steps=steps):
        return [model(half_masked()) for _ in range(steps)]


@pytest.mark.parametrize(
    ("skip", "steps", "full"), [(0.2, 10, 3), (0.0, 10, 1), (0.3, 10, 4), (0.99, 10, 10)]
)
def test_first_steps_are_full_and_the_rest_sparse(skip, steps, full):
    method = SparseD(block=4, skip=skip)
    assert method.dense_steps(steps) == full
    model = diffusion_lm()
    with torch.no_grad():
        dense = model(half_masked())
    outs = steps_of(model, method, steps)
    equal = [torch.equal(out, dense) for out in outs]
    assert equal == [True] * full + [False] * (steps - full)
    assert all(torch.equal(out, outs[-1]) for out in outs[full:]), "blocks are chosen once"


def test_blocks_are_chosen_at_the_last_full_step_and_kept():
    model = diffusion_lm()
    early, late = half_masked(seed=1), half_masked(seed=2)
    method = SparseD(block=4, skip=0.5)  # 3 full steps of 4
    with method.apply(model), torch.no_grad():
        outs = []
        for first, third in ((early, late), (late, late), (late, early)):
            with denoising(prompt=PROMPT, steps=4):
                for ids in (first, early, third):
                    model(ids)
                outs.append(model(late))
    assert torch.equal(outs[0], outs[1]), "earlier steps do not matter"
    assert not torch.equal(outs[1], outs[2]), "the last full step does"


def test_every_head_keeps_its_own_blocks_of_prompt_and_generation():
    model = diffusion_lm()
    method = SparseD(block=4, skip=0.0)
    with method.apply(model) as work, denoising(prompt=PROMPT, steps=2) as current, torch.no_grad():
        model(half_masked())
        kept = [index.blocks() for index in current.memo[work].indices.values()]
    assert [k.shape for k in kept] == [(2, 4, 8, 8)] * 2
    for blocks in kept:
        # 18 prompt tokens touch 5 blocks: 1 + floor(0.3 * 5) of them, 1 + floor(0.3 * 3) of three.
        assert (blocks[..., :5].sum(-1) == 2).all()
        assert (blocks[..., 5:].sum(-1) == 1).all()
        assert not (blocks == blocks[:, :1]).all()
    with SparseD(block=4, skip=0.0, isolated=False).apply(model) as work, torch.no_grad():
        with denoising(prompt=PROMPT, steps=2) as current:
            model(half_masked())
        together = current.memo[work].indices[0].blocks()
    assert (together.sum(-1) == 3).all()
    assert not (together[..., 5:].sum(-1) == 1).all()


@pytest.mark.parametrize("backend", ["gather", "masked", "reference"])
def test_executors_agree(backend):
    model = diffusion_lm()
    want = steps_of(model, SparseD(block=4, backend="reference"))[-1]
    got = steps_of(model, SparseD(block=4, backend=backend))[-1]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_report_counts_full_steps_too():
    model = diffusion_lm()
    with SparseD(block=4, skip=0.2, backend="gather").apply(model) as work:
        assert work.report().rows == ()
        assert "no generation has run yet" in str(work.report())
        sample(model, half_masked(), prompt=PROMPT, steps=7)
        report = work.report()
        # Of 7 steps 2 are full; 3 of 8 key blocks are read in the others.
        assert report.sparsity == pytest.approx(5 / 7 * (1 - 3 / 8))
        assert [row.size for row in report.rows] == [7 * 2 * 4 * 32 * 32] * 2
        assert work.ran == {"dense": 4, "gather": 10}
        assert not work.simulated
    with SparseD(block=4, backend="masked").apply(model) as work:
        sample(model, half_masked(), prompt=PROMPT, steps=7)
        assert work.simulated


def test_outside_of_a_generation_attention_is_full():
    model = diffusion_lm()
    with torch.no_grad():
        dense = model(half_masked())
        with SparseD(block=4).apply(model) as work:
            assert torch.equal(model(half_masked()), dense)
            assert "1 forward passes outside" in str(work.report())


def test_generations_do_not_share_their_choice():
    model = diffusion_lm()
    with SparseD(block=4).apply(model):
        alone = sample(model, half_masked(seed=2), prompt=PROMPT, steps=7)
        sample(model, half_masked(seed=1), prompt=PROMPT, steps=7)
        assert torch.equal(sample(model, half_masked(seed=2), prompt=PROMPT, steps=7), alone)
    assert now() is None


def test_padding_is_never_chosen_and_changes_nothing():
    """A row that is padded on the right reads what it would alone."""
    config = BertConfig(
        vocab_size=40,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
    )
    torch.manual_seed(0)
    model = BertForMaskedLM(config).eval()
    ids = torch.randint(3, 40, (1, 16))
    padded = nn.functional.pad(ids, (0, 8))
    mask = (torch.arange(24) < 16).long()[None]
    # Random weights attend almost evenly: double them, or every block weighs the same.
    for name, parameter in model.named_parameters():
        if "query" in name or "key" in name:
            parameter.data *= 20
    method = SparseD(block=4, skip=0.0, isolated=False, sparsity=0.9)
    with method.apply(model) as work, torch.no_grad():
        outs = []
        for batch in ({"input_ids": ids}, {"input_ids": padded, "attention_mask": mask}):
            with denoising(prompt=8, steps=2):
                model(**batch)
                outs.append(model(**batch).logits[:, :16])
        assert work.ran["dense"] == 4
        dense = model(ids).logits
    # Of 4 real blocks and of 6 with padding, 1 + floor(0.1 n) is one.
    torch.testing.assert_close(outs[1], outs[0], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(outs[0], dense, atol=1e-4)


class Remote(nn.Module):
    """Attention as LLaDA's and Dream's own code call it: keys repeated, keywords by name."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(MASK + 1, 32)
        self.qkv = nn.Linear(32, 32 + 16 + 16)

    def forward(self, ids):
        from torch.nn import functional

        hidden = self.embed(ids)
        query, key, value = self.qkv(hidden).split([32, 16, 16], dim=-1)
        query, key, value = (x.unflatten(-1, (-1, 8)).transpose(1, 2) for x in (query, key, value))
        key, value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
        out = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False
        )
        return (hidden + out.transpose(1, 2).flatten(2)) @ self.embed.weight.T


def test_code_that_calls_the_fused_function_needs_no_other_interface():
    model = Remote()
    with torch.no_grad():
        dense = model(half_masked())
        with SparseD(block=4, skip=0.0).apply(model) as work:
            with denoising(prompt=PROMPT, steps=3):
                outs = [model(half_masked()) for _ in range(3)]
            assert len(work.report().rows) == 1
        assert torch.equal(outs[0], dense)
        assert not torch.allclose(outs[1], dense)
        assert torch.equal(model(half_masked()), dense)
    assert "forward" not in vars(model)


def test_causal_models_are_refused():
    model = tiny_model("llama")
    with (
        SparseD(block=4).apply(model),
        denoising(prompt=4, steps=2),
        pytest.raises(GossamerError, match="a causal mask"),
    ):
        model(half_masked())


def test_models_without_fused_attention_are_refused():
    model = nn.Embedding(MASK + 1, 4)
    with (
        SparseD().apply(model),
        denoising(prompt=4, steps=2),
        pytest.raises(GossamerError, match="made no call of scaled_dot_product_attention"),
    ):
        model(half_masked())


def test_wrong_numbers_of_steps_and_lengths_are_refused():
    model = diffusion_lm()
    with SparseD(block=4, skip=0.0).apply(model), denoising(prompt=PROMPT, steps=2):
        model(half_masked())
        with pytest.raises(GossamerError, match="keep batch and length through a generation"):
            model(half_masked()[:, :30])
        model(half_masked())
        with pytest.raises(GossamerError, match="step 3 of a generation of 2"):
            model(half_masked())


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"skip": 1.0}, "skip is 1.0"),
        ({"skip": -0.1}, "skip is -0.1"),
        ({"skip": "half"}, "skip is 'half'"),
        ({"block": 0}, "block"),
        ({"backend": "fastest"}, "backend is 'fastest'"),
        ({"backend": "none"}, "unknown attention backend"),
    ],
)
def test_bad_parameters_are_refused(values, says):
    with pytest.raises(GossamerError, match=says):
        SparseD(**values)
