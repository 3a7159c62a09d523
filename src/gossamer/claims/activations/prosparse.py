"""ProSparse: how far the penalty takes a small language model, and what the stages are worth."""

from collections.abc import Sequence
from functools import cache
from math import exp
from typing import Any

from gossamer.claims.activations.digits import one_thread
from gossamer.claims.activations.small_lm import heldout, text, train_lm
from gossamer.claims.base import Claim, Figures, Verdict, mean
from gossamer.evaluate import score
from gossamer.methods.activations.prosparse import FATReLU, ProSparse
from gossamer.methods.activations.training.hidden import measure_activity
from gossamer.methods.activations.training.loop import fit

__all__ = ["CLAIMS"]

STEPS, START = 600, 600
# Peaks at which the two ways to raise the penalty end at about the same sparsity.
SINE, CONSTANT = 0.03, 0.006


def _loss(model: Any) -> float:
    return score(model, heldout(), batch_size=64).loss


def _arm(name: str, method: ProSparse, seed: int, start: int) -> Figures:
    """Train one arm; loss and sparsity with the lifted threshold and, ``_at_zero``, without."""
    model = train_lm("silu", seed, start)
    with method.apply(model, text()) as work:
        activity = work.measure(heldout()).values()
        figures = {
            name: _loss(model),
            f"{name}_sparsity": 1 - sum(a.nonzero for a in activity) / len(activity),
            f"{name}_live": min(a.live or 0.0 for a in activity),
        }
        for module in model.modules():
            if isinstance(module, FATReLU):
                module.threshold = 0.0
        plain = measure_activity(model, heldout()).values()
        figures[f"{name}_at_zero"] = _loss(model)
        figures[f"{name}_sparsity_at_zero"] = 1 - sum(a.nonzero for a in plain) / len(plain)
    return figures


def _method(seed: int, steps: int, **values: Any) -> ProSparse:
    return ProSparse(steps=steps, lr=1e-3, batch_size=16, seed=seed, **values)


def _brief(seed: int) -> Figures:
    with one_thread():
        return {
            **_arm("relu", _method(seed, 60, penalty=0.0), seed, 120),
            **_arm("sine", _method(seed, 60, penalty=0.1), seed, 120),
        }


def _check_brief(runs: Sequence[Figures]) -> Verdict:
    gain = mean(runs, "sine_sparsity") - mean(runs, "relu_sparsity")
    added = all(f["sine_sparsity"] > f["sine_sparsity_at_zero"] for f in runs)
    # Perplexity is the exponential of the loss, so its change is that of the loss, in share.
    cost = max(abs(exp(f["sine"] - f["sine_at_zero"]) - 1) for f in runs)
    if gain <= 0 or not added:
        return Verdict.FAILS
    return Verdict.HOLDS if gain >= 0.2 and cost < 0.01 else Verdict.WEAKER


@cache
def _arms(seed: int) -> Figures:
    with one_thread():
        dense = train_lm("silu", seed, START)
        fit(dense, text(), _method(seed, STEPS).plan())
        return {
            "dense": _loss(dense),
            **_arm("relu", _method(seed, STEPS, penalty=0.0), seed, START),
            **_arm("sine", _method(seed, STEPS, penalty=SINE), seed, START),
            **_arm(
                "constant", _method(seed, STEPS, penalty=CONSTANT, rise="constant"), seed, START
            ),
        }


def _check_sparse(runs: Sequence[Figures]) -> Verdict:
    sparsity, change = mean(runs, "sine_sparsity"), mean(runs, "sine") / mean(runs, "dense") - 1
    gain = sparsity - mean(runs, "relu_sparsity")
    if gain < 0.2:
        return Verdict.FAILS
    return Verdict.HOLDS if sparsity >= 0.8 and change <= 0.02 else Verdict.WEAKER


def _check_stages(runs: Sequence[Figures]) -> Verdict:
    apart = abs(mean(runs, "sine_sparsity") - mean(runs, "constant_sparsity"))
    ratio = exp(mean(runs, "sine") - mean(runs, "constant"))
    if apart > 0.03:
        return Verdict.NOT_TESTABLE
    if ratio <= 0.98:
        return Verdict.HOLDS
    return Verdict.WEAKER if ratio < 1 else Verdict.FAILS


CLAIMS = (
    Claim(
        name="the penalty makes zeros, in brief",
        sentence="Continued training under the penalty makes a ReLU model far sparser than ReLU "
        "alone, and a threshold of 0.01 adds to it for nothing.",
        paper="Llama-2-7B 89.32 %, Llama-2-13B 88.80 % at the quality of the dense model",
        experiment="a character model of 2 blocks trained for 120 steps, then 60 steps each of "
        "ReLU alone and ProSparse: at least 20 points sparser on held-out text; lifting the "
        "threshold adds zeros and changes perplexity by less than 1 %",
        run=_brief,
        check=_check_brief,
        ours="sparsity {sine_sparsity:.3f} (without the threshold {sine_sparsity_at_zero:.3f}), "
        "ReLU alone {relu_sparsity:.3f}; loss {sine:.4f} ({sine_at_zero:.4f} without the "
        "threshold), ReLU alone {relu:.4f}",
        seeds=(0,),
    ),
    Claim(
        name="80 % zeros at the dense model's loss",
        sentence="A SiLU model becomes more than 80 % sparse in its hidden activations at the "
        "quality of the dense model.",
        paper="Llama-2-7B 89.32 %, Llama-2-13B 88.80 % at the quality of the dense model",
        experiment="a character model of 2 blocks, 600 steps of ProSparse against 600 steps of "
        "dense training on the same samples: at least 80 % zeros on held-out text, at least 20 "
        "points more than ReLU alone, and loss within 2 % of dense",
        run=_arms,
        check=_check_sparse,
        ours="sparsity {sine_sparsity:.3f} at loss {sine:.4f}, {sine_live:.1%} of the units live; "
        "dense {dense:.4f}; ReLU alone {relu_sparsity:.3f} at {relu:.4f}",
        tier="small",
    ),
    Claim(
        name="smooth stages beat a constant penalty",
        sentence="A penalty that rises in smooth stages costs less quality than a constant one.",
        paper="a constant penalty degrades Llama-2-7B more at about equal sparsity (ablation; "
        "from memory)",
        experiment="a character model of 2 blocks, 600 steps; peaks chosen so that both end within "
        "3 points of sparsity: perplexity of the stages at most 0.98 of the constant penalty's",
        run=_arms,
        check=_check_stages,
        ours="stages {sine:.4f} nats at sparsity {sine_sparsity:.3f}, constant {constant:.4f} at "
        "{constant_sparsity:.3f}",
        tier="small",
    ),
)
