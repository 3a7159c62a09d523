"""CoreMatching: tokens that leave are really gone; whether the right ones leave is measured."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gossamer.claims.activations.digits import one_thread
from gossamer.claims.activations.glyphs import Glyphs, trained
from gossamer.claims.base import Claim, Figures, Verdict, mean
from gossamer.core import topk_mask
from gossamer.core.scores import uniform_random
from gossamer.methods.activations.corematching import CoreMatching, MatchedModel

__all__ = ["CLAIMS"]

SMALL, LARGE = Glyphs(grid=4, keys=3, values=3), Glyphs(grid=8, keys=6, values=4)
CLEAR, NOISY = 0.0, 1.0
WHOLE = (0.0, 1.0)


@torch.no_grad()
def answers(model: nn.Module, task: Glyphs, pixels: Tensor, values: Tensor) -> tuple[float, int]:
    """Share of all keys answered rightly behind one image, (1, 1, side, side), and cache length."""
    out = model(input_ids=task.prompt(1), pixel_values=pixels, use_cache=True)
    cache, right = out.past_key_values, 0
    length = max(layer.keys.shape[2] for layer in cache.layers)
    for key in range(task.keys):
        asked = model(input_ids=torch.tensor([[3 + key]]), past_key_values=cache)
        right += int(asked.logits[0, -1].argmax()) == int(values[key]) + task.first_value
        cache.crop(-1)
    return right / task.keys, length


def kept_places(work: MatchedModel, task: Glyphs) -> Tensor:
    """Which patches of the latest image stayed, bool (P,)."""
    kept = work.pruner.last
    assert kept is not None
    stayed = torch.zeros(kept.length, dtype=torch.bool).scatter(0, kept.places[0], True)
    return stayed[1 : 1 + task.patches]


# -- tokens are gone, positions are not ------------------------------------------------------------


@one_thread()
@torch.no_grad()
def _gone(seed: int) -> Figures:
    """Pruned prompts against the same prompts with the tokens hidden from every later query."""
    task, model = SMALL, trained(SMALL, seed, steps=100)
    pixels, _, values = task.images(8, torch.Generator().manual_seed(seed + 50))
    ids = torch.cat([task.prompt(1), torch.tensor([[3]])], 1)
    total, error, right, lengths = task.patches + 1, 0.0, 0.0, []
    dense = sum(answers(model, task, pixels[i : i + 1], values[i])[0] for i in range(8)) / 8
    for i in range(8):
        image = pixels[i : i + 1]
        with CoreMatching(sparsity=0.0, layer=0.0).apply(model) as work:
            share, length = answers(model, task, image, values[i])
            out = model(input_ids=task.prompt(1), pixel_values=image, use_cache=True)
            asked = model(input_ids=ids[:, -1:], past_key_values=out.past_key_values).logits[0, -1]
            stayed = kept_places(work, task)
        gone = ~torch.cat([torch.tensor([True]), stayed, torch.tensor([True])])
        expected = _hidden(model, ids, image, gone)
        error = max(error, float((asked - expected).abs().max() / expected.abs().max()))
        right += share / 8
        lengths.append(length / total)
    return {
        "error": error,
        "cache": sum(lengths) / 8,
        "longest": max(lengths),
        "accuracy": right,
        "dense": dense,
    }


def _hidden(model: nn.Module, ids: Tensor, image: Tensor, gone: Tensor) -> Tensor:
    """Logits of the last token when it, and blocks behind the first, cannot see some tokens."""
    size = ids.shape[1]
    causal = torch.ones(size, size, dtype=torch.bool).tril()
    later = (causal & ~gone) | torch.eye(size, dtype=torch.bool)
    first = causal.clone()
    first[-1] = later[-1]
    handles = [
        layer.register_forward_pre_hook(
            lambda _, args, kwargs, mask=mask: (args, {**kwargs, "attention_mask": mask}),
            with_kwargs=True,
        )
        for index, layer in enumerate(model.model.language_model.layers)  # type: ignore[union-attr]
        for mask in ((first if index == 0 else later)[None, None],)
    ]
    try:
        return model(input_ids=ids, pixel_values=image, use_cache=False).logits[0, -1]
    finally:
        for handle in handles:
            handle.remove()


def _gone_check(figures: Sequence[Figures]) -> Verdict:
    good = all(f["error"] < 1e-4 and f["cache"] < 1.0 and f["dense"] > 0.9 for f in figures)
    return Verdict.HOLDS if good else Verdict.FAILS


# -- the right tokens ------------------------------------------------------------------------------


def _select(task: Glyphs, model: nn.Module, seed: int, reference: str) -> dict[str, float]:
    """Recall of the glyphs, share kept, and accuracy, by CoreMatching and by chance."""
    count = 32
    pixels, places, values = task.images(count, torch.Generator().manual_seed(seed + 50))
    names = ("recall", "kept", "accuracy", "random", "dense")
    totals: dict[str, float] = dict.fromkeys(names, 0.0)
    method = CoreMatching(sparsity=0.6, layers=WHOLE, layer=0.5)
    method = CoreMatching.from_dict({**method.to_dict(), "reference": reference})
    for i in range(count):
        image, value = pixels[i : i + 1], values[i]
        totals["dense"] += answers(model, task, image, value)[0] / count
        with method.apply(model) as work:
            totals["accuracy"] += answers(model, task, image, value)[0] / count
            stayed = kept_places(work, task)
            totals["recall"] += float(stayed[places[i]].float().mean()) / count
            totals["kept"] += float(stayed.float().mean()) / count
        with method.apply(model) as work:
            chance = uniform_random(torch.empty(1, task.patches), 1000 * seed + i)
            chosen = torch.cat([torch.tensor([True]), topk_mask(chance, int(stayed.sum()))[0]])
            # Scores of 1 and 0: the elbow then keeps exactly the drawn ones.
            work.pruner.score = lambda a, real, prunable, own=chosen: own.float()[None]
            totals["random"] += answers(model, task, image, value)[0] / count
    return totals


@one_thread()
def _right_ones(seed: int) -> Figures:
    figures: dict[str, float] = {}
    for noise in (CLEAR, NOISY):
        task = Glyphs(LARGE.grid, LARGE.keys, LARGE.values, noise)
        model = trained(task, seed, steps=250 if noise == CLEAR else 700)
        for reference in ("core", "text", "late"):
            found = _select(task, model, seed, reference)
            tag = ("clear" if noise == CLEAR else "noisy") + "_" + reference
            figures.update({f"{tag}_{name}": value for name, value in found.items()})
    return figures


def _right_check(figures: Sequence[Figures]) -> Verdict:
    """The paper's form on repeated noise, by the measure of the claim."""
    f = {name: mean(figures, f"noisy_core_{name}") for name in ("recall", "kept", "accuracy")}
    dense, chance = mean(figures, "noisy_core_dense"), mean(figures, "noisy_core_random")
    if f["recall"] >= 0.8 and f["kept"] <= 0.25 and f["accuracy"] >= 0.95 * dense:
        return Verdict.HOLDS if chance <= 0.6 * dense else Verdict.WEAKER
    better = f["recall"] > f["kept"] and f["accuracy"] > chance
    return Verdict.WEAKER if better else Verdict.FAILS


CLAIMS = (
    Claim(
        name="tokens really leave",
        sentence="Pruned tokens take no part in later layers and are in no layer's cache.",
        paper="token pruning from a middle layer on, and a shorter KV cache",
        experiment=(
            "Llava with 16 patches, trained here to read glyphs: every layer's cache is shorter, "
            "and a decoded answer has the logits (within 1e-4) of the unpruned model in which "
            "later queries cannot see the tokens that left: original positions included"
        ),
        run=_gone,
        check=_gone_check,
        ours=(
            "cache {cache:.0%} of the prompt (longest {longest:.0%}), largest difference "
            "{error:.1e}; accuracy {accuracy:.2f}, dense {dense:.2f}"
        ),
        seeds=(0,),
    ),
    Claim(
        name="keeps the informative tokens",
        sentence="Tokens that share most active neurons with the core are the informative ones.",
        paper="near-dense accuracy on ten tasks of LLaVA-1.5-7B with a few of 576 image tokens",
        experiment=(
            "Llava with 64 patches (6 glyphs, the rest one repeated tile), trained here, 32 "
            "images: recall of the glyphs at least 0.8 with at most 25 % of the tokens, accuracy "
            "at least 0.95 of dense, a random choice of equal size at most 0.6 of dense; beside it "
            "blank tiles and the other two references"
        ),
        run=_right_ones,
        check=_right_check,
        ours=(
            "noise tiles: recall {noisy_core_recall:.2f} with {noisy_core_kept:.0%} kept, accuracy "
            "{noisy_core_accuracy:.2f} (dense {noisy_core_dense:.2f}, random "
            "{noisy_core_random:.2f}); text reference recall {noisy_text_recall:.2f} of "
            "{noisy_text_kept:.0%}, late {noisy_late_recall:.2f} of {noisy_late_kept:.0%}; blank "
            "tiles: core {clear_core_recall:.2f} of {clear_core_kept:.0%}, accuracy "
            "{clear_core_accuracy:.2f} (random {clear_core_random:.2f}), text "
            "{clear_text_recall:.2f} of {clear_text_kept:.0%}, late {clear_late_recall:.2f} of "
            "{clear_late_kept:.0%}"
        ),
        tier="small",
    ),
)
