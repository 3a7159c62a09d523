import pytest
import torch

from gossamer.core import GossamerError
from gossamer.methods.features.fast_sae import FastSAE
from gossamer.models import Tokens
from tests.models.tiny import tiny_model

SHARED = {"width": 64, "tokens": 256, "batch_size": 64, "target_l0": 8.0}


def tokens():
    ids = torch.randint(3, 128, (6, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, 5:] = False
    return Tokens(ids, mask)


def rows(**fields):
    source = FastSAE(**SHARED, sink_multiple=None, **fields).source(tiny_model("llama"), tokens())
    return torch.cat(list(source.one_pass()))


def test_samples_apart_have_the_activations_they_have_alone():
    model, data = tiny_model("llama"), tokens()
    wanted = []
    with torch.no_grad():
        for ids, mask in zip(data.input_ids, data.attention_mask, strict=True):
            out = model(input_ids=ids[mask][None], output_hidden_states=True)
            kept = []
            handle = model.model.layers[1].register_forward_hook(
                lambda m, a, o, kept=kept: kept.append(o[0] if isinstance(o, tuple) else o)
            )
            model(input_ids=ids[mask][None])
            handle.remove()
            wanted.append(kept[0].reshape(-1, 32))
            del out
    wanted = torch.cat(wanted)
    torch.testing.assert_close(rows(), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rows(packing="none"), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rows(packing="varlen"), wanted, rtol=1e-4, atol=1e-4)
    joined = rows(packing="concat")
    assert joined.shape == wanted.shape
    # The first sample sees nobody before it; the others see strangers.
    torch.testing.assert_close(joined[:5], wanted[:5], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(joined[5:], wanted[5:], atol=1e-2)


def test_samples_are_cut_and_none_runs_on_in_the_next_window():
    assert len(rows(length=4)) == 6 * 4


def test_the_packing_is_recorded():
    made = FastSAE(**SHARED, packing="varlen").fit(tiny_model("llama"), tokens())
    assert made.metadata["packing"] == "varlen"
    assert made.metadata["method"]["packing"] == "varlen"
    assert made.config()["architecture"] == "jumprelu"
    relu = FastSAE(**SHARED, code="relu", coefficient=1.0).fit(tiny_model("llama"), tokens())
    assert relu.config()["architecture"] == "standard"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"packing": "varlem"}, "did you mean varlen"),
        ({"special_tokens": "drop"}, "unknown special_tokens"),
        ({"code": "topk"}, "unknown code"),
        ({"length": 1}, "length"),
        ({"target_l0": 0.0}, "target_l0"),
        ({"coefficient": -1.0}, "coefficient"),
    ],
)
def test_impossible_parameters_are_refused(values, message):
    with pytest.raises(GossamerError, match=message):
        FastSAE(**values)


def test_special_ids_of_ready_made_tokens_are_not_guessed():
    with pytest.raises(GossamerError, match="not known"):
        FastSAE(special_tokens="mask").source(tiny_model("llama"), tokens())
