"""QuickSelection on tables whose good features are known."""

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from gossamer import QuickSelection
from gossamer.core import GossamerError
from gossamer.methods.training.sparse_autoencoder.fitted import autoencoder, strengths
from tests.models.tables import table

SMALL = {"hidden": 60, "epochs": 20, "batch_size": 20, "epsilon": 4.0}


def shuffled(samples: int = 300, seed: int = 0) -> torch.Tensor:
    """Eight features of three hidden ones, and their twins, shuffled over the samples."""
    real = table(samples, seed)[:, :8]
    source = torch.Generator().manual_seed(1)
    twins = [column[torch.randperm(samples, generator=source)] for column in real.t()]
    return torch.cat([real, torch.stack(twins, 1)], 1)


def test_pixels_are_stronger_than_noise():
    pixels = torch.from_numpy(load_digits().data).float()
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
    fitted = QuickSelection().fit(torch.cat([noise, pixels], 1))
    assert float((fitted.select(40) >= 64).float().mean()) >= 0.9
    assert fitted.losses[-1] < 0.5 * fitted.losses[0]


def test_strengths_are_sums_of_outgoing_weights():
    fitted = QuickSelection(**SMALL).fit(shuffled())
    dense = fitted.encoder.dense()
    assert dense.shape == (60, 16)
    assert torch.allclose(fitted.strengths, dense.abs().sum(0), rtol=1e-5)
    assert torch.equal(strengths(fitted.encoder), fitted.strengths)


@pytest.mark.parametrize(("sparsity", "count"), [(None, 4 * 76), (0.9, 96), (0.0, 960)])
def test_connections_are_counted_exactly(sparsity, count):
    fitted = QuickSelection(**{**SMALL, "epochs": 4}, sparsity=sparsity).fit(shuffled())
    assert len(fitted.encoder) == len(fitted.decoder) == count
    assert len(set(fitted.encoder.places().tolist())) == count


def test_constant_features_take_no_part():
    data = shuffled(100)
    data[:, 3] = 2.5
    fitted = QuickSelection(**{**SMALL, "epochs": 3}).fit(data)
    assert fitted.strengths[3] == 0
    assert not (fitted.encoder.columns == 3).any()
    assert fitted.decoder.start.diff()[3] == 0
    assert fitted.decoder_bias[3] == 0
    assert 3 not in fitted.select(15)
    with pytest.raises(GossamerError, match="k is 16; only 15 of 16 features vary"):
        fitted.select(16)
    # The features beside it are ranked as if it were not there.
    alone = QuickSelection(**{**SMALL, "epochs": 3}).fit(torch.cat([data[:, :3], data[:, 4:]], 1))
    others = torch.arange(16) != 3
    assert torch.equal(fitted.strengths[others], alone.strengths)
    assert torch.equal(fitted.decoder.dense()[others], alone.decoder.dense())


def test_selected_strongest_first():
    data = shuffled()
    fitted = QuickSelection(**{**SMALL, "epochs": 3}).fit(data)
    chosen = fitted.select(5)
    assert (fitted.strengths[chosen].diff() <= 0).all()
    assert torch.equal(fitted.selection(5).mask().nonzero()[:, 0], chosen.sort().values)
    assert torch.equal(fitted.transform(data, 5), data[:, chosen])


def test_units_do_not_matter():
    """A power of two as unit changes no bit of the standardised table."""
    data = shuffled(100)
    method = QuickSelection(**{**SMALL, "epochs": 3})
    scaled = data * 2.0 ** torch.arange(-8, 8)
    assert torch.equal(method.fit(data).strengths, method.fit(scaled).strengths)


def test_the_masked_form_gives_the_same():
    method, data = QuickSelection(**SMALL), shuffled().double()
    stored, masked = method.fit(data), method.fit(data, form="masked")
    assert torch.equal(stored.encoder.places(), masked.encoder.places())
    assert torch.allclose(stored.strengths, masked.strengths, rtol=1e-9)


def test_the_model_holds_what_was_trained():
    data = shuffled(100)
    model = autoencoder(16, 60)
    method = QuickSelection(**{**SMALL, "epochs": 3, "hidden": 7})
    with method.apply(model, data) as work:
        first = model[0]
        assert torch.equal(first.weight.detach(), work.fitted.encoder.dense())
        assert int((first.weight != 0).sum()) == (4 * (16 + 60))
        assert torch.equal(work.select(3), work.fitted.select(3))
        assert torch.equal(work.strengths, work.fitted.strengths)
        assert work.report().simulated
    again = QuickSelection(**{**SMALL, "epochs": 3})
    assert torch.equal(again.fit(data).strengths, work.strengths)


def test_without_a_model_one_is_made():
    with QuickSelection(**{**SMALL, "epochs": 2}, output="tanh").apply(None, shuffled(60)) as work:
        assert [type(layer) for layer in work.model] == [nn.Linear, nn.Sigmoid, nn.Linear, nn.Tanh]
        assert work.model[0].weight.shape == (60, 16)
        assert work.model(shuffled(60)).abs().max() <= 1


def test_other_models_are_refused():
    method = QuickSelection(epochs=1)
    with pytest.raises(GossamerError, match="this model is Linear, ReLU, Linear"):
        method.apply(nn.Sequential(nn.Linear(16, 4), nn.ReLU(), nn.Linear(4, 16)), shuffled(50))
    with pytest.raises(GossamerError, match="gives back its 16 features"):
        method.apply(nn.Sequential(nn.Linear(16, 4), nn.Sigmoid(), nn.Linear(4, 3)), shuffled(50))
    with pytest.raises(GossamerError, match="has 16 features; 9 are expected"):
        method.apply(autoencoder(9, 4), shuffled(50))


def test_a_stored_state_needs_its_shape():
    method = QuickSelection(epochs=1)
    state = method.apply(autoencoder(16, 8), shuffled(50)).state()
    with pytest.raises(GossamerError, match=r"the stored encoder is \(8, 16\)"):
        method.reattach(autoencoder(16, 9), state.meta, state.tensors)


def test_unusable_tables_are_refused():
    with pytest.raises(GossamerError, match="all 4 features are constant"):
        QuickSelection().fit(torch.ones(5, 4))
    with pytest.raises(GossamerError, match="diverged"):
        QuickSelection(**SMALL, lr=1e4).fit(shuffled())


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"hidden": 0},
        {"epsilon": -1.0},
        {"zeta": 1.0},
        {"dropout": 1.0},
        {"noise": -0.1},
        {"lr": float("nan")},
        {"output": "relu"},
        {"batch_size": 2.5},
    ],
)
def test_impossible_parameters_are_refused(wrong):
    with pytest.raises(GossamerError, match=next(iter(wrong))):
        QuickSelection(**wrong)


def test_progress_and_interruption():
    model, seen = autoencoder(16, 8), []
    before = {k: v.clone() for k, v in model.state_dict().items()}

    def stop(done: int, total: int, what: str) -> None:
        seen.append((done, total))
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        QuickSelection(epochs=5).apply(model, shuffled(50), progress=stop)
    assert seen == [(1, 5), (2, 5)]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
