"""Adapters: a frame that only frames, vectors before a text, a head on features."""

import pytest
import torch
from torch.nn.functional import interpolate

from gossamer.core import GossamerError
from gossamer.methods.training.reprogrammed.adapters import (
    ImagePrompt,
    LinearProbe,
    SoftPrompt,
    resized,
)


def frame(canvas=6, width=1, low=(0.0, -1.0), high=(1.0, 3.0)):
    return ImagePrompt(3, canvas, width, torch.tensor(low), torch.tensor(high))


def test_the_image_is_in_the_centre_and_the_frame_around_it():
    prompt = frame()
    image = torch.randn(2, 2, 4, 4)
    found = prompt.enter("x", image)
    assert found.shape == (2, 2, 6, 6)
    assert torch.equal(found[:, :, 1:5, 1:5], image)
    # sigmoid(0) is the middle of every channel's range.
    assert torch.equal(found[:, 0, 0], torch.full((2, 6), 0.5))
    assert torch.equal(found[:, 1, :, 5], torch.full((2, 6), 1.0))
    assert int(prompt.inside.sum()) == 16


def test_the_frame_stays_within_the_range_and_learns_only_around_the_image():
    prompt = frame()
    prompt.enter("x", torch.rand(1, 2, 9, 9)).sum().backward()
    assert not prompt.frame.grad[:, prompt.inside].any()
    assert bool((prompt.frame.grad[:, ~prompt.inside] > 0).all())
    with torch.no_grad():
        prompt.frame.fill_(100.0)
    found = prompt.enter("x", torch.zeros(1, 2, 4, 4))
    assert found[0, 0, 0, 0] == 1.0
    assert found[0, 1, 0, 0] == 3.0


def test_images_are_resized_to_what_the_frame_leaves():
    image = torch.rand(1, 2, 8, 8)
    inner = frame().enter("x", image).detach()[:, :, 1:5, 1:5]
    assert torch.allclose(inner, interpolate(image, (4, 4), mode="bilinear", antialias=True))
    # Shrunk by half: every pixel counts, the mean stays.
    assert inner.mean().item() == pytest.approx(image.mean().item(), abs=0.05)
    assert resized(image, 8) is image
    with pytest.raises(GossamerError, match="samples, channels, height, width"):
        resized(torch.rand(3, 8), 4)


def test_a_frame_needs_room():
    with pytest.raises(GossamerError, match="give a width of at most 2"):
        frame(canvas=6, width=3)
    assert int(frame(canvas=6, width=2).inside.sum()) == 4


def test_logits_of_the_task_are_those_of_the_mapped_classes():
    prompt = frame()
    prompt.labels.copy_(torch.tensor([4, 0, 2]))
    logits = torch.arange(10.0).view(2, 5)
    assert prompt.leave(torch.zeros(2, 7), logits).tolist() == [[4, 0, 2], [9, 5, 7]]


def test_vectors_come_before_a_text():
    start = torch.randn(3, 4)
    prompt = SoftPrompt(2, start)
    text = torch.randn(2, 5, 4)
    found = prompt.enter("inputs_embeds", text)
    assert torch.equal(found[:, 3:], text)
    assert torch.equal(found[0, :3], start)
    assert torch.equal(found[1, :3], start)
    half = prompt.enter("inputs_embeds", text.bfloat16())
    assert half.dtype == torch.bfloat16


def test_a_probe_reads_features_and_no_logits():
    probe = LinearProbe(4, 3, canvas=5)
    features = torch.randn(2, 4)
    want = features @ probe.linear.weight.T + probe.linear.bias
    assert torch.allclose(probe.leave(features, torch.full((2, 9), torch.nan)), want)
    assert probe.enter("x", torch.rand(1, 1, 8, 8)).shape == (1, 1, 5, 5)
    again = LinearProbe(**probe.options())
    again.load_state_dict(probe.state_dict())
    assert torch.equal(again.leave(features, features), probe.leave(features, features))
