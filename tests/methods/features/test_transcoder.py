import pytest
import torch

from gossamer.core import GossamerError
from gossamer.methods.features.autoencoder import Dictionary
from gossamer.methods.features.rules import TopK
from gossamer.methods.features.splicing import Splice
from gossamer.methods.features.transcoder import Transcoder
from tests.methods.features.test_fast_sae import tokens
from tests.models.tiny import tiny_model

METHOD = Transcoder(k=4, width=64, tokens=512, batch_size=64, lr=5e-3)


@torch.no_grad()
def out(model):
    return model(input_ids=tokens().input_ids[1:3])[0]


def test_reads_the_input_of_the_mlp_and_writes_its_output():
    model = tiny_model("llama")
    with METHOD.apply(model, tokens()) as applied:
        made = applied.dictionary
        assert applied.hook == "model.layers.1.mlp"
        assert made.metadata["reads"] == ["model.layers.1.mlp:in"]
        assert (made.d_in, made.d_out) == (32, 32)
        seen = {}
        mlp = model.model.layers[1].mlp
        handles = [
            mlp.register_forward_pre_hook(lambda m, a: seen.update(x=a[0])),
            mlp.register_forward_hook(lambda m, a, o: seen.update(y=o)),
        ]
        out(model)
        for handle in handles:
            handle.remove()
        sink = seen["x"].norm(dim=-1) > made.metadata["sink_norm"]
        torch.testing.assert_close(seen["y"][~sink], made(seen["x"])[~sink], rtol=1e-4, atol=1e-5)


def test_a_linear_module_is_learned_by_the_skip():
    """The rest of the dictionary silenced, W_skip and b_dec alone must answer for the module."""
    model = tiny_model("llama")
    path = "model.layers.1.mlp.down_proj"
    dense = out(model)
    made = Dictionary(64, 8, TopK(1), {"reads": [f"{path}:in"]}, d_out=32, skip=True)
    with torch.no_grad():
        made.b_enc.fill_(-1.0)
        made.W_skip.copy_(model.get_submodule(path).weight.T)
    with Splice(model, path, made):
        torch.testing.assert_close(out(model), dense, rtol=1e-4, atol=1e-4)
    assert torch.equal(out(model), dense)
    with pytest.raises(GossamerError, match="give decode the rows"):
        made.decode(made.encode(torch.zeros(1, 64)))


def test_scales_of_input_and_target_fold_away():
    made = Dictionary.random(8, 32, TopK(4), seed=0, d_out=5, skip=True).double()
    with torch.no_grad():
        made.W_skip.normal_(generator=torch.Generator().manual_seed(1))
        made.b_dec.normal_(generator=torch.Generator().manual_seed(2))
        made.b_enc.normal_(generator=torch.Generator().manual_seed(3))
        x = torch.randn(20, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
        wanted = made(3.0 * x) / 7.0
        made.fold_input_scale(3.0, 7.0)
        torch.testing.assert_close(made(x), wanted)


def test_files_come_back(tmp_path):
    made = METHOD.fit(tiny_model("llama"), tokens())
    back = Dictionary.load(made.save(tmp_path / "sae"))
    x = torch.randn(5, 32)
    assert torch.equal(back(x), made(x))


def test_a_block_without_an_mlp_module_is_named():
    with pytest.raises(GossamerError, match=r"name the module to stand in for with hook"):
        METHOD.fit(tiny_model("bert"), tokens())
