"""Concept separability and APP: what the paper says, on sentences of four topics."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from gossamer.claims.base import Claim, Figures, Verdict, mean
from gossamer.claims.features.beds import one_thread
from gossamer.methods.features.autoencoder import Dictionary
from gossamer.methods.features.concepts.densities import Densities, separability
from gossamer.methods.features.editing import Intervention, gathered
from gossamer.methods.features.separability import Separability, dense_codes, labelled_rows
from gossamer.models import Tokens, templates
from gossamer.models.labelled import Labelled
from gossamer.models.templates.tasks import TOPICS

__all__ = ["CLAIMS"]

_HOOK, _LAST = "model.layers.1", "model.layers.3"
_TEXTS, _TESTS, _TOP = 200, 150, 40
_NAMES = tuple(TOPICS)


@cache
def _net() -> torch.nn.Module:
    return templates.load()


def _labelled(count: int, seed: int) -> Labelled:
    made = templates.batch("topics", count, seed)
    return Labelled(
        Tokens.from_ids(made.ids), {"label": made.attributes["topic"]}, {"label": _NAMES}
    )


def _method(seed: int) -> Separability:
    return Separability(
        target=_NAMES[seed % 4], hook=_HOOK, k=8, width=256, tokens=60 * 1024, top=_TOP, seed=seed
    )


@cache
def _dictionary(seed: int) -> Dictionary:
    return _method(seed).dictionary(_net(), _labelled(_TEXTS, seed))


def _probe(data: Labelled) -> Tensor:
    """(D + 1, C): least squares of the topic on the last block's activations."""
    rows = gathered(_net(), data.tokens, (_LAST,))[_LAST]
    rows = torch.cat([rows, torch.ones(len(rows), 1)], 1).double()
    wanted = torch.nn.functional.one_hot(data.codes("label"), 4).double()
    ridge = 0.1 * torch.eye(rows.shape[1], dtype=torch.float64)
    return torch.linalg.solve(rows.T @ rows + ridge, rows.T @ wanted)


class _Marked:
    """How well a probe still finds the target, and the perplexity of all texts."""

    def __init__(self, seed: int) -> None:
        self.probe, self.target = _probe(_labelled(_TEXTS, seed)), seed % 4
        self.tests = _labelled(_TESTS, 500 + seed)

    @torch.no_grad()
    def __call__(self) -> tuple[float, float]:
        rows = gathered(_net(), self.tests.tokens, (_LAST,))[_LAST]
        found = (torch.cat([rows, torch.ones(len(rows), 1)], 1).double() @ self.probe).argmax(1)
        label, ids = self.tests.codes("label"), self.tests.tokens.input_ids
        right = float((found == label)[label == self.target].double().mean())
        logits = _net()(ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten())
        return right, float(loss.exp())


@one_thread()
def _suppress(seed: int) -> Figures:
    data, made, marked = _labelled(_TEXTS, seed), _dictionary(seed), _Marked(seed)
    clean, plain = marked()
    found: dict[str, float] = {"clean": clean, "plain": plain}
    mixed = data.codes("label")[
        torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    ]
    shuffled = Labelled(data.tokens, {"label": mixed}, data.values)
    for name, manner, texts in (
        ("app", "posterior", data),
        ("range", "range", data),
        ("full", "full", data),
        ("random", "posterior", shuffled),
    ):
        edit = replace(_method(seed), manner=manner).suppression(_net(), texts, made)
        with Intervention((edit,)).on(_net()):
            right, perplexity = marked()
        found |= {f"drop_{name}": clean - right, f"rise_{name}": perplexity - plain}
    return found


def _check_suppress(runs: Sequence[Figures]) -> Verdict:
    share = mean(runs, "drop_app") / max(mean(runs, "drop_full"), 1e-9)
    cost = mean(runs, "rise_app") / max(mean(runs, "rise_full"), 1e-9)
    if mean(runs, "drop_app") < mean(runs, "drop_random") + 0.3 or cost >= 1:
        return Verdict.FAILS
    return Verdict.HOLDS if share >= 0.8 and cost <= 0.6 else Verdict.WEAKER


@one_thread()
def _separate(seed: int) -> Figures:
    data, made = _labelled(_TEXTS, seed), _dictionary(seed)
    rows, labels = labelled_rows(_net(), data.tokens, data.codes("label"), _HOOK)
    codes = dense_codes(made, rows)
    mixed = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]

    def top(values: Tensor) -> float:
        return float(separability(values, labels).sort(descending=True).values[:50].mean())

    return {
        "latents": top(codes),
        "channels": top(rows),
        "permuted": float(Densities.of(codes, mixed).divergence().mean()),
    }


def _check_separate(runs: Sequence[Figures]) -> Verdict:
    gain = mean(runs, "latents") - mean(runs, "channels")
    if mean(runs, "permuted") >= 0.05 or gain <= 0:
        return Verdict.FAILS
    return Verdict.HOLDS if gain >= 0.1 else Verdict.WEAKER


CLAIMS = (
    Claim(
        name="APP removes a concept at little cost",
        sentence="Damping latents by the probability that they speak for a concept removes it as "
        "silencing them does, at a smaller rise of perplexity.",
        paper="APP gives the smallest perplexity rise at high removal (abstract)",
        experiment="packaged model of templated tasks, TopK dictionary behind the second block, "
        "the 40 latents loudest on one of four topics; a probe at the last block looks for the "
        "topic; APP with labels in random order as control",
        run=_suppress,
        check=_check_suppress,
        ours="probe loses {drop_app:.2f}, silenced {drop_full:.2f}, random labels "
        "{drop_random:.2f}; perplexity rises by {rise_app:.2f} of {plain:.2f}, silenced "
        "{rise_full:.2f}, silenced in the usual range {rise_range:.2f}",
    ),
    Claim(
        name="latents separate concepts better than channels",
        sentence="Single latents of a dictionary tell concepts apart better than single neurons.",
        paper="SAEs more separable on Gemma-2-2B and DeepSeek-R1, five data sets (abstract)",
        experiment="as above; mean of the 50 most separable units, over the tokens of four topics",
        run=_separate,
        check=_check_separate,
        ours="latents {latents:.3f}, channels {channels:.3f}; divergence under permuted labels "
        "{permuted:.4f}",
        tier="small",
    ),
)
