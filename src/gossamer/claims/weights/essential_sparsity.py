"""The smallest weights cost almost nothing up to a sharp bend; random ones cost from the start."""

from collections.abc import Sequence
from functools import cache

from gossamer.claims.base import Claim, Figures, Verdict, mean
from gossamer.claims.lm import heldout, nano
from gossamer.methods import make
from gossamer.methods.weights.essential_sparsity import EssentialSparsity

__all__ = ["CLAIMS"]


def _measure(base: str, pattern: str, sweep: str, windows: int, length: int) -> Figures:
    """Elbow, its interval, both slopes and the largest sparsity within 1 % of the dense loss."""
    method = make("essential_sparsity", base=base, pattern=pattern, sweep=sweep)
    assert isinstance(method, EssentialSparsity)
    curve = method.curve(nano().model, heldout(windows, length))
    elbow, essential = curve.elbow(), curve.essential(0.01)
    assert elbow is not None
    assert elbow.low is not None
    assert elbow.high is not None
    return {
        "elbow": elbow.sparsity,
        "low": elbow.low,
        "high": elbow.high,
        "before": elbow.before,
        "after": elbow.after,
        "essential": essential.sparsity,
        "dense": curve.dense,
    }


# Magnitude has no randomness: measured once for all seeds.
_once = cache(_measure)


def _named(name: str, figures: Figures) -> dict[str, float]:
    return {f"{name}_{key}": value for key, value in figures.items()}


def _run(seed: int) -> Figures:
    size = _once("magnitude", "model", "0.2:0.7:0.1", 8, 64)
    # Each layer loses the same share of a random mask whether layers compete or not.
    noise = _measure(f"random:seed={seed}", "layer", "0.05:0.2:0.05", 8, 64)
    return _named("magnitude", size) | _named("random", noise)


def _check(runs: Sequence[Figures]) -> Verdict:
    return _judge(runs, "magnitude", "random")


def _judge(runs: Sequence[Figures], ours: str, control: str) -> Verdict:
    """The card's thresholds: 0.2 between the elbows, five times the slope behind ours."""
    apart = mean(runs, f"{ours}_elbow") - mean(runs, f"{control}_elbow")
    steeper = min(f[f"{ours}_after"] / max(f[f"{ours}_before"], 1e-9) for f in runs)
    sure = all(f[f"{ours}_low"] > f[f"{control}_high"] for f in runs)
    if not sure or apart < 0.1 or steeper < 2:
        return Verdict.FAILS
    if apart >= 0.2 and steeper >= 5:
        return Verdict.HOLDS
    return Verdict.WEAKER


def _groups_run(seed: int) -> Figures:
    fine, scale = "0.05:0.9:0.05", (16, 128)
    forms = {
        "magnitude": ("magnitude", "model"),
        "groups": ("magnitude", "8:16"),
    }
    figures: dict[str, float] = {}
    for name, (base, pattern) in forms.items():
        figures |= _named(name, _once(base, pattern, fine, *scale))
    noise = _measure(f"random:seed={seed}", "layer", "0.03:0.24:0.03", *scale)
    return figures | _named("random", noise)


def _groups_check(runs: Sequence[Figures]) -> Verdict:
    verdicts = {_judge(runs, name, "random") for name in ("magnitude", "groups")}
    worst = (Verdict.FAILS, Verdict.WEAKER, Verdict.HOLDS)
    return next(verdict for verdict in worst if verdict in verdicts)


CLAIMS = (
    Claim(
        name="a sharp bend",
        sentence="One-shot magnitude pruning of a trained model costs little up to a sharp bend, "
        "far beyond that of random pruning.",
        paper="a sharp drop beyond the essential sparsity of BERT (no figure was checked)",
        experiment="packaged model, global magnitude swept from 20 to 70 %, 3 random masks from 5 "
        "to 20 %, loss on 8 windows of 64 tokens, two-segment fit, bootstrap over windows; at "
        "least 0.2 between the elbows, intervals apart, 5 times the slope behind the elbow",
        run=_run,
        check=_check,
        ours="elbow {magnitude_elbow:.2f} ({magnitude_low:.2f} to {magnitude_high:.2f}), slope "
        "{magnitude_before:.1f} then {magnitude_after:.1f} nats per unit; random "
        "{random_elbow:.2f} ({random_low:.2f} to {random_high:.2f}); largest sparsity within "
        "1 % of the dense loss {magnitude_essential:.2f}, random {random_essential:.2f}",
    ),
    Claim(
        name="a sharp bend in groups too",
        sentence="The bend also exists under N:M patterns.",
        paper="a sharp drop under N:M as well (no figure was checked)",
        experiment="packaged model, magnitude over the model swept to 90 % and N:16 from 15 to 1, "
        "against 3 random masks, loss on 16 windows of 128 tokens",
        run=_groups_run,
        check=_groups_check,
        ours="elbow over the model {magnitude_elbow:.2f} ({magnitude_low:.2f} to "
        "{magnitude_high:.2f}), slopes {magnitude_before:.1f}, {magnitude_after:.1f}; N:16 "
        "{groups_elbow:.2f} ({groups_low:.2f} to {groups_high:.2f}), slopes {groups_before:.1f}, "
        "{groups_after:.1f}; random {random_elbow:.2f}; within 1 % of the dense loss: model "
        "{magnitude_essential:.2f}, N:16 {groups_essential:.2f}, random {random_essential:.2f}",
        tier="small",
    ),
)
