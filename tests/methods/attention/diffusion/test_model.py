"""The masked-diffusion model: bidirectional, seeded; its training; its sampler."""

import pytest
import torch
from torch import nn

from gossamer.core import GossamerError
from gossamer.methods.attention.diffusion.model import DiffusionConfig, MaskedDiffusionLM
from gossamer.methods.attention.diffusion.sampler import sample
from gossamer.methods.attention.diffusion.steps import denoising, now
from gossamer.methods.attention.diffusion.training import denoising_loss, mask_some, train
from gossamer.models import Inputs
from gossamer.models.fit import FitPlan
from tests.models.diffusion import MASK, PROMPT, diffusion_lm, half_masked


def test_every_token_sees_both_sides():
    model = diffusion_lm()
    ids = half_masked(rows=1)
    for place in (0, 31):
        changed = ids.clone()
        changed[0, place] = (changed[0, place] + 1) % MASK
        moved = (model(ids) - model(changed)).abs().amax(-1)[0]
        assert (moved > 1e-6).all()


def test_positions_are_relative_but_matter():
    model = diffusion_lm()
    ids = half_masked(rows=1)
    swapped = ids.clone()
    swapped[0, :2] = ids[0, :2].flip(0)
    assert not torch.allclose(model(ids)[0, 9], model(swapped)[0, 9], atol=1e-6)


def test_seeds_give_the_weights_and_leave_torch_s_state():
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    a, b, c = diffusion_lm(0), diffusion_lm(0), diffusion_lm(1)
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(a.head.weight, b.head.weight)
    assert not torch.equal(a.head.weight, c.head.weight)


def test_the_short_convolution_reaches_so_many_neighbours():
    config = DiffusionConfig(vocabulary=9, mask=8, width=8, heads=1, layers=1, reach=2)
    near = MaskedDiffusionLM(config).near
    hidden = torch.zeros(1, 9, 8)
    hidden[0, 4] = 1.0
    moved = near(hidden)[0].abs().amax(-1) > 0
    assert moved.nonzero()[:, 0].tolist() == [2, 3, 4, 5, 6]


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_masking_masks_its_share_and_at_least_one(share):
    fillable = torch.zeros(200, 20, dtype=torch.bool)
    fillable[:, 5:15] = True
    torch.manual_seed(0)
    hidden = mask_some(fillable, torch.full((200,), share))
    assert not (hidden & ~fillable).any()
    assert (hidden.sum(1) >= 1).all()
    assert float(hidden.sum() / 2000) == pytest.approx(max(share, 0.1), abs=0.03)


def test_the_loss_is_of_masked_tokens_only():
    """A model that knows the text everywhere but at masked places is at a loss there."""

    class Copy(nn.Module):
        mask = MASK

        def forward(self, ids):
            return 50.0 * nn.functional.one_hot(ids, MASK + 1).float()

    ids = half_masked()
    ids[ids == MASK] = 3
    fillable = torch.ones_like(ids, dtype=torch.bool)
    loss = denoising_loss(Copy(), {"input_ids": ids, "fillable": fillable})
    assert float(loss) == pytest.approx(50.0, abs=0.01)


def test_training_learns_to_fill():
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(0, 8, (64, 4), generator=generator)
    ids = torch.cat([first, first], 1)
    fillable = torch.zeros_like(ids, dtype=torch.bool)
    fillable[:, 4:] = True
    model = MaskedDiffusionLM(DiffusionConfig(vocabulary=9, mask=8, width=32, heads=2, layers=1))
    data = Inputs({"input_ids": ids, "fillable": fillable})
    losses = train(model, data, FitPlan(steps=150, lr=1e-2, batch_size=32, decay=0.5))
    assert sum(losses[-10:]) < 0.3 * sum(losses[:10])
    out = sample(model, ids.masked_fill(fillable, 8), prompt=4, steps=4)
    assert float((out == ids)[fillable].float().mean()) > 0.9


def test_bad_training_data_are_refused():
    model, ids = diffusion_lm(), half_masked()
    fillable = torch.ones_like(ids, dtype=torch.bool)
    plan = FitPlan(steps=1, lr=1e-3)
    with pytest.raises(GossamerError, match="holds the mask token"):
        train(model, Inputs({"input_ids": ids, "fillable": fillable}), plan)
    with pytest.raises(GossamerError, match="give input_ids and a bool fillable"):
        train(model, Inputs({"input_ids": ids}), plan)
    with pytest.raises(GossamerError, match="no token that may be masked"):
        train(model, Inputs({"input_ids": ids, "fillable": ~fillable}), plan)


class Sure(nn.Module):
    """Sure of place p by p; predicts its number of calls."""

    mask = MASK

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, ids):
        self.calls.append((ids == MASK).sum(1).tolist())
        logits = torch.zeros(*ids.shape, MASK + 1)
        logits[:, :, len(self.calls)] = 0.05 * torch.arange(ids.shape[1])
        logits[:, :, MASK] = 1e9
        return logits


@pytest.mark.parametrize(
    ("steps", "left"), [(1, [14]), (3, [14, 9, 4]), (14, list(range(14, 0, -1)))]
)
def test_the_surest_are_filled_first_and_stay(steps, left):
    model, ids = Sure(), half_masked()
    out = sample(model, ids, prompt=PROMPT, steps=steps)
    assert [call[0] for call in model.calls] == left
    assert torch.equal(out[:, :PROMPT], ids[:, :PROMPT])
    filled = out[0, PROMPT:].tolist()
    assert filled == sorted(filled, reverse=True), "later places are surer, so filled earlier"
    assert filled.count(1) == left[0] - (left[1] if steps > 1 else 0)


def test_steps_are_announced_and_forgotten():
    seen = []

    class Watch(Sure):
        def forward(self, ids):
            seen.append((now().prompt, now().steps))
            return super().forward(ids)

    sample(Watch(), half_masked(), prompt=PROMPT, steps=2)
    assert seen == [(PROMPT, 2)] * 2
    assert now() is None
    with pytest.raises(RuntimeError), denoising(prompt=1, steps=1):
        raise RuntimeError
    assert now() is None


def test_what_cannot_be_sampled_is_refused():
    model, ids = diffusion_lm(), half_masked()
    with pytest.raises(GossamerError, match="steps is 15 for 14 masked tokens"):
        sample(model, ids, prompt=PROMPT, steps=15)
    ids[0, -1] = 1
    with pytest.raises(GossamerError, match="rows mask 13 to 14 tokens"):
        sample(model, ids, prompt=PROMPT, steps=2)
    with pytest.raises(GossamerError, match="width is 12 for 4 heads"):
        DiffusionConfig(vocabulary=5, mask=4, width=12)
    with pytest.raises(GossamerError, match="mask is 5"):
        DiffusionConfig(vocabulary=5, mask=5)
