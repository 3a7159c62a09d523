import pytest
import torch

from gossamer.core import GossamerError
from gossamer.methods.attention.blasst import BLASST
from gossamer.methods.attention.layout import Layout
from gossamer.methods.attention.tile_skip import Scale, read_scales
from tests.methods.attention.planted import planted
from tests.models.tiny import tiny_model


def ids(length=64):
    return torch.randint(3, 128, (3, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model, tokens):
    return model(tokens, use_cache=False).logits


def test_calibration_skips_about_what_was_asked_for():
    model, told = tiny_model("llama"), []
    method = BLASST(block_size=4, sparsity=0.3)
    with method.apply(model, ids(), progress=lambda *step: told.append(step)) as work:
        assert set(work.selector.scales) == {"prefill", "decode"}
        skipped = 1 - sum(r.kept for r in work.measured) / sum(r.total for r in work.measured)
        assert skipped == pytest.approx(0.3, abs=0.15)
        assert told[-1][0] == told[-1][1] == 9
        assert "length" in str(work.report())
    more = BLASST(block_size=4, sparsity=0.6)
    with more.apply(model, ids()) as work:
        assert work.report().sparsity > 0.35


def test_without_data_it_makes_up_samples():
    model = tiny_model("llama")
    before = logits(model, ids())
    with BLASST(block_size=4, sparsity=0.5, length=64).apply(model) as work:
        assert work.selector.scales["prefill"].a > 0
        assert not torch.equal(logits(model, ids()), before)
    assert torch.equal(logits(model, ids()), before)


def test_a_calibration_travels_through_config_json(tmp_path):
    model = tiny_model("llama")
    method = BLASST(block_size=4, sparsity=0.4)
    with method.apply(model, ids()) as work:
        work.save(tmp_path / "m")
        work.selector.save_config(str(tmp_path / "m"), model)
        want, scales = logits(model, ids()), work.selector.scales
    assert read_scales(tmp_path / "m") == scales
    with BLASST(block_size=4, sparsity=0.4, scales=str(tmp_path / "m")).apply(model, ids()):
        torch.testing.assert_close(logits(model, ids()), want)
    again = type(model).from_pretrained(tmp_path / "m").eval()
    with method.apply(again) as work:
        assert dict(work.selector.scales) == dict(scales)


def test_the_threshold_falls_with_the_length_of_every_row():
    plant = planted(["zipf"], 64, width=16)
    selector = BLASST(block_size=8).replan(
        {
            "sparsity": 0.5,
            "scales": {"prefill": [2.0, 4.0]},
            "threshold": None,
            "block_size": 8,
        },
        {},
    )
    assert selector.scales == {"prefill": Scale(2.0, 4.0)}
    call = type(plant.call)(*(t.repeat(2, 1, 1, 1) for t in (plant.query, plant.key, plant.value)))
    padding = torch.arange(64) >= torch.tensor([[0], [32]])
    index = selector.select(call, Layout(2, 64, 64, padding=padding), 0)
    scale = 2.0 * torch.tensor(2.0, dtype=torch.float64).exp()
    torch.testing.assert_close(index.threshold, scale / torch.tensor([64.0, 32.0]).double())
    # No scale for decoding: it stays full.
    one = type(call)(call.query[:, :, -1:], call.key, call.value)
    assert selector.select(one, Layout(2, 1, 64, query_offset=63), 0).whole


def test_a_fixed_threshold_needs_no_calibration():
    plant = planted(["needle"], 128)
    selector = BLASST(threshold=1e-3, block_size=16).plan(torch.nn.Module(), None, 128)
    kept, total = selector.select(plant.call, Layout(1, 128, 128), 0).pairs()
    assert kept < 0.8 * total
    nothing = BLASST(threshold=0.0).plan(torch.nn.Module(), None, 128)
    assert nothing.select(plant.call, Layout(1, 128, 128), 0).whole
    with pytest.raises(GossamerError, match="no scale to save"):
        selector.save_config("x", torch.nn.Module())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"threshold": 1.5}, "0 to 1"),
        ({"threshold": 0.1, "sparsity": 0.5}, "give one"),
        ({"block_size": 0}, "block_size"),
    ],
)
def test_impossible_parameters_are_refused(fields, message):
    with pytest.raises(GossamerError, match=message):
        BLASST(**fields)
