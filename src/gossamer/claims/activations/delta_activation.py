"""Delta activation: the same outputs from what changed, and training that makes changes rare."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.claims.activations.digits import digits, one_thread
from gossamer.claims.base import Claim, Figures, Verdict, mean
from gossamer.methods.activations.delta_activation import DeltaActivation, play, quantise
from gossamer.methods.activations.streams.delta import delta_layers
from gossamer.methods.activations.streams.video import moving
from gossamer.models import Inputs

__all__ = ["CLAIMS"]

FRAMES, SIZE = 8, 16
PENALTY = 7.0


def _clips(seed: int, train: int, test: int) -> tuple[Inputs, Inputs]:
    """Digits that move over a still texture, (N, 8, 1, 16, 16), and which digit it is."""
    split, generator = digits(seed), torch.Generator().manual_seed(seed)

    def make(images: Tensor, labels: Tensor) -> Inputs:
        frames = moving(images / 16, FRAMES, SIZE, generator)
        return Inputs({"frames": frames, "labels": labels})

    return make(split.x[:train], split.y[:train]), make(split.x_test[:test], split.y_test[:test])


def _net(seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 12, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(12, 24, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(24 * 16, 10),
        ).eval()


def _dense_quantised(net: nn.Module, clips: Tensor, quantum: float) -> Tensor:
    """The definition: every frame by itself, inputs of linear layers rounded."""
    with ExitStack() as stack:
        for layer in delta_layers(net).values():
            hook = layer.register_forward_pre_hook(lambda m, args: quantise(args[0], quantum))
            stack.callback(hook.remove)
        return play(net, clips)


def _exact(seed: int) -> Figures:
    with one_thread():
        data, _ = _clips(seed, 24, 24)
        clips, net = data.values["frames"], _net(seed)
        # The first frame again and again: nothing changes, so nothing may be sent.
        still = clips[:, :1].repeat(1, FRAMES, 1, 1, 1)
        wanted, rough = _dense_quantised(net, clips, 1 / 16), play(net, clips)
        with DeltaActivation(steps=0).apply(net, data) as work:
            found = play(net, clips)
            skipped = work.report().sparsity
            work.measure(still)
            later = sum(delta.later_done for delta in work.deltas.values())
            frames = sum(delta.later_dense for delta in work.deltas.values())
        return {
            "error": float((found - wanted).abs().max()),
            "rounding": float((found - rough).abs().max()),
            "still": later / frames,
            "skipped": skipped,
        }


def _check_exact(runs: Sequence[Figures]) -> Verdict:
    exact = all(f["error"] <= 1e-5 and f["still"] == 0 for f in runs)
    # A stub that runs densely would agree with the unrounded network and skip nothing.
    at_work = all(f["rounding"] > 1e-4 and f["skipped"] > 0 for f in runs)
    return Verdict.HOLDS if exact and at_work else Verdict.FAILS


def _method(seed: int, **values: Any) -> Any:
    return DeltaActivation(batch_size=16, seed=seed, **values)


def _refined(
    seed: int, penalty: float, start: dict[str, Tensor], train: Inputs, test: Inputs
) -> tuple[float, float, float]:
    """Accuracy (scores summed over frames), share of changes sent, skipped products."""
    net = _net(seed)
    net.load_state_dict(start)
    method = _method(seed + 1, penalty=penalty, steps=2000, lr=2e-3)
    with method.apply(net, train) as work:
        with work.measuring():
            scores = play(net, test.values["frames"]).sum(1)
        # Changes of the frames themselves are given; of activations they are learned.
        learned = list(work.deltas.values())[1:]
        sent = sum(d.sent for d in learned) / sum(d.entries for d in learned)
        right = (scores.argmax(1) == test.values["labels"]).float().mean()
        return float(right), sent, work.report().sparsity


def _sparser(seed: int) -> Figures:
    with one_thread():
        train, test = _clips(seed, 1000, 300)
        net = _net(seed)
        with _method(seed, penalty=0.0, steps=1200, lr=5e-3).apply(net, train):
            start = {name: value.clone() for name, value in net.state_dict().items()}
        figures: dict[str, float] = {}
        for name, penalty in (("plain", 0.0), ("delta", PENALTY)):
            values = _refined(seed, penalty, start, train, test)
            figures |= dict(zip((name, f"{name}_sent", f"{name}_skipped"), values, strict=True))
        return figures


def _check_sparser(runs: Sequence[Figures]) -> Verdict:
    fewer = mean(runs, "plain_sent") / mean(runs, "delta_sent")
    loss = mean(runs, "plain") - mean(runs, "delta")
    if fewer <= 1 or mean(runs, "plain") < 0.5:
        return Verdict.FAILS
    return Verdict.HOLDS if fewer >= 2 and loss <= 0.02 else Verdict.WEAKER


CLAIMS = (
    Claim(
        name="exact at threshold 0",
        sentence="Layers that integrate changes give the outputs of the network on quantised "
        "activations, and a still picture costs nothing after its first frame.",
        paper="by construction of the layer",
        experiment="digits moving over 8 frames of 16 x 16, an untrained network of two "
        "convolutions and a linear layer: every frame within 1e-5 of the dense network on "
        "quantised activations; no change sent from the second frame of still clips on",
        run=_exact,
        check=_check_exact,
        ours="largest difference {error:.1e} (to the network without rounding {rounding:.1e}); "
        "still clips send {still:.1f} of the changes; {skipped:.1%} of the multiply-adds skipped",
    ),
    Claim(
        name="training makes changes rare",
        sentence="Training with a penalty on the changes makes temporal sparsity several times "
        "larger at about the accuracy.",
        paper="almost 3 times more activation sparsity on UCF101, accuracy recoverable by longer "
        "training",
        experiment="1000 clips of moving digits, 1200 steps without penalty, then 2000 steps of "
        "refinement with and without: at least 2 times fewer non-zero changes of activations on "
        "300 test clips (those of the frames are given) at no more than 2 points of accuracy",
        run=_sparser,
        check=_check_sparser,
        ours="changes sent {delta_sent:.3f} against {plain_sent:.3f}; accuracy {delta:.3f} against "
        "{plain:.3f}; multiply-adds skipped {delta_skipped:.1%} against {plain_skipped:.1%}",
        tier="small",
    ),
)
