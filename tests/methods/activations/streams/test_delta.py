"""Delta layers: exact at threshold 0, honest residues above it, exact counts, undo."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F  # noqa: N812

from gossamer.core import GossamerError
from gossamer.methods.activations.delta_activation import DeltaActivation, play, quantise
from gossamer.methods.activations.streams.delta import DeltaLayer, delta_layers, multiply_adds
from gossamer.methods.activations.streams.play import deltas_of
from gossamer.methods.activations.streams.video import moving_shapes
from gossamer.models import Inputs
from tests.models.clips import shapes, stream_net


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def net() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return (
            nn.Sequential(
                nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2),
                nn.BatchNorm2d(4),
                nn.GELU(),
                nn.Flatten(),
                nn.Linear(4 * 9, 5),
                nn.Tanh(),
                nn.Linear(5, 3, bias=False),
            )
            .eval()
            .double()
        )


@given(st.sampled_from([0.0, 1 / 64, 1 / 8, 0.1]), st.integers(0, 20))
def test_streams_equal_the_dense_network_on_quantised_activations(quantum, seed):
    model, clips = net(), noise(2, 6, 2, 6, 6, seed=seed)
    hooks = [
        layer.register_forward_pre_hook(lambda m, args: quantise(args[0], quantum))
        for layer in delta_layers(model).values()
    ]
    wanted = play(model, clips)
    for hook in hooks:
        hook.remove()
    data = Inputs({"frames": clips})
    with DeltaActivation(quantum=quantum, steps=0).apply(model, data):
        assert torch.allclose(play(model, clips), wanted, atol=1e-9)
    assert not deltas_of(model)


@pytest.mark.parametrize("threshold", [0.0, 0.4])
def test_the_clip_at_once_equals_the_stream(threshold):
    model, clips = net(), noise(2, 5, 2, 6, 6)
    method = DeltaActivation(threshold=threshold, steps=0)
    with method.apply(model, Inputs({"frames": clips})) as work:
        streamed = play(model, clips)
        for delta in work.deltas.values():
            delta.length = 5
        with torch.no_grad():
            at_once = model(clips.flatten(0, 1)).unflatten(0, (2, 5))
    assert torch.allclose(at_once, streamed, atol=1e-9)


def test_unsent_residues_wait_and_do_not_add_up():
    """A ramp of steps below the threshold: the sum sent never lags by more than the threshold."""
    layer = nn.Linear(1, 1, bias=False).double()
    nn.init.ones_(layer.weight)
    delta = DeltaLayer(layer, quantum=0.0, threshold=0.5)
    for frame in range(40):
        x = torch.full((1, 1), 0.2 * frame, dtype=torch.float64)
        assert abs(float((delta(x) - x).detach())) < 0.5


def test_the_bias_is_added_once():
    layer = nn.Linear(3, 2).double()
    delta = DeltaLayer(layer, quantum=0.0)
    x = noise(4, 3)
    for _ in range(3):
        assert torch.allclose(delta(x), layer(x))


def test_still_clips_send_nothing_after_their_first_frame():
    model = stream_net()
    clips = shapes().values["frames"][:, :1].repeat(1, 4, 1, 1, 1)
    with DeltaActivation(steps=0).apply(model, shapes()) as work:
        work.measure(clips)
        assert all(delta.later_done == 0 for delta in work.deltas.values())
        assert all(delta.done > 0 for delta in work.deltas.values())


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, padding=1),
        nn.Conv2d(4, 6, 3, stride=2, groups=2),
        nn.Conv2d(4, 4, (1, 3), dilation=2, groups=4, padding=1),
        nn.Conv1d(4, 5, 3, padding=2),
    ],
)
def test_multiply_adds_of_convolutions_are_exact(layer):
    shape = (2, 4, 7, 7) if isinstance(layer, nn.Conv2d) else (2, 4, 7)
    active = noise(*shape) > 0.3
    # Counted one entry at a time: outputs it reaches with weights of one.
    wanted = 0
    for place in active.nonzero().tolist():
        one = torch.zeros(shape)
        one[tuple(place)] = 1.0
        convolve = F.conv2d if isinstance(layer, nn.Conv2d) else F.conv1d
        reach = convolve(
            one,
            torch.ones_like(layer.weight),
            None,
            layer.stride,
            layer.padding,
            layer.dilation,
            layer.groups,
        )
        wanted += int(reach.sum())
    assert multiply_adds(layer, active) == wanted


def test_multiply_adds_of_linear_layers():
    assert multiply_adds(nn.Linear(3, 5), torch.tensor([[True, False, True]])) == 10


def test_rounding_passes_gradients():
    x = torch.tensor([0.3, -0.7], requires_grad=True)
    out = quantise(x, 0.5)
    assert out.tolist() == pytest.approx([0.5, -0.5])
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1.0, 1.0]


def test_the_penalty_makes_changes_rarer_and_restore_undoes_training():
    found = {}
    for penalty in (0.0, 3.0):
        model = stream_net()
        before = {k: v.clone() for k, v in model.state_dict().items()}
        method = DeltaActivation(penalty=penalty, steps=60, lr=3e-3, batch_size=8)
        with method.apply(model, moving_shapes(16, frames=5, size=12, seed=1)) as work:
            found[penalty] = work.report().sparsity
            assert len(work.losses) == 60
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
        assert not any("forward" in vars(m) for m in model.modules())
    assert found[3.0] > found[0.0] + 0.02


def test_a_refresh_ends_drift():
    layer = nn.Linear(64, 8)
    delta = DeltaLayer(layer, quantum=0.0, refresh=3)
    drifting = DeltaLayer(layer, quantum=0.0)
    errors = torch.zeros(2)
    with torch.no_grad():
        for frame in range(301):
            x = 1e4 * torch.randn(1, 64, generator=torch.Generator().manual_seed(frame))
            exact = layer(x)
            errors = torch.stack([(d(x) - exact).abs().max() for d in (delta, drifting)])
    assert errors[0] < errors[1]


def test_a_frame_of_another_size_asks_for_a_reset():
    delta = DeltaLayer(nn.Linear(3, 2), quantum=0.0)
    delta(torch.zeros(4, 3))
    with pytest.raises(GossamerError, match=r"call reset\(\) before a new clip"):
        delta(torch.zeros(5, 3))
    delta.reset()
    assert delta(torch.zeros(5, 3)).shape == (5, 2)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Inputs({"x": torch.zeros(2)}), "needs Inputs with frames"),
        (Inputs({"frames": torch.zeros(2, 3)}), r"frames have shape \(2, 3\)"),
        ("video.mp4", "got str"),
    ],
)
def test_other_data_are_refused(data, message):
    with pytest.raises(GossamerError, match=message):
        DeltaActivation(steps=0).apply(stream_net(), data)


def test_layers_that_cannot_be_integrated_are_refused():
    with pytest.raises(GossamerError, match="0 pads with circular"):
        delta_layers(nn.Sequential(nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular")))
    with pytest.raises(GossamerError, match="no linear layer"):
        delta_layers(nn.ReLU())


def test_moving_shapes_move_and_are_labelled():
    clips = moving_shapes(30, frames=6, size=16, seed=4)
    frames, labels = clips.values["frames"], clips.values["labels"]
    assert frames.shape == (30, 6, 1, 16, 16)
    assert 0 <= float(frames.min()) <= float(frames.max()) <= 1
    assert set(labels.tolist()) == {0, 1, 2}
    changed = (frames[:, 1:] != frames[:, :-1]).flatten(1).any(1)
    assert bool(changed.all())
    assert torch.equal(frames, moving_shapes(30, frames=6, size=16, seed=4).values["frames"])
    # Most of a frame is background and stands still.
    assert float((frames[:, 1:] == frames[:, :-1]).float().mean()) > 0.6
