"""FlexPrefill: heads and prompts get what they need, and about gamma of the mass is kept."""

from collections.abc import Sequence

from gossamer.claims.attention.planted import Plant, Planted, planted
from gossamer.claims.attention.prefill import (
    controls,
    fixed,
    measured,
    on_planted,
    window_of,
)
from gossamer.claims.base import Claim, Figures, Verdict
from gossamer.methods.attention.flexprefill import FlexPrefill, FlexSelector
from gossamer.methods.attention.layout import Layout
from gossamer.methods.attention.streaming_llm import StreamingLLM

__all__ = ["CLAIMS"]

LENGTH, BLOCK = 512, 16
GAMMAS = (0.8, 0.9, 0.95, 0.99)
SLACK = 0.05
HEADS: tuple[Plant, ...] = ("sink+band", "columns+diagonals", "blocks", "needle", "noise")
EASY: tuple[Plant, ...] = ("band", "sink+band", "band", "sink+band")
HARD: tuple[Plant, ...] = ("needle", "columns+diagonals", "blocks", "columns+diagonals")


def flex(gamma: float = 0.9) -> FlexPrefill:
    """The method at the size of these prompts."""
    return FlexPrefill(gamma=gamma, block_size=BLOCK, budget_tokens=2 * BLOCK)


def same_for_all(plant: Planted, density: float) -> FlexSelector:
    """As many columns as diagonals, the same for every head, that reach a mean density."""
    layout = Layout(1, LENGTH, LENGTH)
    for blocks in range(1, LENGTH // BLOCK):
        selector = FlexSelector(1e-9, 0.0, BLOCK, blocks * BLOCK)
        kept, total = selector.select(plant.call, layout, 0).pairs()
        if kept >= density * total:
            break
    return selector


def run_adaptive(seed: int) -> Figures:
    """Sweep gamma; compare prompts; compare with a budget that is the same for all heads."""
    plant = planted(HEADS, LENGTH, repeat=2, seed=seed)
    figures: dict[str, float] = {}
    for gamma in GAMMAS:
        found = fixed(plant, flex(gamma))
        figures[f"mass_{100 * gamma:.0f}"] = float(found.mass.mean())
        figures[f"least_{100 * gamma:.0f}"] = float(found.mass.min())
    found = fixed(plant, flex())
    figures["density"] = float(found.density.mean())
    figures["mass"] = float(found.mass.mean())
    figures["heads"] = float(found.density.max() / found.density.min())
    prompts = [planted(heads, LENGTH, repeat=2, seed=seed) for heads in (EASY, HARD)]
    easy, hard = (float(fixed(p, flex()).density.mean()) for p in prompts)
    figures["prompts"] = hard / easy
    same = on_planted(same_for_all(plant, figures["density"]), plant)
    figures["same"], figures["same_density"] = float(same.mass.mean()), float(same.density.mean())
    window = fixed(plant, StreamingLLM(sparsity=1.0 - figures["density"], length=LENGTH))
    figures["window"] = float(window.mass.mean())
    return figures


def check_adaptive(figures: Sequence[Figures]) -> Verdict:
    """The card's assertions: monotone, within the slack, adaptive, above a fixed budget."""
    for f in figures:
        masses = [f[f"mass_{100 * gamma:.0f}"] for gamma in GAMMAS]
        if sorted(masses) != masses or f["mass"] <= f["window"]:
            return Verdict.FAILS
    good = all(
        f["heads"] >= 2.0
        and f["prompts"] >= 1.3
        and f["mass"] >= f["same"]
        and all(f[f"mass_{100 * gamma:.0f}"] >= gamma - SLACK for gamma in GAMMAS)
        for f in figures
    )
    return Verdict.HOLDS if good else Verdict.WEAKER


def run_model(seed: int) -> Figures:
    """Sweep gamma on a model's own attention."""
    tokens = window_of(seed)
    figures: dict[str, float] = {}
    for gamma in GAMMAS:
        rows = measured(flex(gamma), tokens)
        figures[f"mass_{100 * gamma:.0f}"] = sum(r.mass for r in rows) / len(rows)
        figures[f"density_{100 * gamma:.0f}"] = sum(r.density for r in rows) / len(rows)
    figures |= controls(figures["density_90"], tokens, seed)
    return figures


def check_model(figures: Sequence[Figures]) -> Verdict:
    """Monotone and above chance; ``weaker`` below gamma - 0.05 or below the window."""
    for f in figures:
        masses = [f[f"mass_{100 * gamma:.0f}"] for gamma in GAMMAS]
        if sorted(masses) != masses or f["mass_90"] <= f["random"]:
            return Verdict.FAILS
    good = all(f[f"mass_{100 * gamma:.0f}"] >= gamma - SLACK for f in figures for gamma in GAMMAS)
    good = good and all(f["mass_90"] > f["window"] for f in figures)
    return Verdict.HOLDS if good else Verdict.WEAKER


CLAIMS = (
    Claim(
        name="budgets adapt",
        sentence="Heads and prompts get different budgets, and about gamma of the attention mass "
        "is kept whatever the head's pattern; one budget for all heads keeps less.",
        paper="gains in speed and accuracy over MInference on RULER and InfiniteBench; the "
        "abstract gives no number",
        experiment=f"planted heads of five patterns, {LENGTH} tokens, blocks of {BLOCK}, gamma "
        f"{GAMMAS}; the same number of columns and diagonals for every head and a window with "
        "sinks at the same mean density; a prompt of bands against one of needles, columns and "
        "blocks",
        run=run_adaptive,
        check=check_adaptive,
        ours="mass {mass_80:.3f}, {mass_90:.3f}, {mass_95:.3f}, {mass_99:.3f} along gamma "
        "(worst head {least_80:.3f} to {least_99:.3f}); at 0.9 density {density:.3f}, one "
        "budget for all {same:.3f} at {same_density:.3f}, window {window:.3f}; densest head "
        "{heads:.1f}x the sparsest, hard prompt {prompts:.1f}x the easy one",
    ),
    Claim(
        name="keeps gamma on a model",
        sentence="The kept attention mass rises with gamma and stays within 0.05 of it, above a "
        "window with sinks and random keys at the same density.",
        paper="gamma is the share of attention the method aims to keep (Section 3, quoted from "
        "memory)",
        experiment=f"held-out text on the {{model}}, blocks of {BLOCK}, gamma {GAMMAS}; window and "
        "random keys at the density of gamma 0.9",
        run=run_model,
        check=check_model,
        ours="mass {mass_80:.3f}, {mass_90:.3f}, {mass_95:.3f}, {mass_99:.3f} at density "
        "{density_80:.3f}, {density_90:.3f}, {density_95:.3f}, {density_99:.3f}; window "
        "{window:.3f}, random {random:.3f}",
        tier="small",
        portable=True,
    ),
)
