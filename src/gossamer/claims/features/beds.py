"""What the claims of the features family share: dictionaries trained on toy beds, marked.

Every dictionary is trained once for a method, a bed and a length of training, however many
claims look at it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from itertools import islice

import torch
from torch import Tensor

from gossamer.claims.base import Figures, Tier
from gossamer.methods.features.autoencoder import Dictionary
from gossamer.methods.features.base import DictionaryMethod
from gossamer.methods.features.measure import antiparallel, matched_cosine, score_rows
from gossamer.methods.features.rules import Rule
from gossamer.methods.features.toy import Hierarchy, Superposition
from gossamer.methods.features.training import train

__all__ = [
    "BEDS",
    "figures_of",
    "fitted",
    "held_out",
    "on_bed",
    "one_thread",
    "random_figures",
    "trained",
]

BEDS: dict[Tier, Superposition] = {
    "smoke": Superposition(d_in=24, atoms=48, active=3.0),
    "small": Superposition(d_in=32, atoms=96, active=5.0),
}
_STEPS: dict[Tier, tuple[int, int]] = {"smoke": (300, 160), "small": (3500, 512)}
_RATES: dict[Tier, float] = {"smoke": 1e-2, "small": 2e-3}


@contextmanager
def one_thread() -> Iterator[None]:
    """Matrices this small run slower on two threads than on one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@cache
def fitted(bed: Superposition | Hierarchy, method: DictionaryMethod, tier: Tier) -> Dictionary:
    """A dictionary trained with a method's own rule and recipe on a bed, once.

    Parameters
    ----------
    method : with its width; a rate it leaves open is the tier's.
    """
    return trained(bed, method, tier)


def trained(
    bed: Superposition | Hierarchy,
    method: DictionaryMethod,
    tier: Tier,
    rule: Rule | None = None,
    *,
    tied: bool = True,
) -> Dictionary:
    """As :func:`fitted`, with another rule or an untied start, and anew at every call."""
    assert method.width is not None
    steps, batch = _STEPS[tier]
    full = replace(method, tokens=steps * batch, lr=method.lr or _RATES[tier])
    with one_thread():
        return train(
            bed.batches(batch, seed=method.seed),
            width=method.width,
            rule=full.rule() if rule is None else rule,
            recipe=replace(full.recipe(steps, batch), tied=tied),
        )


def held_out(bed: Superposition | Hierarchy, rows: int = 8192) -> list[Tensor]:
    """Rows of a bed that no dictionary was trained on, in four batches."""
    return list(islice(bed.batches(rows // 4, seed=500), 4))


def figures_of(name: str, bed: Superposition, made: Dictionary) -> Figures:
    """FVU, L0, dead and rare latents, shrinkage, atoms found and antiparallel, by name."""
    with one_thread():
        rows = held_out(bed)
        score = score_rows(made, rows)
        return {
            f"rare_{name}": _rare(made, rows),
            f"fvu_{name}": score.fvu,
            f"l0_{name}": score.l0,
            f"dead_{name}": score.dead,
            f"shrinkage_{name}": score.shrinkage,
            f"mcc_{name}": matched_cosine(made.W_dec, bed.true_atoms()),
            f"twins_{name}": antiparallel(made.W_dec),
        }


@torch.no_grad()
def _rare(made: Dictionary, rows: list[Tensor]) -> float:
    """Share of latents that fire less often than a tenth of the median."""
    fired = torch.cat([made.codes(part).fired() for part in rows])
    counts = torch.bincount(fired, minlength=made.d_sae).double()
    return float((counts < 0.1 * counts.median()).double().mean())


def on_bed(name: str, method: DictionaryMethod, tier: Tier, *, signed: bool = False) -> Figures:
    """Figures of a method on the tier's bed, with the method's seed.

    Parameters
    ----------
    method : without a width it takes twice as many latents as there are true atoms.
    """
    bed = replace(BEDS[tier], seed=method.seed, signed=signed)
    method = replace(method, width=method.width or 2 * bed.atoms)
    return figures_of(name, bed, fitted(bed, method, tier))


def random_figures(tier: Tier, method: DictionaryMethod, *, signed: bool = False) -> Figures:
    """Figures of a dictionary of random atoms with the method's rule."""
    bed = replace(BEDS[tier], seed=method.seed, signed=signed)
    width = method.width or 2 * bed.atoms
    rule = replace(method, width=width, tokens=1).rule().eval()
    return figures_of("random", bed, Dictionary.random(bed.d_in, width, rule, seed=method.seed + 1))
