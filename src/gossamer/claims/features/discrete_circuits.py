"""Discrete circuits: heads found from codes, against the heads whose ablation hurts."""

from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from gossamer.claims.base import Claim, Figures, Verdict, mean
from gossamer.claims.features.beds import one_thread
from gossamer.methods.features.circuits.codes import head_scores
from gossamer.methods.features.circuits.heads import ablation_effects, head_outputs
from gossamer.methods.features.circuits.marks import area_under_curve, mark, true_heads
from gossamer.methods.features.discrete_circuits import Circuit, DiscreteCircuits
from gossamer.models import templates

__all__ = ["CLAIMS"]

_EXAMPLES, _JUDGED, _SHUFFLES = 10, 60, 20


@cache
def _model() -> Any:
    return templates.load()


@cache
def _truth(task: str) -> Tensor:
    """Heads whose ablation costs more than a tenth of what the worst one costs, (L, H)."""
    shown = templates.batch(task, _JUDGED, 5)
    with one_thread():
        return true_heads(ablation_effects(_model(), shown.ids, shown.corrupted, shown.right))


def _shuffled(circuit: Circuit, truth: Tensor, seed: int) -> float:
    """Area under the curve when nobody knows which examples can be solved, on average."""
    codes = torch.cat([circuit.positive, circuit.negative])
    generator, found = torch.Generator().manual_seed(seed), []
    for _ in range(_SHUFFLES):
        one, other = torch.randperm(len(codes), generator=generator).chunk(2)
        scores = head_scores(codes[one], codes[other], share=circuit.ranked_by == "shares")
        found.append(area_under_curve(scores, truth))
    return sum(found) / len(found)


def _found(task: str, seed: int) -> Figures:
    model, truth = _model(), _truth(task)
    method, shown = DiscreteCircuits(seed=seed), templates.batch(task, _EXAMPLES, 100 + seed)
    with one_thread():
        circuit = method.find(model, shown)
        positive = head_outputs(model, {"input_ids": shown.ids})
        negative = head_outputs(model, {"input_ids": shown.corrupted})
        shuffled = _shuffled(circuit, truth, seed)
    marks = mark(circuit.scores, truth, circuit.heads(method.sparsity))
    apart = (positive.mean(0) - negative.mean(0)).norm(dim=1)
    return {
        "auc": marks.auc,
        "precision": marks.precision,
        "recall": marks.recall,
        "auc_counts": area_under_curve(circuit.counts, truth),
        "auc_shuffled": shuffled,
        "auc_means": area_under_curve(apart, truth),
        "true": float(truth.sum()),
    }


def _check(runs: Sequence[Figures]) -> Verdict:
    auc, shuffled = mean(runs, "auc"), mean(runs, "auc_shuffled")
    if auc <= 0.6 or auc < shuffled + 0.1:
        return Verdict.FAILS
    better = auc > mean(runs, "auc_means") and abs(shuffled - 0.5) <= 0.1
    return Verdict.HOLDS if auc >= 0.8 and better else Verdict.WEAKER


_OURS = (
    "area under the curve {auc:.2f} by share of codes ({auc_counts:.2f} by count, "
    "{auc_shuffled:.2f} with shuffled labels, {auc_means:.2f} for the difference of mean outputs); "
    "of the best quarter of the heads precision {precision:.2f}, recall {recall:.2f}; {true:.0f} "
    "of 16 heads matter"
)


def _claim(task: str, what: str, tier: Any) -> Claim:
    return Claim(
        name=f"finds the heads of {what}",
        sentence="Codes of the heads' outputs on ten examples and their corrupted twins rank the "
        "heads of a task above the others.",
        paper="GPT-2 small: higher precision and recall than path patching baselines on three "
        "tasks, in seconds, from 5 to 10 examples",
        experiment=f"the packaged model of templates, task {task!r}; the truth is every head whose "
        "mean ablation costs over a tenth of the largest cost in log odds, on 60 examples; holds "
        "at an area under the curve of 0.8, above that of the difference of mean outputs, with "
        "0.5 within 0.1 for shuffled labels",
        run=partial(_found, task),
        check=_check,
        ours=_OURS,
        tier=tier,
    )


CLAIMS = (
    _claim("years", "greater-than", "smoke"),
    _claim("names", "indirect objects", "small"),
    _claim("arguments", "docstrings", "small"),
)
