from itertools import islice

import pytest
import torch

from gossamer.core import GossamerError
from gossamer.methods.features.source import ActivationSource
from gossamer.models import Inputs, Tokens
from tests.models.tiny import tiny_model

BLOCKS = {
    "llama": "model.layers.0",
    "gpt2": "transformer.h.0",
    "bert": "encoder.layer.0",
}


def ids(windows=6, length=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 128, (windows, length), generator=generator)


def hooks_of(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def left_padded():
    """Windows of 20 with 0 to 5 tokens of padding in front."""
    mask = torch.ones(6, 20, dtype=torch.bool)
    for row in range(6):
        mask[row, :row] = False
    return Tokens(ids().where(mask, 0), mask)


def reference(model, path, batch):
    """The module's activations, from a whole forward pass."""
    found = []
    handle = model.get_submodule(path).register_forward_hook(lambda m, a, out: found.append(out))
    try:
        with torch.no_grad():
            model(**batch)
    finally:
        handle.remove()
    out = found[0]
    return out[0] if isinstance(out, tuple) else out


@pytest.mark.parametrize("name", BLOCKS)
def test_padding_never_enters(name):
    model, data = tiny_model(name), left_padded()
    source = ActivationSource(model, BLOCKS[name], data, windows=4, sink_multiple=None)
    rows = torch.cat(list(source.one_pass()))
    assert len(rows) == data.count == source.count == 6 * 20 - 15
    whole = [
        reference(model, BLOCKS[name], batch)[mask]
        for batch, mask in zip(data.batches(4), data.attention_mask.split(4), strict=True)
    ]
    torch.testing.assert_close(rows, torch.cat(whole))


def test_the_first_token_can_be_left_out():
    data = left_padded()
    source = ActivationSource(tiny_model("llama"), "model.layers.0", data, skip_first=True)
    assert source.count == data.count - len(data)
    assert source.metadata()["first_token"] == "left out"


def test_sink_rows_are_left_out_and_recorded():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[7] *= 1000
    tokens = ids()
    tokens[:, 0] = 7
    count = int((tokens != 7).sum())
    source = ActivationSource(model, "model.layers.0", Tokens.from_ids(tokens))
    assert source.count == count
    assert source.metadata()["sink_norm"] == source.sink_norm > 0
    assert source.metadata()["sink_multiple"] == 10.0
    every = ActivationSource(model, "model.layers.0", Tokens.from_ids(tokens), sink_multiple=None)
    assert every.count == tokens.numel()
    assert every.sink_norm is None


@pytest.mark.parametrize("resident", [0, 1 << 28])
def test_batches_shuffle_across_windows_and_repeat_by_seed(resident):
    model, data = tiny_model("llama"), Tokens.from_ids(ids(12))

    def rows(seed, count=30):
        source = ActivationSource(
            model, "model.layers.0", data, windows=2, seed=seed, resident_bytes=resident, buffer=64
        )
        return torch.stack(list(islice(source.batches(16), count)))

    first = rows(0)
    assert first.shape == (30, 16, 32)
    assert torch.equal(first, rows(0))
    assert not torch.equal(first, rows(1))
    flat = torch.cat(list(ActivationSource(model, "model.layers.0", data).one_pass()))
    # Every row is one of the data's, and a batch mixes rows of several windows.
    near = torch.cdist(first.view(-1, 32).double(), flat.double()).min(1)
    assert float(near.values.max()) < 1e-3
    windows = (near.indices // 20).view(30, 16)
    assert min(len(set(w.tolist())) for w in windows) >= 3
    # Two passes are 480 rows: every row of the data has come by.
    assert len(set(near.indices.tolist())) > 0.9 * len(flat)


def test_kept_rows_are_computed_once():
    model, runs = tiny_model("llama"), []
    handle = model.model.layers[0].register_forward_pre_hook(lambda m, a: runs.append(1))
    try:
        source = ActivationSource(model, "model.layers.0", Tokens.from_ids(ids()), windows=6)
        list(islice(source.batches(16), 40))
    finally:
        handle.remove()
    # Once to learn width and norms, once for the rows.
    assert len(runs) == 2


def test_every_row_appears_once_a_pass():
    source = ActivationSource(tiny_model("llama"), "model.layers.0", Tokens.from_ids(ids()))
    rows = torch.cat(list(islice(source.batches(40), 3)))
    wanted = source.resident()
    assert torch.equal(rows.sort(0).values, wanted.sort(0).values)


def test_ready_made_inputs_serve_vision_models():
    pixels = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    source = ActivationSource(tiny_model("vit"), "vit.layers.0", Inputs({"pixel_values": pixels}))
    assert next(source.batches(8)).shape == (8, 32)
    assert source.count == 4 * 17


def test_activations_that_are_not_finite_are_refused():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(GossamerError, match="NaN or infinity"):
        ActivationSource(model, "model.layers.0", Tokens.from_ids(ids()))
    assert hooks_of(model) == 0


@pytest.mark.parametrize("multiple", [1.0, -3.0, float("nan"), float("inf")])
def test_sink_multiples_that_call_all_rows_sinks_are_refused(multiple):
    with pytest.raises(GossamerError, match="sink_multiple"):
        ActivationSource(
            tiny_model("llama"),
            "model.layers.0",
            Tokens.from_ids(ids()),
            sink_multiple=multiple,
        )


def test_columns_of_several_modules_are_joined():
    model, data = tiny_model("llama"), Tokens.from_ids(ids())
    paths = ("model.layers.1.mlp:in", "model.layers.1.mlp", "model.layers.0")
    joined = ActivationSource(model, paths, data, sink_multiple=None)
    assert (joined.width, joined.columns, joined.count) == (96, (32, 32, 32), 120)
    parts = [
        torch.cat(list(ActivationSource(model, p, data, sink_multiple=None).one_pass()))
        for p in paths
    ]
    assert torch.equal(torch.cat(list(joined.one_pass())), torch.cat(parts, 1))
    assert joined.metadata()["hook_name"] == "|".join(paths)
    with pytest.raises(GossamerError, match=r"no module 'model.layers.1.mlq'.*mlp"):
        ActivationSource(model, "model.layers.1.mlq:in", data)


def test_a_fingerprint_tells_data_apart():
    model = tiny_model("llama")
    first, again, other = (
        ActivationSource(model, "model.layers.0", Tokens.from_ids(ids(seed=s))).fingerprint()
        for s in (0, 0, 1)
    )
    assert first == again != other
