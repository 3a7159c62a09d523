"""Emotion circuits: what the paper says, on sentences whose feeling is known."""

from collections.abc import Sequence

from gossamer.claims.base import Claim, Figures, Verdict, mean
from gossamer.claims.control.beds import FEELING_NAMES, feelings, moods, net
from gossamer.claims.features.beds import one_thread
from gossamer.methods.control.base import Intervention
from gossamer.methods.control.emotion_circuits import Circuit, EmotionCircuits, find_circuit
from gossamer.models import templates

__all__ = ["CLAIMS"]

_SCALE = EmotionCircuits().strength
_GROUPS, _TESTS = 6, 64


def _shown(circuit: Circuit, feeling: int, seed: int) -> float:
    """Share of neutral sentences that go on with a deed of the feeling."""
    neutral = templates.batch("feelings", _TESTS, 700 + seed).corrupted
    with Intervention(circuit.edits(), _SCALE, "last").on(net()):
        return float(moods(neutral)[1][:, feeling].float().mean())


def _elicited(circuit: Circuit, feeling: int, seed: int) -> float:
    """How much less of the feeling a sentence that calls for it shows without the circuit."""
    made = templates.batch("feelings", 4 * _TESTS, 800 + seed)
    ids = made.ids[made.attributes["feeling"] == feeling]
    before = float(moods(ids)[0][:, feeling].mean())
    with circuit.ablation().on(net()):
        return before - float(moods(ids)[0][:, feeling].mean())


@one_thread()
def _run(seed: int) -> Figures:
    data = feelings(_GROUPS, seed)
    sums: dict[str, float] = {}
    # Two of the four for each seed, to be done in seconds; three seeds show them all.
    for feeling in (seed % len(FEELING_NAMES), (seed + 1) % len(FEELING_NAMES)):
        found = find_circuit(net(), data, "label", FEELING_NAMES[feeling])
        chance = found.random(10 * seed + feeling)
        figures = {
            "shown": _shown(found, feeling, seed),
            "random": _shown(chance, feeling, seed),
            "drop": _elicited(found, feeling, seed),
            "random_drop": _elicited(chance, feeling, seed),
            "neurons": found.neurons[0] / found.neurons[1],
            "heads": found.heads[0] / found.heads[1],
        }
        for key, value in figures.items():
            sums[key] = sums.get(key, 0.0) + value / 2
    return sums


def _check(runs: Sequence[Figures]) -> Verdict:
    if any(f["neurons"] > 0.02 or f["heads"] > 0.1 for f in runs):
        return Verdict.FAILS
    if mean(runs, "shown") <= mean(runs, "random") or mean(runs, "drop") <= 0:
        return Verdict.FAILS
    good = mean(runs, "shown") >= 0.9 and mean(runs, "random") <= 0.5 and mean(runs, "drop") >= 0.3
    return Verdict.HOLDS if good else Verdict.WEAKER


CLAIMS = (
    Claim(
        name="few units carry a feeling",
        sentence="Editing few neurons and heads makes a model show a feeling; without them it "
        "shows it less where it is called for.",
        paper="99.65 % of texts show the emotion (Llama-3.2-3B, 392 neurons and 168 heads; "
        "quoted from memory)",
        experiment="packaged model of templated tasks, feelings by twos, 2 % of neurons and 10 % "
        "of heads (one of 16), scale 0.8 on sentences without a feeling; as many random units; "
        "zeroing the circuit where a feeling is called for",
        run=_run,
        check=_check,
        ours="{shown:.1%} show it, {random:.1%} with random units; zeroing lowers it by "
        "{drop:.2f}, random units by {random_drop:.2f}",
    ),
)
