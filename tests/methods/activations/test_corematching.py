"""CoreMatching: tokens that leave are really gone, and everything else is as if never pruned."""

import pytest
import torch

from gossamer.core import GossamerError
from gossamer.methods.activations.corematching import CoreMatching
from gossamer.methods.activations.vlm.tokens import overlap
from gossamer.models import find_sites
from tests.models.tiny import tiny_model
from tests.models.vlm import IMAGE, PATCHES, image_prompt, tiny_vlm

torch.set_num_threads(1)
DENSE_DECODE = {"sparsity": 0.0}


def _lengths(cache) -> list[int]:
    return [layer.keys.shape[2] for layer in cache.layers]


@torch.no_grad()
def _reference(model, inputs, places: torch.Tensor, block: int, later: torch.Tensor):
    """The same computation with nothing removed: masks hide what left, block by block."""
    language, text = model.model.language_model, inputs["input_ids"]
    rows, length = text.shape
    seen = torch.zeros(rows, length, dtype=torch.bool).scatter(1, places, True)
    total = length + later.shape[1]
    causal = torch.ones(total, total, dtype=torch.bool).tril().expand(rows, 1, -1, -1)
    gone = torch.cat([~seen, torch.zeros(rows, later.shape[1], dtype=torch.bool)], 1)
    hidden_from_all = causal & ~gone[:, None, None, :]
    # What left still computes (its output is not looked at), and must see something.
    hidden_from_all = hidden_from_all | torch.eye(total, dtype=torch.bool)
    early = causal.clone()
    early[:, :, length:] = hidden_from_all[:, :, length:]

    def choose(index):
        def hook(module, args, kwargs):
            mask = early if index <= block else hidden_from_all
            return args, {**kwargs, "attention_mask": mask}

        return hook

    handles = [
        layer.register_forward_pre_hook(choose(i), with_kwargs=True)
        for i, layer in enumerate(language.layers)
    ]
    try:
        ids = torch.cat([text, later], 1)
        out = model(input_ids=ids, pixel_values=inputs["pixel_values"], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return out.logits, seen


@pytest.mark.parametrize("layer", [0.0, 0.5])
def test_removing_is_hiding_from_every_later_query(layer: float) -> None:
    model, inputs = tiny_vlm(), image_prompt()
    later = torch.tensor([[7, 9, 11], [12, 5, 30]])
    with CoreMatching(**DENSE_DECODE, layer=layer).apply(model) as work, torch.no_grad():
        out = model(**inputs, use_cache=True)
        places = work.pruner.last.places
        length = inputs["input_ids"].shape[1]
        assert _lengths(out.past_key_values) == [places.shape[1]] * 3
        assert length - PATCHES <= places.shape[1] < length
        assert out.logits.shape[1] == length
        parts = []
        for t in range(3):
            step = model(input_ids=later[:, t : t + 1], past_key_values=out.past_key_values)
            parts.append(step.logits)
        assert _lengths(out.past_key_values) == [places.shape[1] + 3] * 3
    expected, seen = _reference(model, inputs, places, int(layer * 3), later)
    torch.testing.assert_close(torch.cat(parts, 1), expected[:, -3:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.logits[seen], expected[:, :length][seen], rtol=1e-4, atol=1e-4)


def test_scores_are_the_overlap_at_the_block_and_text_stays() -> None:
    model, inputs = tiny_vlm(), image_prompt(1)
    seen: list[torch.Tensor] = []
    down = model.model.language_model.layers[1].mlp.down_proj
    handle = down.register_forward_pre_hook(lambda m, a: seen.append(a[0].detach()))
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    image = inputs["input_ids"] == IMAGE
    scores = overlap(seen[0] > 0, torch.ones_like(image), image, 26, "core")
    with CoreMatching(sparsity=0.6).apply(model) as work, torch.no_grad():
        model(**inputs)
        places = work.pruner.last.places[0]
        kept = torch.zeros_like(image[0]).scatter(0, places, True)
    assert bool(kept[~image[0]].all())
    assert not bool(kept.all())
    gone = scores[0][~kept]
    assert float(gone.max()) <= float(scores[0][kept & image[0]].min())


def test_generate_continues_with_original_positions() -> None:
    model, inputs = tiny_vlm(), image_prompt()
    mask = torch.ones_like(inputs["input_ids"])
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    dense = model.generate(**inputs, attention_mask=mask, **options)
    with CoreMatching(**DENSE_DECODE).apply(model) as work, torch.no_grad():
        found = model.generate(**inputs, attention_mask=mask, **options)
        places = work.pruner.last.places
    length = mask.shape[1]
    logits, _ = _reference(model, inputs, places, 1, found[:, length:])
    assert torch.equal(logits[:, length - 1 : -1].argmax(-1), found[:, length:])
    assert torch.equal(model.generate(**inputs, attention_mask=mask, **options), dense)


def test_padding_on_the_left_changes_nothing() -> None:
    model, inputs = tiny_vlm(), image_prompt(1)
    ids, length = inputs["input_ids"], inputs["input_ids"].shape[1]
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.int64), ids], 1)
    mask = (torch.arange(length + 3) >= 3).long()[None]
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with CoreMatching(sparsity=0.5, layers=(0.0, 1.0)).apply(model) as work:
        pixels = inputs["pixel_values"]
        alone = model.generate(ids, pixel_values=pixels, **options)
        places = work.pruner.last.places
        found = model.generate(padded, pixel_values=pixels, attention_mask=mask, **options)
        assert torch.equal(work.pruner.last.places[:, 3:] - 3, places)
    assert torch.equal(found[:, length + 3 :], alone[:, length:])


def test_neurons_of_the_shortened_prompt_decode() -> None:
    model, inputs = tiny_vlm(), image_prompt()
    method = CoreMatching(sparsity=0.75, layers=(0.0, 1.0))
    with method.apply(model) as work, torch.no_grad():
        out = model(**inputs, use_cache=True)
        memory = work.session.memories[out.past_key_values]
        kept = work.pruner.last.places.shape[1]
        votes = memory.tallies["model.language_model.layers.2.mlp.down_proj"].votes
        assert 0 < float(votes.max()) <= kept
        model(input_ids=torch.tensor([[5], [6]]), past_key_values=out.past_key_values)
        assert all(int(c.sum()) == 2 * 16 for c in memory.cores.values())
        assert work.report().sparsity == 0.75
        assert any("left behind block 1" in note for note in work.report().notes)
    with CoreMatching(prune_tokens=False).apply(model) as work, torch.no_grad():
        out = model(**inputs, use_cache=True)
        assert _lengths(out.past_key_values) == [inputs["input_ids"].shape[1]] * 3
        assert any("all tokens stay" in note for note in work.report().notes)


def test_a_prompt_without_an_image_is_left_alone() -> None:
    model = tiny_vlm()
    ids = torch.randint(3, 60, (2, 12))
    with torch.no_grad():
        dense = model(input_ids=ids).logits
        with CoreMatching().apply(model) as work:
            assert torch.equal(model(input_ids=ids).logits, dense)
            assert work.pruner.last is None


def test_what_cannot_be_pruned_is_refused() -> None:
    with pytest.raises(GossamerError, match="no image tokens"):
        CoreMatching().apply(tiny_model("llama"))
    model, inputs = tiny_vlm(), image_prompt()
    with CoreMatching().apply(model), pytest.raises(GossamerError, match="default cache"):
        model.generate(**inputs, max_new_tokens=2, cache_implementation="static")
    assert find_sites(model).base == "model.language_model"
    for values in ({"layer": 1.0}, {"reference": "x"}, {"layers": (0.5, 0.5)}):
        with pytest.raises(GossamerError):
            CoreMatching(**values)
