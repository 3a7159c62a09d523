import pytest
import torch

from gossamer.core import GossamerError
from gossamer.methods.features.hooks import find_module, record
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
@pytest.mark.parametrize("part", ["block", "attention"])
def test_records_what_the_module_returns_and_no_more(name, part):
    model = tiny_model(name)
    path = BLOCKS[name]
    if part == "attention":
        inside = {n for n, _ in model.get_submodule(path).named_children()}
        path += "." + next(n for n in ("self_attn", "attn", "attention") if n in inside)
    batch = {"input_ids": ids(2)}
    wanted = reference(model, path, batch)
    ran = []
    later = model.get_submodule(BLOCKS[name][:-1] + "1")
    handle = later.register_forward_pre_hook(lambda m, a: ran.append(1))
    try:
        found = record(model, (path,), batch)[path]
    finally:
        handle.remove()
    assert torch.equal(found, wanted)
    assert not ran
    assert hooks_of(model) == 0
    model(**batch)


def test_several_modules_in_one_pass():
    model = tiny_model("llama")
    batch = {"input_ids": ids(2)}
    paths = ("model.layers.1.mlp", "model.layers.0", "model.layers.0.self_attn.q_proj")
    found = record(model, paths, batch)
    for path in paths:
        assert torch.equal(found[path], reference(model, path, batch)), path


def test_dropout_is_off_and_every_mode_comes_back():
    model = tiny_model("gpt2").train()
    model.transformer.h[1].eval()
    modes = [m.training for m in model.modules()]
    path, batch = "transformer.h.1", {"input_ids": ids(2)}
    assert torch.equal(record(model, (path,), batch)[path], record(model, (path,), batch)[path])
    assert [m.training for m in model.modules()] == modes


def test_unknown_paths_offer_the_nearest():
    model = tiny_model("llama")
    with pytest.raises(GossamerError, match=r"did you mean model\.layers\.1"):
        find_module(model, "model.layer.1")
    with pytest.raises(GossamerError, match=r"model\.layers\.0\.mlp"):
        find_module(model, "transformer.blocks.0.mlp")
    with pytest.raises(GossamerError, match="it holds model, lm_head"):
        find_module(model, "")


def test_modules_without_activations_are_refused():
    model = tiny_model("llama")
    with pytest.raises(GossamerError, match="not activations"):
        record(model, ("model",), {"input_ids": ids(2)})
    with pytest.raises(GossamerError, match="does not run"):
        record(model, ("model.layers",), {"input_ids": ids(2)})
    assert hooks_of(model) == 0


def test_an_error_inside_the_model_leaves_no_hook():
    model = tiny_model("llama")
    with pytest.raises(IndexError):
        record(model, ("model.layers.1",), {"input_ids": torch.full((1, 4), 10_000)})
    assert hooks_of(model) == 0


def test_a_modules_input_is_what_it_was_called_with():
    model, seen = tiny_model("llama"), {}
    mlp = model.model.layers[1].mlp
    batch = {"input_ids": torch.arange(3, 13)[None]}
    handle = mlp.register_forward_hook(lambda m, args, out: seen.update(x=args[0], y=out))
    try:
        with torch.no_grad():
            model(**batch)
    finally:
        handle.remove()
    paths = ("model.layers.1.mlp:in", "model.layers.1.mlp")
    found = record(model, paths, batch)
    assert torch.equal(found[paths[0]], seen["x"])
    assert torch.equal(found[paths[1]], seen["y"])
    # A block's input is the output of the one before, unchanged by what the block does to it.
    block = record(model, ("model.layers.1:in", "model.layers.0"), batch)
    assert torch.equal(block["model.layers.1:in"], block["model.layers.0"])
    # With the input alone the module itself does not run.
    ran = []
    handle = mlp.register_forward_hook(lambda m, args, out: ran.append(1))
    try:
        record(model, paths[:1], batch)
    finally:
        handle.remove()
    assert not ran
