import copy

import pytest
import torch

from gossamer.core import GossamerError
from gossamer.methods.features.autoencoder import Dictionary
from gossamer.methods.features.editing import Affine, Edit, Intervention, Posterior
from gossamer.methods.features.rules import TopK
from gossamer.methods.features.splicing import Splice
from tests.models.subjects import random_tokens
from tests.models.tiny import ARCHITECTURES, DECODERS, HIDDEN, INNER, tiny_model

BLOCK = "model.layers.0"


def direction(seed=0, wide=HIDDEN):
    return torch.randn(wide, generator=torch.Generator().manual_seed(seed))


def push(path=BLOCK, positions="all", strength=1.0):
    return Intervention((Edit(path, Affine.added(direction())),), strength, positions)


def dictionary(seed=0):
    made = Dictionary.random(HIDDEN, 64, TopK(8), seed=seed)
    return made.eval().requires_grad_(False)


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@torch.no_grad()
def logits(model, ids=None):
    return model(input_ids=random_tokens(7).input_ids[:3] if ids is None else ids).logits


@torch.no_grad()
def hidden(model, path=BLOCK):
    found = []

    def hook(module, args, output):
        found.append(output[0] if isinstance(output, tuple) else output)

    handle = model.get_submodule(path).register_forward_hook(hook)
    try:
        logits(model)
    finally:
        handle.remove()
    return found[0]


def circuit():
    """Two edits of few columns, one of a matrix's input and one of a block's latents."""
    units = torch.tensor([1, 5, 9])
    down = Edit(f"{BLOCK}.mlp.down_proj:in", Affine.clamp(torch.ones(3)), units)
    law = Affine.scaled(torch.tensor([0.0, 3.0, 2.0]))
    return (down, Edit("model.layers.1", law, units, dictionary()))


def soften():
    chance = torch.rand(64, 5, generator=torch.Generator().manual_seed(1))
    law = Posterior(torch.zeros(64), torch.full((64,), 0.3), chance)
    return (Edit("model.layers.1", law, None, dictionary()),)


def affine():
    return (Edit("model.layers.1", Affine(direction(1), direction(2))),)


KINDS = {"circuit": circuit, "posterior": soften, "affine": affine, "push": lambda: push().edits}


class TestEdits:
    def test_adds_at_every_token(self):
        model = tiny_model("llama")
        before = hidden(model)
        with push(strength=0.5).on(model):
            after = hidden(model)
        assert torch.allclose(after, before + 0.5 * direction(), atol=1e-6)

    def test_an_input_of_few_columns(self):
        model, units = tiny_model("llama"), torch.tensor([3, 7])
        path = f"{BLOCK}.mlp.down_proj"
        edit = Edit(f"{path}:in", Affine.clamp(torch.tensor([2.0, -1.0])), units)
        down = model.get_submodule(path)
        seen = []
        with Intervention((edit,)).on(model):
            handle = down.register_forward_hook(lambda m, args, out: seen.append(args[0]))
            logits(model)
            handle.remove()
        assert (seen[0][..., 3] == 2).all()
        assert (seen[0][..., 7] == -1).all()
        assert seen[0].shape[-1] == INNER
        assert not (seen[0][..., 4] == 2).any()

    def test_latents_change_by_their_atoms_and_the_error_stays(self):
        model, made = tiny_model("llama"), dictionary()
        before = hidden(model)
        codes = made.encode(before)
        dense = torch.zeros(len(codes.values), 64).scatter_(1, codes.indices, codes.values)
        units = torch.tensor([2, 11, 40])
        law = Affine.clamp(torch.tensor([1.0, 2.0, 3.0]))
        with Intervention((Edit(BLOCK, law, units, made),)).on(model):
            after = hidden(model)
        wanted = dense.clone()
        wanted[:, units] = torch.tensor([1.0, 2.0, 3.0])
        change = ((wanted - dense) @ made.W_dec).view_as(before)
        assert torch.allclose(after, before + change, atol=1e-5)

    def test_keeping_the_error_an_idle_edit_is_exact(self):
        model = tiny_model("llama")
        plain = logits(model)
        idle = Edit(BLOCK, Affine.scaled(torch.ones(64)), None, dictionary())
        with Intervention((idle,)).on(model):
            assert torch.equal(logits(model), plain)

    def test_dropping_the_error_is_splicing(self):
        model, made = tiny_model("llama"), dictionary()
        with Splice(model, BLOCK, made):
            spliced = logits(model)
        idle = Edit(BLOCK, Affine.scaled(torch.ones(64)), None, made, keep_error=False)
        with Intervention((idle,)).on(model):
            assert torch.allclose(logits(model), spliced, atol=1e-6)

    def test_sinks_pass(self):
        model, made = tiny_model("llama"), dictionary()
        plain = logits(model)
        made.metadata["sink_norm"] = 0.0
        with Intervention((Edit(BLOCK, Affine.clamp(torch.ones(64)), None, made),)).on(model):
            assert torch.equal(logits(model), plain)

    @pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a in DECODERS])
    def test_every_decoder(self, architecture):
        from gossamer.models import find_sites

        model = tiny_model(architecture)
        path = find_sites(model).blocks[0]
        before = hidden(model, path)
        with push(path, "2").on(model):
            after = hidden(model, path)
        moved = (after - before).abs().amax(-1) > 0
        assert moved[:, 2].all()
        assert moved.sum() == len(moved)


class TestGenerate:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("positions", ["all", "last", "0,5"])
    def test_the_same_with_and_without_cache(self, kind, positions):
        model = tiny_model("llama")
        its = Intervention(KINDS[kind](), 1.5, positions)
        prompt = random_tokens(3).input_ids[:2, :6]
        options = {
            "attention_mask": torch.ones_like(prompt),
            "max_new_tokens": 8,
            "min_new_tokens": 8,
            "do_sample": False,
            "output_logits": True,
            "return_dict_in_generate": True,
        }
        runs = []
        with its.on(model):
            for cached in (True, False):
                out = model.generate(prompt, use_cache=cached, **options)
                runs.append((out.sequences, torch.stack(out.logits)))
        plain = torch.stack(model.generate(prompt, **options).logits)
        assert torch.equal(runs[0][0], runs[1][0])
        assert torch.allclose(runs[0][1], runs[1][1], atol=1e-4)
        assert not torch.allclose(runs[0][1], plain, atol=1e-3)

    def test_last_edits_the_prompt_end_and_what_follows(self):
        model = tiny_model("llama")
        seen = []
        prompt = random_tokens(3).input_ids[:1, :6]
        with push(positions="last").on(model):
            edited = model.get_submodule(BLOCK)
            handle = edited.register_forward_hook(lambda m, a, out: seen.append(out))
            model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=3,
                min_new_tokens=3,
                do_sample=False,
                use_cache=False,
            )
            handle.remove()
        with torch.no_grad():
            plain = hidden_of_ids(model, prompt)
        moved = (seen[0] - plain).abs().amax(-1)[0] > 0
        assert moved.tolist() == [False] * 5 + [True]
        assert [part.shape[1] for part in seen] == [6, 7, 8]

    def test_left_padding_moves_no_place(self):
        model, ids = tiny_model("llama"), random_tokens(3).input_ids[:1, :6]
        padded = torch.cat([torch.zeros(1, 3, dtype=torch.int64), ids], 1)
        mask = torch.cat([torch.zeros(1, 3, dtype=torch.int64), torch.ones_like(ids)], 1)
        place = (mask.cumsum(1) - 1).clamp_min(0)
        for positions in ("last", "1,4", "0"):
            with torch.no_grad(), push(positions=positions).on(model):
                plain = model(input_ids=ids).logits
                out = model(input_ids=padded, attention_mask=mask, position_ids=place).logits
            assert torch.allclose(out[:, 3:], plain, atol=1e-4)

    def test_last_of_a_text_padded_on_the_right(self):
        model, ids = tiny_model("llama"), random_tokens(3).input_ids[:1, :6]
        padded = torch.cat([ids, torch.zeros(1, 2, dtype=torch.int64)], 1)
        mask = torch.tensor([[1, 1, 1, 1, 1, 1, 0, 0]])
        with torch.no_grad(), push(positions="last").on(model):
            plain = model(input_ids=ids).logits
            out = model(input_ids=padded, attention_mask=mask).logits
        assert torch.allclose(out[:, :6], plain, atol=1e-4)


def hidden_of_ids(model, ids):
    found = []
    handle = model.get_submodule(BLOCK).register_forward_hook(lambda m, a, out: found.append(out))
    model(input_ids=ids)
    handle.remove()
    return found[0]


class TestUndoing:
    @pytest.mark.parametrize("positions", ["all", "last", "3"])
    def test_leaves_no_trace(self, positions):
        model = tiny_model("llama")
        plain, count = logits(model), hooks(model)
        hooked = push(positions=positions).on(model)
        assert not torch.equal(logits(model), plain)
        hooked.remove()
        hooked.remove()
        assert torch.equal(logits(model), plain)
        assert hooks(model) == count
        assert "generate" not in vars(model)

    def test_after_an_error_inside_the_block(self):
        model = tiny_model("llama")
        plain = logits(model)
        with pytest.raises(IndexError), push(positions="last").on(model):
            model.generate(torch.full((1, 3), 10_000), max_new_tokens=2)
        assert torch.equal(logits(model), plain)
        assert "generate" not in vars(model)

    def test_after_an_interrupt(self):
        model = tiny_model("llama")
        with pytest.raises(KeyboardInterrupt), push(positions="last").on(model):
            raise KeyboardInterrupt
        assert hooks(model) == 0

    def test_an_unknown_module_leaves_the_earlier_edits_off(self):
        model = tiny_model("llama")
        edits = (*push().edits, *push("model.layers.9").edits)
        with pytest.raises(GossamerError, match="did you mean"):
            Intervention(edits, 1.0, "last").on(model)
        assert hooks(model) == 0
        assert "generate" not in vars(model)

    @pytest.mark.parametrize("first", [0, 1])
    def test_two_are_undone_in_any_order(self, first):
        model = tiny_model("llama")
        plain = logits(model)
        prompt = random_tokens(3).input_ids[:1, :4]
        options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 3}
        options |= {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        works = [push(path, "last", 3.0) for path in (BLOCK, "model.layers.1")]
        hooked = [work.on(model) for work in works]
        hooked[first].remove()
        left = torch.stack(model.generate(prompt, use_cache=False, **options).logits)
        hooked[1 - first].remove()
        assert torch.equal(logits(model), plain)
        assert "generate" not in vars(model)
        with works[1 - first].on(model):
            alone = torch.stack(model.generate(prompt, use_cache=False, **options).logits)
        assert torch.equal(left, alone)


class TestObject:
    @pytest.mark.parametrize("kind", KINDS)
    def test_saved_and_loaded(self, kind, tmp_path):
        model = tiny_model("llama")
        its = Intervention(KINDS[kind](), 0.7, "1,2,8")
        folder = its.save(tmp_path / "its")
        again = Intervention.load(folder)
        with its.on(model):
            wanted = logits(model)
        with again.on(model):
            assert torch.equal(logits(model), wanted)
        assert (again.strength, again.positions) == (0.7, "1,2,8")

    def test_damaged_files_are_refused(self, tmp_path):
        with pytest.raises(GossamerError, match="no readable intervention"):
            Intervention.load(tmp_path)
        folder = push().save(tmp_path / "its")
        (folder / "intervention.json").write_text("{}")
        with pytest.raises(GossamerError, match="lacks or misstates"):
            Intervention.load(folder)
        with pytest.raises(GossamerError, match="not empty"):
            push().save(folder)

    def test_strength_zero_and_doubled(self):
        model = tiny_model("llama")
        plain = hidden(model)
        with push().at(0.0).on(model):
            assert torch.equal(hidden(model), plain)
        with push().at(-2.0).on(model):
            assert torch.allclose(hidden(model), plain - 2 * direction(), atol=1e-5)

    def test_sums(self):
        model = tiny_model("llama")
        both = push() + push("model.layers.1")
        with push().on(model), push("model.layers.1").on(model):
            wanted = logits(model)
        with both.on(model):
            assert torch.equal(logits(model), wanted)
        with pytest.raises(GossamerError, match="one by one"):
            _ = push() + push(strength=2.0)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), "much"])
    def test_impossible_strength(self, bad):
        with pytest.raises(GossamerError, match="strength"):
            push(strength=bad)

    @pytest.mark.parametrize("bad", ["", "first", "-1", "1,,2", "1.5"])
    def test_impossible_positions(self, bad):
        with pytest.raises(GossamerError, match="positions"):
            push(positions=bad)

    def test_an_edit_of_another_width(self):
        model = tiny_model("llama")
        edit = Edit(BLOCK, Affine.added(torch.ones(HIDDEN + 1)))
        with Intervention((edit,)).on(model), pytest.raises(GossamerError, match="there are 32"):
            logits(model)
        with pytest.raises(GossamerError, match="there are 64"):
            Edit(BLOCK, Affine.added(torch.ones(65)), None, dictionary())
        with pytest.raises(GossamerError, match="2 are named"):
            Edit(BLOCK, Affine.added(torch.ones(3)), torch.tensor([0, 1]))
        with pytest.raises(GossamerError, match="unit -1 is below 0"):
            Edit(BLOCK, Affine.added(torch.ones(2)), torch.tensor([0, -1]), dictionary())

    def test_a_law_with_nan(self):
        with pytest.raises(GossamerError, match="affine law holds NaN"):
            Edit(BLOCK, Affine.added(torch.tensor([1.0, float("nan")])))

    def test_copies_stay_apart(self):
        model = tiny_model("llama")
        other = copy.deepcopy(model)
        with push().on(model):
            assert not torch.equal(logits(model), logits(other))
