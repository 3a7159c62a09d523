import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gossamer.core import GossamerError
from gossamer.core.scores.attention_estimate import last_query_weights
from gossamer.methods.attention import zipvl
from gossamer.methods.attention.eviction.mixed import MixedBits
from gossamer.methods.attention.eviction.observe import keep_equal
from gossamer.methods.attention.eviction.shortened import held_bytes
from gossamer.methods.attention.executor import Call
from gossamer.methods.attention.executors import subset
from gossamer.methods.attention.layout import Layout
from gossamer.methods.attention.zipvl import ZipVL, important_tokens, probe_rows
from tests.models.tiny import tiny_model
from tests.models.vlm import image_prompt, tiny_vlm


def ids(rows=2, length=24, seed=0):
    return torch.randint(3, 128, (rows, length), generator=torch.Generator().manual_seed(seed))


def test_probes_are_half_recent_half_by_lot():
    rows = probe_rows(100, 0.1, seed=0, layer=0)
    assert len(rows) == 10
    assert rows[5:].tolist() == [95, 96, 97, 98, 99]
    assert rows[:5].tolist() == sorted(set(rows[:5].tolist()))
    assert int(rows[4]) < 95
    assert not torch.equal(rows, probe_rows(100, 0.1, seed=1, layer=0))
    assert not torch.equal(rows, probe_rows(100, 0.1, seed=0, layer=1))
    assert probe_rows(3, 0.01, 0, 0).tolist() == [2]
    assert probe_rows(4, 1.0, 0, 0).tolist() == [0, 1, 2, 3]
    assert probe_rows(0, 0.5, 0, 0).tolist() == []


def test_how_many_by_mass_and_which_per_probe():
    # Three probes; the last token is seen by one of them only.
    seen = torch.tensor([[[1, 1, 0], [1, 1, 0], [1, 1, 1]]]).bool()
    weights = torch.tensor([[[0.4, 0.6, 0.0], [0.4, 0.6, 0.0], [0.0, 0.2, 0.8]]])
    mass, probes = weights.sum(1), seen.sum(1)
    # Sums 0.8, 1.4, 0.8 of 3; two tokens reach 0.7 of it.
    per_probe = important_tokens(mass, probes, 0.7, normalized=True)
    assert per_probe.tolist() == [[False, True, True]]
    plain = important_tokens(mass, probes, 0.7, normalized=False)
    assert plain[0, 1]
    assert plain.sum() == 2
    assert important_tokens(mass, probes, 0.46, normalized=True).tolist() == [[False, False, True]]
    assert important_tokens(mass, probes, 1.0, normalized=True).all()


class Largest(TorchDispatchMode):
    """Elements of the largest memory any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for one in tree_leaves(out):
            if isinstance(one, torch.Tensor):
                size = one.untyped_storage().nbytes() // one.element_size()
                self.elements = max(self.elements, size)
        return out


def random_call(seed, rows, length, padded, shape=(2, 3), chunk=None):
    """A call and its layout; ``chunk`` asks for the last queries only, over a cache."""
    lot = torch.Generator().manual_seed(seed)
    shared, repeat = shape
    asked = chunk or length
    query = torch.randn(rows, shared * repeat, asked, 8, generator=lot)
    key = torch.randn(rows, shared, length, 8, generator=lot) * 2
    real = torch.ones(rows, length, dtype=torch.bool)
    for row, pad in enumerate(padded):
        real[row, :pad] = False
    padding = real if any(padded) else None
    layout = Layout(rows, asked, length, query_offset=length - asked, padding=padding)
    return Call(query, key, key, softcap=20.0 if seed % 2 else None), layout


def at_once(call, layout, method, layer):
    """The choice by all scores of all pairs: the formula, whatever it costs."""
    pairs = layout.mask().expand(layout.batch, 1, -1, -1)
    asks = torch.zeros(layout.batch, layout.queries, dtype=torch.bool)
    for row in range(layout.batch):
        real = torch.arange(layout.queries)
        if layout.padding is not None:
            real = real[layout.padding[row, layout.query_index]]
        asks[row, real[probe_rows(len(real), method.probes, method.seed, layer)]] = True
    seen = pairs & asks[:, None, :, None]
    query = call.grouped_query().double()
    weights = last_query_weights(query, call.key.double(), call.factor, seen, call.softcap)
    mass, probes = weights.mean(1).sum(1), seen[:, 0].sum(1)
    score = mass / probes.clamp_min(1) if method.normalized else mass
    there = probes > 0
    if method.sparsity is None:
        shares = mass / mass.sum(1, keepdim=True).clamp_min(1e-30)
        reached = shares.sort(1, descending=True).values.cumsum(1)
        count = (reached < method.gamma).sum(1) + 1
    else:
        count = torch.round((1 - method.sparsity) * there.sum(1)).long().clamp_min(1)
    chosen = keep_equal(score[:, None], there[:, None], count)[:, 0]
    position = layout.position[:, : layout.keys]
    ends = (position < method.sink) | (position == position.amax(1, keepdim=True))
    return chosen | ((position >= 0) & (ends | ~there))


@pytest.mark.parametrize("held", [1, 400, 1 << 30])
@pytest.mark.parametrize("padded", [(0, 0, 0), (0, 7, 30)])
@pytest.mark.parametrize("fields", [{"gamma": 0.6}, {"sparsity": 0.6}, {"normalized": False}])
def test_probes_in_slices_choose_what_all_at_once_choose(held, padded, fields, monkeypatch):
    monkeypatch.setattr(zipvl, "_HELD", held)
    for seed in range(4):
        call, layout = random_call(seed, 3, 48, padded, chunk=20 if seed == 3 else None)
        method = ZipVL(**{"gamma": 0.8, "probes": 0.4, "sink": 1, "quantize": False, **fields})
        index = method.plan(torch.nn.Identity(), None, 48).select(call, layout, layer=seed)
        want = at_once(call, layout, method, layer=seed)
        assert torch.equal(index.keys[:, 0], want)
        assert 0.2 < want.float().mean() < 0.95


@pytest.mark.parametrize("padded", [(0,), (9,)])
def test_no_map_of_the_prompt_s_square(padded, monkeypatch):
    length = 512
    monkeypatch.setattr(zipvl, "_HELD", length**2 // 32)
    monkeypatch.setattr(subset, "_PAIRS", length**2 // 32)
    monkeypatch.setattr(subset, "_ROWS", 1)
    call, layout = random_call(0, 1, length, padded, shape=(2, 2))
    selector = ZipVL(gamma=0.9, probes=0.5, quantize=False).plan(torch.nn.Identity(), None, length)
    with Largest() as largest:
        index = selector.select(call, layout, 0)
        subset.Subset().run(call, index)
    assert 0.3 < index.keys.float().mean() < 1
    # What grows with the prompt alone: heads, queries and their width.
    assert largest.elements <= length**2 // 16


def test_tokens_pass_by_where_they_do_not_matter():
    key = torch.zeros(1, 1, 32, 4)
    key[0, 0, [5, 20], 0] = 30.0
    query = torch.zeros(1, 2, 32, 4)
    query[..., 0] = 1.0
    method = ZipVL(gamma=0.6, probes=0.25, sink=1, quantize=False)
    selector = method.plan(torch.nn.Identity(), None, 32)
    index = selector.select(Call(query, key, key), Layout(1, 32, 32), 0)
    kept = index.keys[0, 0].nonzero()[:, 0].tolist()
    assert {0, 20, 31} <= set(kept)
    assert len(kept) <= 4
    assert torch.equal(index.queries, index.keys)


def test_the_cache_is_packed_and_decoding_goes_on():
    model, prompt = tiny_model("llama"), ids(length=64)
    with ZipVL(gamma=0.8, probes=0.2, buffer=3).apply(model) as work, torch.no_grad():
        cache = model(prompt, use_cache=True).past_key_values
        full = 2 * 2 * 2 * 2 * 64 * 8 * 4
        assert all(isinstance(layer, MixedBits) for layer in cache.layers)
        assert held_bytes(cache) < 0.3 * full
        stored = []
        for at in range(5):
            model(ids(length=1, seed=at), past_key_values=cache, use_cache=True)
            stored.append(cache.layers[0].stored)
        assert stored == [64, 64, 67, 67, 67]
        assert cache.get_seq_length() == 69
        assert "memory is saved, time is not" in str(work.report())
    # A packed cache speaks for itself: it goes on without the method.
    with torch.no_grad():
        model(ids(length=1), past_key_values=cache, use_cache=True)


def test_eight_bits_hardly_change_a_thing():
    model, prompt, step = tiny_model("llama"), ids(length=40), ids(length=1, seed=1)

    @torch.no_grad()
    def after(method):
        with method.apply(model):
            cache = model(prompt, use_cache=True).past_key_values
            return model(step, past_key_values=cache, use_cache=True).logits

    exact = after(ZipVL(gamma=0.8, probes=0.2, quantize=False))
    fine = after(ZipVL(gamma=0.8, probes=0.2, bits=8, rest_bits=8))
    coarse = after(ZipVL(gamma=0.8, probes=0.2, bits=2, rest_bits=1))
    assert 0 < (fine - exact).abs().max() < 0.2 * (coarse - exact).abs().max()


def test_windowed_layers_keep_what_no_probe_sees():
    model, prompt = tiny_model("mistral"), ids(length=40)
    dense = model(prompt, use_cache=False).logits
    with ZipVL(gamma=1.0, quantize=False).apply(model), torch.no_grad():
        got = model(prompt, use_cache=False).logits
    torch.testing.assert_close(got, dense, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_vision_language_models():
    model = tiny_vlm()
    dense = model(**image_prompt()).logits
    with ZipVL(gamma=1.0, quantize=False).apply(model):
        torch.testing.assert_close(model(**image_prompt()).logits, dense, atol=1e-5, rtol=1e-4)
    with ZipVL(gamma=0.6, probes=0.3).apply(model) as work:
        out = model(**image_prompt(), use_cache=True)
        # Three blocks of the language model; the vision tower keeps its own attention.
        assert work.ran == {"subset": 3}
        assert isinstance(out.past_key_values.layers[0], MixedBits)
        assert not torch.allclose(out.logits, dense, atol=1e-3)
        generated = model.generate(**image_prompt(), max_new_tokens=4, do_sample=False)
        assert generated.shape[1] == image_prompt()["input_ids"].shape[1] + 4
    assert torch.equal(model(**image_prompt()).logits, dense)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"gamma": 0.0}, "gamma is 0.0; give a share above 0"),
        ({"probes": 1.5}, "probes is 1.5"),
        ({"bits": 3}, "bits is 3; give 1, 2, 4 or 8"),
        ({"rest_bits": 16}, "rest_bits is 16"),
        ({"sink": -1}, "sink"),
    ],
)
def test_bad_input(bad, words):
    with pytest.raises(GossamerError, match=words):
        ZipVL(**bad)
