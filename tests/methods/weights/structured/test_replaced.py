"""Modules in a matrix's place: found, saved, refused and undone as a whole."""

import pytest
import torch

from gossamer.core import GossamerError
from gossamer.evaluate import footprint
from gossamer.methods.weights.magnitude import Magnitude
from gossamer.methods.weights.monarch import Monarch
from gossamer.models import at_work, find_sites
from gossamer.models.store import plain_tensors
from tests.models.tiny import ARCHITECTURES, tiny_model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_blocks_are_found_when_their_matrices_are_gone(architecture):
    model = tiny_model(architecture)
    before = find_sites(model)
    with Monarch(roles="attention").apply(model):
        after = find_sites(model)
        assert (after.blocks, after.attentions, after.head) == (
            before.blocks,
            before.attentions,
            before.head,
        )
        assert not after.select("attention")
        assert after.select("mlp") == before.select("mlp")


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_plain_tensors_have_the_models_own_names_and_shapes(architecture):
    model = tiny_model(architecture)
    assert plain_tensors(model) is None
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    with Monarch().apply(model):
        plain = plain_tensors(model)
        assert plain is not None
        assert {name: tensor.shape for name, tensor in plain.items()} == shapes
        assert list(plain) == list(shapes)


def test_a_footprint_counts_the_smaller_matrices():
    model = tiny_model("llama")
    dense = footprint(model, sites=(sites := find_sites(model)))
    with Monarch(sparsity=0.5, nblocks=2, roles="mlp").apply(model) as applied:
        found = footprint(model, applied, sites=sites)
        gone = sum(row.size * row.sparsity for row in applied.report().rows)
        assert found.parameters == dense.parameters - gone
        assert found.bytes_moved == dense.bytes_moved - 4 * gone
        assert found.bytes_moved_limit == found.bytes_moved
        # Disk holds the matrices for plain transformers and the factors beside them.
        factors = sum(tensor.nbytes for tensor in applied.state().tensors.values())
        assert found.bytes_stored == dense.bytes_stored + factors


def test_pruned_matrices_are_not_replaced():
    model = tiny_model("llama")
    with Magnitude(sparsity=0.5).apply(model) as pruned:
        before = model.model.layers[0].mlp.up_proj
        with pytest.raises(GossamerError, match="magnitude pruned the matrices"):
            Monarch().apply(model)
        assert at_work(model) == (pruned,)
        assert model.model.layers[0].mlp.up_proj is before


def test_pruning_works_on_what_was_not_replaced(tmp_path):
    import gossamer
    from tests.models.tiny import tiny_folder

    model = gossamer.load(tiny_folder(tmp_path / "in")).model
    ids = torch.arange(3, 23)[None]
    with Monarch(roles="mlp").apply(model) as monarch:
        Magnitude(sparsity=0.5).apply(model)
        assert {row.role.partition(".")[0] for row in at_work(model)[1].report().rows} == {
            "attention"
        }
        with torch.no_grad():
            expected = model(input_ids=ids).logits
        monarch.save(tmp_path / "out", gossamer.load(tmp_path / "in").tokenizer)
    again = gossamer.load(tmp_path / "out").model
    assert [work.method.key() for work in at_work(again)] == ["monarch", "magnitude"]
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, expected)


def test_watched_matrices_are_not_replaced():
    model = tiny_model("llama")
    handle = model.model.layers[1].self_attn.q_proj.register_forward_pre_hook(lambda m, a: None)
    with pytest.raises(GossamerError, match=r"layers\.1\.self_attn\.q_proj has a hook"):
        Monarch().apply(model)
    handle.remove()
    assert not at_work(model)


def test_watched_replacements_are_not_undone():
    model = tiny_model("llama")
    applied = Monarch().apply(model)
    handle = model.model.layers[0].mlp.up_proj.register_forward_hook(lambda m, a, o: None)
    with pytest.raises(GossamerError, match="restore that first"):
        applied.restore()
    assert at_work(model) == (applied,)
    handle.remove()
    applied.restore()


def test_replacing_twice_is_undone_in_order():
    model = tiny_model("llama")
    before = dict(model.named_modules())
    first = Monarch(roles="mlp").apply(model)
    second = Monarch(roles="attention").apply(model)
    second.restore()
    first.restore()
    after = dict(model.named_modules())
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)


def test_modes_and_trainability_carry_over():
    model = tiny_model("llama")
    model.requires_grad_(False)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    model.model.layers[1].train()
    with Monarch().apply(model) as applied:
        wanted = {n: m.left.requires_grad for n, m in applied.modules.items()}
        assert [n for n, flag in wanted.items() if flag] == ["model.layers.0.mlp.up_proj"]
        assert all(m.training == ("layers.1" in n) for n, m in applied.modules.items())
