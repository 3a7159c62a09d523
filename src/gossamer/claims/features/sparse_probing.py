"""Sparse probing: no consistent gain from latents, in a harness that sees a gain where one is."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from gossamer.claims.base import Claim, Figures, Tier, Verdict, mean
from gossamer.claims.features.beds import one_thread
from gossamer.core import SparseRows
from gossamer.methods.features.autoencoder import Dictionary
from gossamer.methods.features.hooks import record
from gossamer.methods.features.probing.probes import (
    BASELINES,
    Components,
    Logistic,
    Neighbours,
    Probe,
    Rows,
    SparseProbe,
)
from gossamer.methods.features.probing.quiver import Shot, Task, gain, shoot
from gossamer.methods.features.probing.tasks import last_token, one_against_rest
from gossamer.methods.features.topk_sae import TopKSAE
from gossamer.methods.features.toy import Superposition
from gossamer.methods.features.training import train
from gossamer.models import Tokens, templates
from gossamer.models.quiet import quiet

__all__ = ["CLAIMS", "template_dictionary", "template_model"]

_HOOK = "model.layers.1"
_WIDTH, _K = 256, 8
_TEXT = 999
"""Seed of the sentences that dictionaries learn from; tasks draw others."""


@dataclass(frozen=True)
class _Scale:
    """How much a tier measures."""

    steps: int
    rows: int
    size: int
    strengths: tuple[float, ...]
    settings: tuple[tuple[str, float], ...]
    probes: tuple[Probe, ...]
    latents: tuple[int, ...]
    penalty: str


_FEW = (1.0, 0.01)
_MANY = (1e2, 1.0, 1e-2)
_SCALES: dict[Tier, _Scale] = {
    "smoke": _Scale(
        200,
        500,
        96,
        _FEW,
        (("scarcity", 32), ("imbalance", 0.1), ("noise", 0.2), ("noise", 0.5), ("shift", 0)),
        (Logistic(_FEW), Components((4, 16)), Neighbours()),
        (16,),
        "l2",
    ),
    "small": _Scale(
        1500,
        1200,
        128,
        _MANY,
        (
            *(("scarcity", n) for n in (16, 64)),
            *(("imbalance", p) for p in (0.1, 0.7)),
            *(("noise", p) for p in (0.2, 0.5)),
            ("shift", 0),
        ),
        tuple(made() for made in BASELINES.values()),
        (16, 128),
        "l1",
    ),
}


@cache
def template_model() -> Any:
    with quiet():
        return templates.load()


@cache
def template_dictionary(tier: Tier) -> Dictionary:
    """TopK latents of the packaged template model's second block, on every task's sentences."""
    model = template_model()
    ids = [templates.batch(task, 300, _TEXT).ids for task in templates.TASKS]
    found = [record(model, (_HOOK,), {"input_ids": part})[_HOOK] for part in ids]
    rows = torch.cat([part.reshape(-1, part.shape[-1]) for part in found])
    method = TopKSAE(k=_K, width=_WIDTH, lr=5e-3 if tier == "smoke" else 2e-3)

    def batches() -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(0)
        while True:
            yield rows[torch.randint(len(rows), (256,), generator=generator)]

    recipe = method.recipe(_SCALES[tier].steps, 256)
    return train(batches(), width=_WIDTH, rule=method.rule(), recipe=recipe)


_QUESTIONS = (
    ("who gives", "names", "subject", 20),
    ("who gets", "names", "indirect object", 20),
    ("which year", "years", "year", 79),
    ("which word", "feelings", "word", 16),
    ("which letter", "arguments", "third", 16),
)
"""Name, task, and an attribute with how many values."""
_SHIFTED_BY = {"years": 2, "feelings": 1, "arguments": 3}


def _tasks(tier: Tier, seed: int) -> Iterator[Task]:
    """Is the attribute's value in a random half of its values? Shifted: other names, orders."""
    model = template_model()
    generator = torch.Generator().manual_seed(seed)
    questions = [q for q in _QUESTIONS if tier == "small" or q[1] != "years"]
    for number, (name, task, attribute, many) in enumerate(questions):
        made = templates.batch(task, _SCALES[tier].rows, 1 + 10 * seed + number)
        half = torch.randperm(many, generator=generator)[: many // 2]
        labels = torch.isin(made.attributes[attribute], half).long()
        if task == "names":
            away = made.attributes["order"] == 1
        else:
            away = made.ids[:, _SHIFTED_BY[task]] % 2 == 0
        rows = last_token(model, Tokens.from_ids(made.ids), _HOOK, windows=600)
        made_of = template_dictionary(tier)
        yield from one_against_rest(rows, labels, made_of, shifted=away, seed=seed, names=[name])


def _planted(seed: int) -> float:
    """Gain where it must be: each label is one atom of a known sparse code, among 256 in 32."""
    bed = Superposition(d_in=32, atoms=256, active=10.0, seed=seed)
    codes, noise = next(bed.codes(1200, bed.d_in, seed))
    rows = Rows.of(codes @ bed.true_atoms() + bed.noise * noise, SparseRows.from_dense(codes))
    pool, test = torch.arange(600), torch.arange(600, 1200)
    on = codes != 0
    shots = [
        shoot(
            Task(str(i), rows.at(pool), on[pool, i], rows.at(test), on[test, i]),
            "scarcity",
            32,
            (Logistic(_FEW), Components((4, 16)), Neighbours()),
            (SparseProbe(16, "l2", _FEW),),
            seed=seed,
        )
        for i in (3, 6, 12)
    ]
    return gain(shots).value


def _leak(shots: Sequence[Shot]) -> float:
    """Gain a harness would report that picks by the test rows."""
    gains = [max(s.test.values()) - s.test[s.pick(sparse=False)] for s in shots]
    return sum(gains) / len(gains)


def _quivers(tier: Tier, seed: int) -> Figures:
    scale = _SCALES[tier]
    sparse = [
        SparseProbe(n, "l1" if scale.penalty == "l1" else "l2", scale.strengths)
        for n in scale.latents
    ]
    with one_thread():
        tasks = list(_tasks(tier, seed))
        shots = [
            shoot(task, regime, amount, scale.probes, sparse, seed=100 * seed + i, size=scale.size)
            for i, (regime, amount) in enumerate(scale.settings)
            for task in tasks
        ]
        planted = _planted(seed)
    coin = [s for s in shots if (s.regime, s.amount) == ("noise", 0.5)]
    # Coin flips teach nothing, so their quiver's difference is noise without a mean.
    real = [s for s in shots if s not in coin]
    figures = {"planted": planted, "leak": _leak(shots)}
    figures["coin"] = sum(s.test[s.pick(sparse=True)] for s in coin) / len(coin)
    figures["coin_latents"] = sum(s.test[n] for s in coin for n in s.sparse) / sum(
        len(s.sparse) for s in coin
    )
    for regime in ("scarcity", "imbalance", "noise", "shift"):
        own = [s for s in real if s.regime == regime]
        figures[f"gain_{regime}"] = gain(own).value
        figures[f"auc_{regime}"] = sum(s.test[s.pick(sparse=False)] for s in own) / len(own)
        figures[f"latents_{regime}"] = sum(max(s.test[n] for n in s.sparse) for s in own) / len(own)
        taken = sum(s.pick(sparse=True) in s.sparse for s in own)
        figures[f"taken_{regime}"] = taken / len(own)
    return figures


def _check(runs: Sequence[Figures]) -> Verdict:
    gains = [mean(runs, f"gain_{r}") for r in ("scarcity", "imbalance", "noise", "shift")]
    sees = mean(runs, "planted") > 0.02 and mean(runs, "leak") > 0.02 * (len(runs) > 1)
    fair = all(abs(mean(runs, name) - 0.5) <= 0.05 for name in ("coin", "coin_latents"))
    able = all(mean(runs, f"latents_{r}") > 0.55 for r in ("scarcity", "imbalance", "shift"))
    # Coins of one seed are too coarse to say more than that nothing leaks by much.
    if len(runs) == 1:
        fair = all(abs(mean(runs, name) - 0.5) <= 0.15 for name in ("coin", "coin_latents"))
    if not sees or not fair or not able:
        return Verdict.FAILS
    if all(abs(g) <= 0.01 for g in gains):
        return Verdict.HOLDS
    return Verdict.WEAKER if max(gains) <= 0.01 or len(runs) == 1 else Verdict.FAILS


_TEXT_OF = {
    "sentence": "Added to strong probes on plain activations, probes on a dictionary's latents "
    "bring no consistent gain: not with little data, rare classes, wrong labels or a shift.",
    "paper": "113 datasets, Gemma-2-9B: quivers with and without latents end up alike in all "
    "four regimes (abstract; sections 3-4)",
    "check": _check,
    "ours": "gain in test AUC: scarcity {gain_scarcity:+.4f}, imbalance {gain_imbalance:+.4f}, "
    "noise {gain_noise:+.4f}, shift {gain_shift:+.4f} (baselines {auc_scarcity:.3f}, "
    "{auc_imbalance:.3f}, {auc_noise:.3f}, {auc_shift:.3f}; latents picked {taken_scarcity:.0%}, "
    "{taken_imbalance:.0%}, {taken_noise:.0%}, {taken_shift:.0%}); where labels are atoms "
    "{planted:+.3f}; picking by test rows would claim {leak:+.3f}; labels all coins: AUC "
    "{coin:.2f}",
}
_HOLDS = (
    "holds when the mean gain is within 0.01 in all four regimes, while the same harness gains "
    "over 0.02 where labels are single atoms, picking by test rows would show over 0.02, and coin "
    "labels give an AUC within 0.05 of 0.5; weaker when latents lose more than 0.01 somewhere and "
    "gain it nowhere"
)

CLAIMS = (
    Claim(
        name="no consistent gain, in brief",
        **_TEXT_OF,
        experiment="4 yes-or-no questions about templated sentences (is the giver, the getter, the "
        "word of feeling, the letter in a random half), last token of block 1 of the packaged "
        "template model, 256 latents, k 8; logistic, PCA and neighbours against 16 latents; one "
        "amount a regime, 32 to 96 rows; " + _HOLDS,
        run=partial(_quivers, "smoke"),
    ),
    Claim(
        name="no consistent gain",
        **_TEXT_OF,
        experiment="the same questions and one about years, with all five baselines against 16 and "
        "128 latents under an L1 penalty; one or two amounts a regime, 16 to 128 rows; " + _HOLDS,
        run=partial(_quivers, "small"),
        tier="small",
    ),
)
