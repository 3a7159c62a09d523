from dataclasses import replace

import pytest
import torch

from gossamer.core import GossamerError, SparseRows
from gossamer.methods.features.autoencoder import Dictionary
from gossamer.methods.features.rules import ReLU, TopK
from gossamer.methods.features.splicing import Splice, loss_recovered
from gossamer.models import Tokens
from tests.models.tiny import tiny_model

PATHS = {
    "llama": ["model.layers.0", "model.layers.1.self_attn", "model.layers.0.mlp.up_proj"],
    "gpt2": ["transformer.h.1", "transformer.h.0.attn", "transformer.h.0.mlp"],
    "bert": ["encoder.layer.0", "encoder.layer.1.attention"],
}
CASES = [(name, path) for name, paths in PATHS.items() for path in paths]


def ids(windows=3, length=16):
    return torch.randint(3, 128, (windows, length), generator=torch.Generator().manual_seed(0))


def lossless(width: int) -> Dictionary:
    """Both directions of every channel: the ReLU code of any x decodes to x."""
    made = Dictionary(width, 2 * width, ReLU())
    eye = torch.eye(width)
    with torch.no_grad():
        made.W_dec.copy_(torch.cat([eye, -eye]))
        made.W_enc.copy_(made.W_dec.T)
    return made.requires_grad_(False)


def lossy(width: int = 32, k: int = 4) -> Dictionary:
    return Dictionary.random(width, 64, TopK(k), seed=0).requires_grad_(False)


@torch.no_grad()
def out(model):
    return model(input_ids=ids())[0]


def width_of(model, path):
    return 64 if path.endswith("up_proj") else 32


def hooks_of(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize(("name", "path"), CASES)
def test_a_lossless_dictionary_changes_nothing_and_a_lossy_one_does(name, path):
    model = tiny_model(name)
    dense = out(model)
    with Splice(model, path, lossless(width_of(model, path))):
        torch.testing.assert_close(out(model), dense, rtol=1e-4, atol=1e-4)
    with Splice(model, path, lossy(width_of(model, path))):
        assert not torch.allclose(out(model), dense, atol=1e-2)
    assert torch.equal(out(model), dense)
    assert hooks_of(model) == 0


@pytest.mark.parametrize(("name", "path"), CASES)
def test_keeping_the_error_is_the_identity(name, path):
    model = tiny_model(name)
    dense = out(model)
    with Splice(model, path, lossy(width_of(model, path)), keep_error=True):
        assert torch.equal(out(model), dense)


@torch.no_grad()
def test_an_edit_moves_the_output_along_its_atoms_alone():
    model, made = tiny_model("llama"), lossy()
    path, seen = "model.layers.0", []

    def double(codes: SparseRows) -> SparseRows:
        return replace(codes, values=codes.values * 2)

    plain = []
    look = model.model.layers[0].register_forward_hook(lambda m, a, o: plain.append(o))
    out(model)
    look.remove()
    with Splice(model, path, made, keep_error=True, edit=double):
        look = model.model.layers[0].register_forward_hook(lambda m, a, o: seen.append(o))
        out(model)
        look.remove()
    codes = made.encode(plain[0])
    wanted = plain[0] + (made.decode(codes) - made.b_dec).view(plain[0].shape)
    torch.testing.assert_close(seen[0], wanted)


@torch.no_grad()
def test_sink_rows_pass_unchanged():
    model, made = tiny_model("llama"), lossy()
    path, seen = "model.layers.0", []
    look = model.model.layers[0].register_forward_hook(lambda m, a, o: seen.append(o))
    out(model)
    norms = seen[0].norm(dim=-1)
    made.metadata["sink_norm"] = float(norms.median())
    with Splice(model, path, made):
        second = model.model.layers[0].register_forward_hook(lambda m, a, o: seen.append(o))
        out(model)
        second.remove()
    look.remove()
    sink = norms > norms.median()
    assert torch.equal(seen[2][sink], seen[0][sink])
    assert not bool((seen[2] == seen[0]).all(-1)[~sink].any())


def test_generate_with_the_cache_equals_generate_without():
    model = tiny_model("llama")
    prompt = ids(1, 6)
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    plain = model.generate(prompt, **options)
    with Splice(model, "model.layers.0", lossy()):
        cached = model.generate(prompt, **options, use_cache=True)
        anew = model.generate(prompt, **options, use_cache=False)
    assert torch.equal(cached, anew)
    assert not torch.equal(cached, plain)


def test_half_precision_models_keep_their_dtype():
    model = tiny_model("llama").bfloat16()
    with Splice(model, "model.layers.0", lossy()):
        assert out(model).dtype == torch.bfloat16
    with Splice(model, "model.layers.0", lossy(), keep_error=True):
        spliced = out(model)
    assert torch.equal(spliced, out(model))


def test_another_width_or_path_is_refused():
    model = tiny_model("llama")
    with (
        Splice(model, "model.layers.0.mlp.up_proj", lossy()),
        pytest.raises(GossamerError, match="reads 32 channels"),
    ):
        out(model)
    with pytest.raises(GossamerError, match="no module"):
        Splice(model, "model.layers.7", lossy())
    assert hooks_of(model) == 0


def test_loss_recovered_is_one_without_loss_and_zero_for_the_ablation():
    model = tiny_model("llama")
    mask = torch.ones(3, 16, dtype=torch.bool)
    mask[0, :5] = False
    tokens = Tokens(ids(), mask)
    whole = loss_recovered(model, tokens, lossless(32), "model.layers.0", batch_size=2)
    assert whole.recovered == pytest.approx(1.0, abs=1e-4)
    assert whole.ablation == "zero"
    empty = lossy()
    empty.W_dec.zero_()
    none = loss_recovered(model, tokens, empty, "model.layers.0")
    assert none.spliced == pytest.approx(none.ablated)
    assert none.recovered == pytest.approx(0.0, abs=1e-6)
    assert hooks_of(model) == 0


@torch.no_grad()
def test_the_clean_loss_counts_real_tokens_only():
    model = tiny_model("llama")
    mask = torch.ones(3, 16, dtype=torch.bool)
    mask[1, 10:] = False
    found = loss_recovered(model, Tokens(ids(), mask), lossy(), "model.layers.1").clean
    logits = model(input_ids=ids()).logits.log_softmax(-1)
    terms = [
        -float(logits[row, at, ids()[row, at + 1]])
        for row in range(3)
        for at in range(9 if row == 1 else 15)
    ]
    assert found == pytest.approx(sum(terms) / len(terms), rel=1e-5)


def test_the_ablation_is_named_and_the_mean_is_the_mean():
    model, tokens = tiny_model("llama"), Tokens.from_ids(ids())
    made = lossy()
    with torch.no_grad():
        seen = []
        look = model.model.layers[0].register_forward_hook(lambda m, a, o: seen.append(o))
        out(model)
        look.remove()
        made.W_dec.zero_()
        made.b_dec.copy_(seen[0].mean((0, 1)))
    found = loss_recovered(model, tokens, made, "model.layers.0", ablation="mean")
    assert found.ablated == pytest.approx(found.spliced, rel=1e-5)
    with pytest.raises(GossamerError, match="'zero' or 'mean'"):
        loss_recovered(model, tokens, made, "model.layers.0", ablation="resample")


def test_loss_recovered_has_an_interval_from_whole_windows():
    model = tiny_model("llama")
    tokens = Tokens.from_ids(ids(8))
    found = loss_recovered(model, tokens, lossy(), "model.layers.0")
    assert found.windows.shape == (8, 4)
    assert float(found.windows[:, 1].sum() / found.windows[:, 0].sum()) == pytest.approx(
        found.clean
    )
    interval = found.interval(draws=300)
    assert interval.value == found.recovered
    assert interval.low < found.recovered < interval.high
    alone = loss_recovered(model, Tokens.from_ids(ids(1)), lossy(), "model.layers.0")
    with pytest.raises(GossamerError, match="fewer than 2 windows"):
        alone.interval()
