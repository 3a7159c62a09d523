"""What the claims on a language model share: the model, its texts, its dense loss.

Claims run on the packaged model and its texts. Those that speak of any language model
(``Claim.portable``) run on another one inside ``with on(Place(...))``.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from gossamer.core import GossamerError, check_count
from gossamer.evaluate import score
from gossamer.models import Loaded, Tokens, halves, load_model, read_documents

__all__ = ["Place", "calibration", "heldout", "here", "loss", "nano", "on", "outlier_channels"]


@dataclass(frozen=True, kw_only=True)
class Place:
    """A model and the texts to measure it on.

    Parameters
    ----------
    model : ``nano``, a folder or a hub id. device : where it runs.
    data : file of held-out text; None takes the packaged one.
    calibration : file of calibration text; None takes the first half of ``data``, or the
        packaged text.
    samples : calibration windows; None leaves it to the claim.
    windows, length : held-out windows and tokens per window; calibration windows have the same.
    """

    model: str = "nano"
    device: str = "cpu"
    data: str | None = None
    calibration: str | None = None
    samples: int | None = None
    windows: int = 8
    length: int = 256

    def __post_init__(self) -> None:
        for name in ("windows", "samples"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), 1)
        check_count("length", self.length, 2)
        if self.model != "nano" and self.data is None:
            raise GossamerError(
                f"held-out text of {self.model} is not known; name a file of it with data"
            )

    @property
    def name(self) -> str:
        """The model in short: the last part of its path or id."""
        return Path(self.model).name


_PACKAGED = Place()
_place = [_PACKAGED]


@contextmanager
def on(place: Place) -> Iterator[None]:
    """While open, :func:`nano`, :func:`heldout` and :func:`calibration` are this place's."""
    _place.append(place)
    try:
        yield
    finally:
        _place.pop()


def here() -> Place:
    """Where claims run at the moment."""
    return _place[-1]


def nano() -> Loaded:
    """The packaged model (or the place's), loaded once; every claim must leave it as it was."""
    return _load(here())


def heldout(windows: int | None = None, length: int | None = None) -> Tokens:
    """The first windows of the held-out text, (windows, length)."""
    place = here()
    return _heldout(place, length or place.length).slice(windows or place.windows)


def calibration(seed: int, samples: int = 16, length: int | None = None) -> Tokens:
    """Windows of the calibration text, drawn by the seed; the place's number if it names one."""
    place = here()
    return _calibration(place, seed, place.samples or samples, length or place.length)


@cache
def _load(place: Place) -> Loaded:
    return load_model(place.model, dtype="float32", device=place.device)


@cache
def _texts(place: Place) -> tuple[list[str], list[str]]:
    """Calibration and held-out documents, with nothing in common."""
    if place.data is None or place.calibration is not None:
        calibrated = read_documents(place.calibration, "calibration")
        return calibrated, read_documents(place.data, "heldout")
    return halves(read_documents(place.data))


@cache
def _heldout(place: Place, length: int) -> Tokens:
    return Tokens.from_documents(_texts(place)[1], _load(place).tokenizer, length=length)


@cache
def _calibration(place: Place, seed: int, samples: int, length: int) -> Tokens:
    tokenizer = _load(place).tokenizer
    return Tokens.from_documents(
        _texts(place)[0], tokenizer, length=length, samples=samples, seed=seed
    )


def loss(model: Any) -> float:
    """Held-out loss of a model in nats per token on :func:`heldout`."""
    return score(model, heldout(), batch_size=4).loss


@contextmanager
def outlier_channels(model: Any, seed: int, count: int = 8, factor: float = 32.0) -> Iterator[None]:
    """The same function with loud channels: what large language models grow by themselves.

    In every block, ``count`` gains of both norms are multiplied by ``factor`` and the matching
    input columns of the consuming projections divided by it. With a power of two both are exact
    in floating point, so the network's outputs do not change by one bit.

    Parameters
    ----------
    model : Llama-style. factor : a power of two.
    """
    generator = torch.Generator().manual_seed(seed)

    def rescale(by: float) -> None:
        generator.manual_seed(seed)
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            for norm, readers in (
                (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
                (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
            ):
                loud = torch.randperm(len(norm.weight), generator=generator)[:count]
                norm.weight.data[loud] *= by
                for reader in readers:
                    reader.weight.data[:, loud] /= by

    rescale(factor)
    try:
        yield
    finally:
        rescale(1.0 / factor)
