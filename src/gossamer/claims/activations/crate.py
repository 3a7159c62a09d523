"""CRATE: a white-box block against the usual one on small images, and what it does to rates."""

from collections.abc import Sequence
from functools import cache, partial
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from gossamer.claims.activations.digits import Split, digits, one_thread
from gossamer.claims.base import Claim, Figures, Verdict, mean
from gossamer.methods.activations.crate import CRATE
from gossamer.methods.activations.crate_blocks.applied import CRATEModel
from gossamer.methods.activations.training.loop import fit
from gossamer.models import Inputs

__all__ = ["CLAIMS"]


def _vit(width: int, depth: int, seed: int) -> Any:
    """A vision transformer on 16 patches of 2 x 2."""
    config = ViTConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=depth,
        num_attention_heads=4,
        image_size=8,
        patch_size=2,
        num_channels=1,
    )
    config.num_labels = 10
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ViTForImageClassification(config).eval()


def _pixels(images: torch.Tensor) -> torch.Tensor:
    return images[:, None] / 8 - 1


@torch.no_grad()
def _accuracy(model: Any, split: Split) -> float:
    found = model(pixel_values=_pixels(split.x_test)).logits.argmax(1)
    return float((found == split.y_test).float().mean())


def _size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _falling(values: list[float]) -> float:
    """Share of steps from a layer to the next that go down."""
    steps = list(pairwise(values))
    return sum(b < a for a, b in steps) / len(steps)


def _trends(name: str, work: CRATEModel, split: Split) -> Figures:
    rates = list(work.measure(Inputs({"pixel_values": _pixels(split.x_test[:200])})).values())
    return {
        f"{name}_compressed": _falling([r.compressed for r in rates]),
        f"{name}_nonzero": _falling([r.nonzero for r in rates]),
        f"{name}_zeros": 1 - sum(r.nonzero for r in rates) / len(rates),
        f"{name}_first": rates[0].compressed,
        f"{name}_last": rates[-1].compressed,
    }


class _NoISTA(nn.Module):
    """The ablation: what comes behind the norm goes on as it is."""

    def __init__(self, like: nn.Module) -> None:
        super().__init__()
        self.dictionary = like.dictionary

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@cache
def _arms(width: int, depth: int, steps: int, seed: int) -> Figures:
    with one_thread():
        split = digits(seed)
        data = Inputs({"pixel_values": _pixels(split.x), "labels": split.y})
        method = CRATE(steps=steps, lr=2e-3, batch_size=64, seed=seed)
        model = _vit(width, depth, seed)
        whole = _size(model)
        figures: dict[str, float] = {}
        with method.apply(model, data) as work:
            figures |= {"crate": _accuracy(model, split), "share": _size(model) / whole}
            figures |= _trends("trained", work, split)
        # Of 1, 2 and 4 in a thousand, the rate at which the usual block learns best.
        usual = CRATE(steps=steps, lr=4e-3, batch_size=64, seed=seed).plan()
        fit(model, data, usual)
        return figures | {"vit": _accuracy(model, split)}


@cache
def _ablation(width: int, depth: int, steps: int, seed: int) -> Figures:
    with one_thread():
        split = digits(seed)
        data = Inputs({"pixel_values": _pixels(split.x), "labels": split.y})
        method = CRATE(steps=0, seed=seed)
        model = _vit(width, depth, seed)
        with method.apply(model, data) as work:
            fresh = _trends("fresh", work, split)
            for block in work.blocks.values():
                block.sparsify = _NoISTA(block.sparsify)  # type: ignore[assignment]
            plan = CRATE(steps=steps, lr=2e-3, batch_size=64, seed=seed).plan()
            fit(model, data, plan)
            lost = {"identity": _accuracy(model, split)}
            lost |= {"identity_zeros": _trends("identity", work, split)["identity_zeros"]}
        return {**_arms(width, depth, steps, seed), **fresh, **lost}


def _check(runs: Sequence[Figures]) -> Verdict:
    share = mean(runs, "crate") / mean(runs, "vit")
    if mean(runs, "crate") < 0.5:
        return Verdict.FAILS
    small = mean(runs, "share") < 0.6
    return Verdict.HOLDS if share >= 0.97 and small else Verdict.WEAKER


def _check_trends(runs: Sequence[Figures]) -> Verdict:
    found = 0
    for name in ("compressed", "nonzero"):
        trained = mean(runs, f"trained_{name}")
        found += trained > 0.5 and trained > mean(runs, f"fresh_{name}")
    return (Verdict.FAILS, Verdict.WEAKER, Verdict.HOLDS)[found]


def _check_ista(runs: Sequence[Figures]) -> Verdict:
    loss = mean(runs, "crate") - mean(runs, "identity")
    sparser = mean(runs, "trained_zeros") - mean(runs, "identity_zeros")
    if loss >= 0.03 or sparser >= 0.3:
        return Verdict.HOLDS
    return Verdict.WEAKER if sparser > 0.1 else Verdict.FAILS


_TEXT = {
    "sentence": "White-box blocks reach nearly the accuracy of a vision transformer of the same "
    "width with a part of its parameters.",
    "paper": "ImageNet-1k top-1 66.7, 69.2, 70.8, 71.3 for sizes T, S, B, L (from memory)",
    "check": _check,
    "ours": "accuracy {crate:.3f} with {share:.0%} of the parameters; vision transformer {vit:.3f}",
}

CLAIMS = (
    Claim(
        name="near a vision transformer, in brief",
        **_TEXT,
        experiment="digits as 16 patches of 2 x 2, width 32, 2 blocks, 120 steps each: at least "
        "0.97 of the vision transformer's accuracy with less than 60 % of its parameters",
        run=partial(_arms, 32, 2, 120),
        seeds=(0,),
    ),
    Claim(
        name="near a vision transformer",
        **_TEXT,
        experiment="digits as 16 patches of 2 x 2, width 48, 6 blocks, 300 steps each: at least "
        "0.97 of the vision transformer's accuracy with less than 60 % of its parameters",
        run=partial(_arms, 48, 6, 300),
        tier="small",
    ),
    Claim(
        name="ISTA makes the zeros",
        sentence="The sparse-coding step is what makes representations sparse.",
        paper="layer-wise sparsity and ablations of the block (figures, not read)",
        experiment="as above, with the identity in ISTA's place: accuracy falls by 3 points, or "
        "the zeros are gone",
        run=partial(_ablation, 48, 6, 300),
        check=_check_ista,
        ours="zeros {trained_zeros:.3f} at accuracy {crate:.3f}; with the identity "
        "{identity_zeros:.3f} at {identity:.3f}",
        tier="small",
    ),
    Claim(
        name="rates fall with depth",
        sentence="After training, deeper layers compress more (Rᶜ of Z' falls) and are sparser.",
        paper="Rᶜ and the share of non-zeros fall over most layers of CRATE-Small (figure 3)",
        experiment="as above, on 200 test images: share of steps to the next layer at which Rᶜ "
        "and the non-zero share fall; more than half of them, and more than in fresh blocks",
        run=partial(_ablation, 48, 6, 300),
        check=_check_trends,
        ours="Rᶜ falls at {trained_compressed:.2f} of the steps ({trained_first:.1f} to "
        "{trained_last:.1f} nats; fresh {fresh_compressed:.2f}), the non-zero share at "
        "{trained_nonzero:.2f} (fresh {fresh_nonzero:.2f})",
        tier="small",
    ),
)
