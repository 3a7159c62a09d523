"""Transcoders: sparse latents in place of an MLP."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from gossamer.claims.base import Claim, Figures, Verdict, mean
from gossamer.claims.features.beds import BEDS, one_thread
from gossamer.claims.features.stream_bed import batches, middle
from gossamer.claims.lm import calibration, heldout, nano
from gossamer.methods.features.autoencoder import Dictionary
from gossamer.methods.features.measure import matched_cosine, score_rows
from gossamer.methods.features.objective import Layout
from gossamer.methods.features.source import ActivationSource
from gossamer.methods.features.splicing import loss_recovered
from gossamer.methods.features.toy import Shared
from gossamer.methods.features.training import train
from gossamer.methods.features.transcoder import Transcoder

__all__ = ["CLAIMS"]


@cache
def _rows(seed: int) -> Tensor:
    hook = f"{middle()}.mlp"
    data = calibration(seed, 64)
    source = ActivationSource(nano().model, (f"{hook}:in", hook), data, sink_multiple=None)
    return torch.cat(list(source.one_pass()))


def _fit(rows: Iterator[Tensor], method: Transcoder, half: int, steps: int) -> Dictionary:
    assert method.width is not None
    with one_thread():
        return train(
            rows,
            width=method.width,
            rule=method.rule(),
            recipe=method.recipe(steps, 256),
            layout=Layout(half, half),
            skip=method.skip,
        )


def _known(seed: int) -> Figures:
    """Rows of known atoms, and what a module makes of them: other atoms, and a linear map."""
    bed = Shared(replace(BEDS["smoke"], seed=seed), private=0.1)
    half, atoms = bed.bed.d_in, bed.true_atoms()[:, bed.bed.d_in :]
    generator = torch.Generator().manual_seed(0x11AB + seed)
    linear = torch.randn(half, half, generator=generator) / half**0.5

    def pairs(size: int, seed: int) -> Iterator[Tensor]:
        for rows in bed.batches(size, seed):
            yield torch.cat([rows[:, :half], rows[:, half:] + rows[:, :half] @ linear], 1)

    found: dict[str, float] = {}
    test = next(pairs(8192, 500))
    for name, skip in (("skip", True), ("plain", False)):
        method = Transcoder(k=3, width=2 * bed.bed.atoms, seed=seed, lr=5e-3, skip=skip)
        made = _fit(pairs(256, seed), method, half, 300)
        score = score_rows(made, [test], Layout(half, half))
        shown = bed.owners() == 0
        cosine = matched_cosine(made.W_dec, atoms[shown])
        found |= {f"fvu_{name}": score.fvu, f"l0_{name}": score.l0, f"mcc_{name}": cosine}
    return found


def _check_known(runs: Sequence[Figures]) -> Verdict:
    share = mean(runs, "fvu_skip") / mean(runs, "fvu_plain")
    if share >= 1 or mean(runs, "fvu_skip") > 0.5 or mean(runs, "l0_skip") > 3:
        return Verdict.FAILS
    better = mean(runs, "mcc_skip") > mean(runs, "mcc_plain")
    return Verdict.HOLDS if share <= 0.9 and better else Verdict.WEAKER


@cache
def _held() -> Tensor:
    hook = f"{middle()}.mlp"
    source = ActivationSource(nano().model, (f"{hook}:in", hook), heldout(), sink_multiple=None)
    return torch.cat(list(source.one_pass()))


def _measured(name: str, made: Dictionary) -> Figures:
    half = made.d_in
    with one_thread():
        score = score_rows(made, _held().split(4096), Layout(half, half))
        loss = loss_recovered(nano().model, heldout(), made, f"{middle()}.mlp")
    return {f"fvu_{name}": score.fvu, f"recovered_{name}": loss.recovered, f"l0_{name}": score.l0}


def _stands_in(seed: int) -> Figures:
    rows, found = _rows(seed), dict[str, float]()
    for name, skip in (("skip", True), ("plain", False)):
        method = Transcoder(k=32, width=1024, seed=seed, lr=2e-3, skip=skip)
        made = _fit(batches(rows, 256, seed), method, rows.shape[1] // 2, 1500)
        made.metadata["reads"] = [f"{middle()}.mlp:in"]
        found |= _measured(name, made)
    return found


def _check(runs: Sequence[Figures]) -> Verdict:
    skip, plain = mean(runs, "recovered_skip"), mean(runs, "recovered_plain")
    if skip <= plain or skip <= 0 or mean(runs, "l0_skip") > 32:
        return Verdict.FAILS
    return Verdict.HOLDS if skip >= 0.9 else Verdict.WEAKER


CLAIMS = (
    Claim(
        name="a skip leaves the sparse part to the latents",
        sentence="With a linear skip beside them, latents need not spend themselves on what is "
        "linear.",
        paper="Pythia: a skip lowers the error at no cost in interpretability (arXiv 2501.18823)",
        experiment="rows made of 3 of 48 known atoms in 24 dimensions, answered by other atoms of "
        "the same code plus a dense linear map; 96 latents, k = 3, 300 steps; holds when FVU with "
        "the skip is at most 0.9 of that without, and more of the answering atoms are found",
        run=_known,
        check=_check_known,
        ours="FVU {fvu_skip:.3f} with the skip, {fvu_plain:.3f} without; answering atoms found "
        "(MCC) {mcc_skip:.2f} and {mcc_plain:.2f}, at L0 {l0_skip:.1f}",
    ),
    Claim(
        name="stands in for an MLP",
        sentence="A skip transcoder stands in for an MLP at little cost, better than one without "
        "the skip.",
        paper="GPT-2 small and Pythia: transcoders match autoencoders in fidelity; skips lower the "
        "error (arXiv 2501.18823)",
        experiment="MLP of the packaged model's middle block, 16 thousand tokens, 1024 latents, "
        "k = 32, 1500 steps; holds when 0.9 of the loss is recovered with the skip, and more than "
        "without",
        run=_stands_in,
        check=_check,
        ours="loss recovered (zero ablation) {recovered_skip:.3f} with the skip, "
        "{recovered_plain:.3f} without; FVU {fvu_skip:.3f} and {fvu_plain:.3f} at L0 {l0_skip:.0f}",
        tier="small",
    ),
)
