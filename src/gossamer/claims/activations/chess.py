"""CHESS: thresholds per channel lose less of what enters W_d than one threshold per layer."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from gossamer.claims.activations.masked import at_most, perplexity, text, under
from gossamer.claims.base import Claim, Figures, Verdict, mean
from gossamer.claims.lm import heldout, nano
from gossamer.core import QuantileSketch, Site
from gossamer.methods.activations.cats import CATS
from gossamer.methods.activations.chess import CHESS
from gossamer.methods.activations.gates import Gate, Tap

__all__ = ["CLAIMS"]

SPARSITY = 0.6


def _gates(method: Any, seed: int) -> tuple[list[Gate], float]:
    """A method's gates, and the held-out perplexity under them."""
    with method.apply(nano().model, text(seed)) as work:
        return list(work.gates.values()), perplexity()


def _parts() -> list[tuple[Tensor, Tensor]]:
    """Per layer, activated gate and up output of the dense model on held-out text."""
    found: dict[str, list[Tensor]] = {"act_fn": [], "up_proj": []}
    handles = []
    layers: Any = nano().model.model.layers

    def hook(name: str) -> Any:
        def leave(module: nn.Module, args: Any, out: Tensor) -> None:
            found[name].append(out.flatten(0, -2))

        return leave

    for layer in layers:
        for name in found:
            handles.append(getattr(layer.mlp, name).register_forward_hook(hook(name)))
    with torch.no_grad():
        nano().model(heldout(2).input_ids)
    for handle in handles:
        handle.remove()
    return list(zip(found["act_fn"], found["up_proj"], strict=True))


def _lost(gate: Gate, value: Tensor, up: Tensor) -> tuple[float, float]:
    """Mean squared loss of the vector entering W_d, and the share removed."""
    removed = gate.removes(value)
    return float((value * up * removed).square().sum(1).mean()), float(removed.float().mean())


def _errors(seed: int) -> Figures:
    parts = _parts()
    ours, chess = _gates(CHESS(sparsity=SPARSITY, attention=False), seed)
    theirs, cats = _gates(CATS(sparsity=SPARSITY), seed)
    found = [
        (_lost(a, *part), _lost(b, *part)) for a, b, part in zip(ours, theirs, parts, strict=True)
    ]
    return {
        "better": sum(a[0] < b[0] for a, b in found) / len(found),
        "ratio": sum(a[0] / b[0] for a, b in found) / len(found),
        "apart": max(abs(a[1] - b[1]) for a, b in found),
        "chess": chess,
        "cats": cats,
    }


def _errors_check(figures: Sequence[Figures]) -> Verdict:
    quality = at_most("chess", "cats", 1.0, 1.01)(figures)
    if mean(figures, "better") < 0.5 or quality is Verdict.FAILS:
        return Verdict.FAILS
    whole = mean(figures, "better") >= 0.9 and max(f["apart"] for f in figures) <= 0.01
    return Verdict.HOLDS if whole and quality is Verdict.HOLDS else Verdict.WEAKER


def _planted(seed: int) -> Figures:
    """An MLP whose up outputs differ in size by two decades."""
    torch.manual_seed(seed)
    width = 256
    scale = 10 ** torch.linspace(-1, 1, width)[torch.randperm(width)]
    value = silu(torch.randn(4096, width))
    up = torch.randn(4096, width) * scale
    site = Site("down", "mlp.down", 0, "down", "weight", (8, width))
    losses = {}
    for name, weight in (("cats", None), ("chess", up[:2048].square().mean(0).sqrt())):
        tap = Tap("n", "mlp.neurons", 0, "n", 2, width, (site,), weight)
        sketch = QuantileSketch(width)
        sketch.update(value[:2048] if weight is None else value[:2048] * weight)
        losses[name], losses[f"{name}_share"] = _lost(
            tap.gate(SPARSITY, sketch), value[2048:], up[2048:]
        )
    return {**losses, "ratio": losses["chess"] / losses["cats"]}


def _planted_check(figures: Sequence[Figures]) -> Verdict:
    apart = max(abs(f["chess_share"] - f["cats_share"]) for f in figures)
    if apart > 0.01 or mean(figures, "ratio") >= 1.0:
        return Verdict.FAILS
    return Verdict.HOLDS if mean(figures, "ratio") <= 0.5 else Verdict.WEAKER


def _attention(seed: int) -> Figures:
    """What gating k and v as well would cost: the paper's reason to leave them dense."""
    gates, full = _gates(CHESS(sparsity=SPARSITY), seed)
    return {
        "gated": float({g.role for g in gates} == {"attention.q", "attention.o", "mlp.neurons"}),
        "mlp": under(CHESS(sparsity=SPARSITY, attention=False), seed),
        "full": full,
    }


def _attention_check(figures: Sequence[Figures]) -> Verdict:
    if any(f["gated"] != 1.0 for f in figures):
        return Verdict.FAILS
    return at_most("full", "mlp", 1.05, 1.15)(figures)


CLAIMS = (
    Claim(
        name="loses less than CATS",
        sentence="Equalising the expected cost over channels loses less than one threshold.",
        paper="smaller loss than CATS on 8 tasks (abstract)",
        experiment="nano at 60 %, thresholds from other text: squared loss of the vector entering "
        "W_d below CATS' in at least 90 % of the layers at equal measured sparsity (within a "
        "point), and perplexity without attention no higher",
        run=_errors,
        check=_errors_check,
        ours="smaller loss in {better:.0%} of the layers (ratio {ratio:.3f}, sparsities "
        "{apart:.3f} apart); perplexity {chess:.3f} against {cats:.3f}",
    ),
    Claim(
        name="follows the size of the up outputs",
        sentence="The gain comes from channels whose up outputs differ in size.",
        paper="the derivation of the channel-wise threshold",
        experiment="synthetic MLP, sizes spread over two decades, 60 %, fresh tokens: at most half "
        "of CATS' loss",
        run=_planted,
        check=_planted_check,
        ours="loss {chess:.3f} against {cats:.3f}, ratio {ratio:.2f}",
    ),
    Claim(
        name="q and o cost little",
        sentence="The inputs of q and o can be gated as well if k and v stay dense.",
        paper="selective sparsification of attention (paper, section 3.3, from memory)",
        experiment="nano at 60 %: perplexity with q and o gated at most 1.05 of that without; "
        "k and v have no gate",
        run=_attention,
        check=_attention_check,
        ours="perplexity {full:.2f} with attention, {mlp:.2f} without",
        seeds=(0,),
    ),
)
