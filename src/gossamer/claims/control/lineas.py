"""LinEAS: what the paper says, on texts of two topics and a small model that knows them."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import torch

from gossamer.claims.base import Claim, Figures, Tier, Verdict, mean
from gossamer.claims.control.beds import Continued, net, topics
from gossamer.claims.features.beds import one_thread
from gossamer.methods.control.base import Affine, Edit, Intervention
from gossamer.methods.control.lineas import LinEAS, transport
from gossamer.methods.features.editing import gathered

__all__ = ["CLAIMS"]

_NORMS, _STREAM = "model.layers.*layernorm", "model.layers.?"
_PAIRS = ((0, 3), (1, 2), (2, 0))
_SIZE: dict[Tier, tuple[int, int]] = {"smoke": (12, 40), "small": (32, 200)}
_LASSO = 2.0


def _method(tier: Tier, hooks: str, lasso: float = 0.0) -> LinEAS:
    # Maps behind blocks feed one another, so that the same step is larger there.
    lr = 0.02 if hooks == _STREAM else 0.1
    steps = _SIZE[tier][1]
    return LinEAS(source="source", target="target", hooks=hooks, steps=steps, lr=lr, lasso=lasso)


@cache
def _bed(seed: int) -> Continued:
    return Continued(*_PAIRS[seed], seed, count=32)


def _moved(its: Intervention, seed: int) -> Intervention:
    """The same maps on coordinates drawn at random: the baseline."""
    generator = torch.Generator().manual_seed(seed)
    edits: list[Edit] = []
    for edit in its.edits:
        law = edit.law
        assert isinstance(law, Affine)
        to = torch.randperm(law.units, generator=generator)
        edits.append(replace(edit, law=Affine(law.scale[to], law.shift[to])))
    return replace(its, edits=tuple(edits))


@one_thread()
def _steered(tier: Tier, lasso: float, seed: int) -> Figures:
    source, target = _PAIRS[seed]
    data, bed = topics(source, target, _SIZE[tier][0], seed), _bed(seed)
    with _method(tier, _NORMS, lasso).apply(net(), data) as work:
        its, left = work.intervention, work.report().sparsity
    share, perplexity = bed.mark(its)
    return {
        "before": bed.before,
        "share": share,
        "perplexity": perplexity,
        "left": left,
        "random": bed.mark(_moved(its, seed))[0],
    }


@one_thread()
def _local(seed: int) -> Figures:
    source, target = _PAIRS[seed]
    data, bed = topics(source, target, _SIZE["small"][0], seed), _bed(seed)
    found: dict[str, float] = {}
    for name, hooks in (("stream", _STREAM), ("norms", _NORMS)):
        method = _method("small", hooks)
        with method.apply(net(), data) as work:
            share, perplexity = bed.mark(work.intervention)
        paths = method.paths(net())
        start = gathered(net(), data.where("label", "source"), paths, "mean")
        end = gathered(net(), data.where("label", "target"), paths, "mean")
        alone = Intervention(tuple(Edit(p, transport(start[p], end[p])) for p in paths))
        other, harder = bed.mark(alone)
        found |= {f"joint_{name}": share, f"joint_perplexity_{name}": perplexity}
        found |= {f"local_{name}": other, f"local_perplexity_{name}": harder}
    return found


def _check_steers(runs: Sequence[Figures]) -> Verdict:
    if mean(runs, "share") <= mean(runs, "random") + 0.2 or mean(runs, "share") < 0.5:
        return Verdict.FAILS
    good = all(f["before"] <= 0.2 and f["share"] >= 0.8 and f["perplexity"] <= 1.3 for f in runs)
    return Verdict.HOLDS if good else Verdict.WEAKER


def _check_sparse(runs: Sequence[Figures]) -> Verdict:
    if mean(runs, "share") <= mean(runs, "random") + 0.2 or mean(runs, "left") < 0.5:
        return Verdict.FAILS
    good = all(
        f["before"] <= 0.2 and f["share"] >= 0.7 and f["left"] >= 0.9 and f["perplexity"] <= 1.3
        for f in runs
    )
    return Verdict.HOLDS if good else Verdict.WEAKER


def _check_local(runs: Sequence[Figures]) -> Verdict:
    worse = [
        mean(runs, f"joint_{name}") - mean(runs, f"local_{name}") >= 0.1
        or mean(runs, f"local_perplexity_{name}") >= 1.2 * mean(runs, f"joint_perplexity_{name}")
        for name in ("stream", "norms")
    ]
    return Verdict.HOLDS if all(worse) else Verdict.WEAKER if any(worse) else Verdict.FAILS


_OURS = (
    "target's words {share:.2f} of their own rate, {before:.2f} unsteered, {random:.2f} with the "
    "maps on other coordinates; perplexity x{perplexity:.2f}; {left:.1%} of coordinates left alone"
)
_BED = (
    "packaged model of templated tasks; prompts of one topic are continued by 8 sampled words, "
    "maps behind the norms of all blocks, "
)

CLAIMS = (
    Claim(
        name="few coordinates suffice",
        sentence="A sparse group lasso leaves most coordinates untouched, and the text still "
        "becomes the target's, as fluent as before.",
        paper="support cut to about 1 % of coordinates with unchanged toxicity (quoted from "
        "memory)",
        experiment=_BED + "40 steps on 12 + 12 texts with a lasso of 2; share of the target's "
        "words at least 0.7 of its own rate with 90 % of coordinates the identity",
        run=lambda seed: _steered("smoke", _LASSO, seed),
        check=_check_sparse,
        ours=_OURS,
    ),
    Claim(
        name="steers with 32 texts",
        sentence="32 unpaired texts of each side suffice to steer what a model writes.",
        paper="toxicity of Gemma2-2B 4.00 % to 0.73 % with 32 + 32 texts (quoted from memory)",
        experiment=_BED + "200 steps on 32 + 32 texts, no penalty; share of the target's words "
        "at least 0.8 of its own rate, from at most 0.2, perplexity at most 1.3 times",
        run=lambda seed: _steered("small", 0.0, seed),
        check=_check_steers,
        ours=_OURS,
        tier="small",
    ),
    Claim(
        name="together beats one by one",
        sentence="Maps learned together steer better than maps fitted to each layer by itself.",
        paper="Lin-AcT leaves toxicity at 1.60 %, LinEAS at 0.73 % (quoted from memory)",
        experiment="as above, maps behind blocks and, apart, behind norms, against closed-form "
        "maps of each layer; local is worse by 10 points or 1.2 times the perplexity at both",
        run=_local,
        check=_check_local,
        ours="behind blocks {joint_stream:.2f} at x{joint_perplexity_stream:.2f} perplexity, "
        "local {local_stream:.2f} at x{local_perplexity_stream:.2f}; behind norms "
        "{joint_norms:.2f} at x{joint_perplexity_norms:.2f}, local {local_norms:.2f} at "
        "x{local_perplexity_norms:.2f}",
        tier="small",
    ),
)
