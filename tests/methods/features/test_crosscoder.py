import pytest
import torch

from gossamer.core import GossamerError
from gossamer.methods.features.autoencoder import Dictionary
from gossamer.methods.features.crosscoder import Crosscoder, ownership
from gossamer.methods.features.rules import TopK
from gossamer.methods.features.splicing import Splice
from tests.methods.features.test_fast_sae import tokens
from tests.models.tiny import tiny_model

SITES = ("model.layers.0", "model.layers.1")
METHOD = Crosscoder(k=4, width=64, tokens=512, batch_size=64, lr=5e-3)


@torch.no_grad()
def out(model):
    return model(input_ids=tokens().input_ids[1:3])[0]


def test_replaces_the_last_site_by_what_all_sites_say():
    model = tiny_model("llama")
    with METHOD.apply(model, tokens()) as applied:
        made = applied.dictionary
        assert applied.method.sites == SITES
        assert applied.hook == SITES[-1]
        assert (made.d_in, made.d_out, made.metadata["writes"]) == (64, 64, [32, 64])
        seen = {}

        def keep(name):
            def hook(module, args, output):
                seen[name] = output[0] if isinstance(output, tuple) else output

            return hook

        handles = [model.get_submodule(p).register_forward_hook(keep(p)) for p in SITES]
        spliced = out(model)
        for handle in handles:
            handle.remove()
    dense = {}
    handles = [
        model.get_submodule(p).register_forward_hook(
            lambda m, a, o, p=p: dense.update({p: o[0] if isinstance(o, tuple) else o})
        )
        for p in SITES
    ]
    assert not torch.allclose(out(model), spliced)
    for handle in handles:
        handle.remove()
    assert torch.equal(seen[SITES[0]], dense[SITES[0]])
    wanted = made(torch.cat([dense[p] for p in SITES], -1))[..., 32:]
    sink = dense[SITES[0]].norm(dim=-1) > made.metadata["sink_norm"]
    torch.testing.assert_close(seen[SITES[1]][~sink], wanted[~sink], rtol=1e-4, atol=1e-4)


def test_a_site_that_runs_later_is_refused_when_it_is_missed():
    model = tiny_model("llama")
    made = Dictionary.random(64, 64, TopK(4), seed=0).requires_grad_(False)
    made.metadata |= {"reads": list(SITES), "writes": [0, 32]}
    with (
        Splice(model, SITES[0], made),
        pytest.raises(GossamerError, match=r"layers\.1 has not run"),
    ):
        out(model)
    assert not sum(len(m._forward_hooks) for m in model.modules())


def test_ownership_by_hand():
    made = Dictionary(4, 3, TopK(1))
    with torch.no_grad():
        made.W_dec.copy_(
            torch.tensor([[3.0, 4.0, 0.0, 0.0], [0.0, 1.0, 1.0, 0.0], [1.0, 0.0, 0.0, 2.0]])
        )
    assert ownership(made, (2, 2)).tolist() == [0.0, 0.5, 0.75]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sites": ("a",)}, "at least 2"),
        ({"sites": ("a", "a")}, "different"),
        ({"sites": ("a", "b"), "hook": "a"}, "last site"),
    ],
)
def test_impossible_sites_are_refused(values, message):
    with pytest.raises(GossamerError, match=message):
        Crosscoder(**values)


def test_a_hook_alone_is_too_little():
    with pytest.raises(GossamerError, match="name them with sites"):
        Crosscoder(hook=SITES[0]).fit(tiny_model("llama"), tokens())
