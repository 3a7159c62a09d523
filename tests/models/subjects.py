"""The kinds of model that methods apply to, tiny and seeded, for the generated conformance.

A method names its kind in ``subject``; most take a language model. An entry gives a model (the
same weights at every call), data its ``apply`` accepts, and how to run it once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.models import Inputs, Tokens
from gossamer.models.labelled import Labelled
from tests.models.classes import broken_labels, class_scores, classifier, labelled
from tests.models.clips import (
    labelled_images,
    pixels,
    shapes,
    stream_net,
    streamed,
    wrong_labels,
)
from tests.models.diffusion import denoised, diffusion_lm
from tests.models.dynamics import broken, perceptron, predictions, pushes
from tests.models.patches import broken_patches, coder, patches, recoded
from tests.models.spaces import broken_digits, decisions, images_to_search, space
from tests.models.tables import autoencoder, broken_table, reconstruction, table
from tests.models.tiny import tiny_model
from tests.models.vision import images, logits, mobilenet
from tests.models.vlm import image_prompt, tiny_vlm

__all__ = ["SUBJECTS", "Subject", "random_tokens"]


@dataclass(frozen=True)
class Subject:
    """One kind of model.

    Parameters
    ----------
    build : a new model, always with the same weights, in eval mode.
    data : what ``apply`` reads.
    outputs : a deterministic result of the model that a method at work would change.
    broken : data that make ``apply`` fail half-way with ValueError or IndexError, if any do.
    """

    build: Callable[[], nn.Module]
    data: Callable[[], Any]
    outputs: Callable[[nn.Module], Tensor]
    broken: Callable[[], Any] | None = None


def random_tokens(seed: int = 0) -> Tokens:
    """(6, 24) token ids below the tiny models' vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    return Tokens.from_ids(torch.randint(3, 128, (6, 24), generator=generator))


def _logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=random_tokens(7).input_ids[:3]).logits


def _decoded_logits(model: nn.Module) -> Tensor:
    """(3, 12, vocabulary) logits of tokens that follow a prompt of 12, one by one."""
    ids = random_tokens(7).input_ids[:3]
    logits, cache = [], None
    with torch.no_grad():
        for start, stop in [(0, 12), *((at, at + 1) for at in range(12, ids.shape[1]))]:
            out = model(input_ids=ids[:, start:stop], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits.append(out.logits[:, -1])
    return torch.stack(logits, dim=1)


def _image_logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**image_prompt()).logits


def _class_logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(pixel_values=pixels(6, 2)).logits


def _labelled_windows() -> Inputs:
    """Windows in three classes; one token of a class is common in it."""
    ids = torch.cat([random_tokens(seed).input_ids for seed in range(8)])
    labels = torch.arange(len(ids)) % 3
    ids[:, ::3] = 20 + labels[:, None]
    return Inputs({"input_ids": ids, "labels": labels})


def _labelled_unknown_words() -> Inputs:
    values = dict(_labelled_windows().values)
    return Inputs({**values, "input_ids": torch.full_like(values["input_ids"], 10_000)})


def _more_labels() -> Inputs:
    """Of more classes than the network has."""
    values = dict(images().values)
    return Inputs({**values, "labels": torch.arange(len(values["labels"]))})


def _unknown_words() -> Tokens:
    tokens = Tokens.from_ids(torch.full((2, 8), 3))
    object.__setattr__(tokens, "input_ids", torch.full((2, 8), 10_000))
    return tokens


def _two_kinds() -> Labelled:
    """12 windows of two labels; those of the second hold the upper half of the words alone."""
    ids = torch.cat([random_tokens(0).input_ids, 64 + random_tokens(1).input_ids // 2])
    return Labelled.from_ids(ids, label=torch.arange(2).repeat_interleave(6))


def _two_kinds_unknown() -> Labelled:
    known = _two_kinds()
    return Labelled.from_ids(known.tokens.input_ids + 10_000, **known.attributes)


SUBJECTS: dict[str, Subject] = {
    "decoding language model": Subject(
        build=lambda: tiny_model("llama"),
        data=random_tokens,
        outputs=_decoded_logits,
        broken=_unknown_words,
    ),
    "language model": Subject(
        build=lambda: tiny_model("llama"),
        data=random_tokens,
        outputs=_logits,
        broken=_unknown_words,
    ),
    "labelled language model": Subject(
        build=lambda: tiny_model("llama"),
        data=_labelled_windows,
        outputs=_logits,
        broken=_labelled_unknown_words,
    ),
    "steered language model": Subject(
        build=lambda: tiny_model("llama"),
        data=_two_kinds,
        outputs=_decoded_logits,
        broken=_two_kinds_unknown,
    ),
    "vision model": Subject(build=mobilenet, data=images, outputs=logits),
    "vision transformer": Subject(
        build=lambda: tiny_model("vit"),
        data=labelled_images,
        outputs=_class_logits,
        broken=wrong_labels,
    ),
    "masked-diffusion language model": Subject(
        build=diffusion_lm, data=lambda: None, outputs=denoised
    ),
    "frozen network": Subject(build=mobilenet, data=images, outputs=logits, broken=_more_labels),
    "natural patches": Subject(build=coder, data=patches, outputs=recoded, broken=broken_patches),
    "stream model": Subject(build=stream_net, data=shapes, outputs=streamed),
    "vision-language model": Subject(
        build=tiny_vlm,
        data=lambda: None,
        outputs=_image_logits,
    ),
    "autoencoder": Subject(
        build=autoencoder, data=table, outputs=reconstruction, broken=broken_table
    ),
    "classifier": Subject(
        build=classifier, data=labelled, outputs=class_scores, broken=broken_labels
    ),
    "search space": Subject(
        build=space, data=images_to_search, outputs=decisions, broken=broken_digits
    ),
    "dynamics model": Subject(build=perceptron, data=pushes, outputs=predictions, broken=broken),
}
