"""CRATE: blocks derived from one objective, compress the tokens and make them sparse.

Attention with one projection moves tokens towards low-dimensional subspaces; a step of ISTA codes
them in a dictionary, non-negative and with many zeros.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from math import isfinite
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gossamer.core import Card, GossamerError, Method, check_count
from gossamer.methods.activations.crate_blocks.applied import CRATEModel
from gossamer.methods.activations.crate_blocks.block import ISTA, MSSA, CRATEBlock
from gossamer.methods.activations.crate_blocks.rates import (
    LayerRates,
    coding_rate,
    compressed_rate,
    measure_rates,
)
from gossamer.methods.activations.training.hidden import swapped
from gossamer.methods.activations.training.loop import Training, as_trainable, fit, take
from gossamer.methods.activations.training.trained import as_data, keep_weights
from gossamer.models import Progress, find_sites

__all__ = ["CRATE", "ISTA", "MSSA", "CRATEBlock", "coding_rate", "compressed_rate"]

_MEASURED = 64


@dataclass(frozen=True, kw_only=True)
class CRATE(Method):
    """Put CRATE blocks of the same width in the place of a model's blocks, and train.

    A vision transformer becomes CRATE, a causal language model CRATE-GPT. The new blocks are
    fresh, so the model knows nothing until trained; every weight of the model is trained.

    Parameters
    ----------
    heads : subspaces; None: the model's attention heads.
    step : η of the sparse-coding step, above 0. penalty : λ, at least 0.
    steps, lr, batch_size, seed : of the training; steps 0 leaves fresh blocks, with a warning.

    Source: arXiv 2311.13110, §2 and the official code's block.

    Departs from the paper: the model's own embedding, last norm and head stay around the blocks
    (no second layer norm in the patch embedding); rotary positions do not reach the blocks, so a
    model that has no others tells positions by the causal mask alone.
    """

    card: ClassVar[Card] = Card(
        title="White-Box Transformers via Sparse Rate Reduction: Compression Is All There Is?",
        year=2023,
        arxiv="2311.13110",
        system="crate",
        family="activations",
        when="during training",
        masks="dynamic",
        site="token representation behind every block",
        score="emergent",
        pattern="any feature, per token",
        budget="emergent, by the penalty of one ISTA step",
        schedule="constant",
        update="training of all weights",
        kernel="dense",
        departs="the model's own embedding and head; rotary positions do not reach the blocks",
    )
    subject: ClassVar[str] = "vision transformer"
    example: ClassVar[Mapping[str, Any]] = {"steps": 2, "batch_size": 4}
    exempt: ClassVar[Mapping[str, str]] = {
        "dense at sparsity 0": "the blocks are others; there is no dense model to come back to",
        "exact sparsity": "the sparsity emerges in training and is no parameter",
        "sparsity range": "the sparsity emerges in training and is no parameter",
        "every architecture": "of the other architectures, its own tests cover decoders",
    }

    heads: int | None = None
    step: float = 0.1
    penalty: float = 0.1
    steps: int = 300
    lr: float = 1e-3
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads is not None:
            check_count("heads", self.heads, 1)
        if not isfinite(self.step) or self.step <= 0:
            raise GossamerError(f"step is {self.step!r}; give a number above 0")
        if not isfinite(self.penalty) or self.penalty < 0:
            raise GossamerError(f"penalty is {self.penalty!r}; give a number, at least 0")
        self.plan()

    def plan(self) -> Training:
        """The training."""
        return Training(
            steps=self.steps, lr=self.lr, batch_size=self.batch_size, seed=self.seed, decay=0.5
        )

    def apply(
        self, model: nn.Module, data: Any = None, *, progress: Progress | None = None
    ) -> CRATEModel:
        """Replace the blocks in place, and train the whole model on the data.

        Parameters
        ----------
        model : a transformers encoder or decoder whose blocks are found.
        data : ``Inputs`` with labels for vision models, tokens for language models.
        """
        as_trainable(model)
        samples = as_data(data, model)
        heads = self.heads or _heads(model)
        with ExitStack() as stack:
            blocks = self._blocks(model, heads)
            stack.callback(keep_weights(dict(model.named_parameters())))
            stack.enter_context(swapped(model, dict(blocks)))
            losses = fit(model, samples, self.plan(), progress=progress, what="CRATE")
            few = take(samples, torch.arange(min(_MEASURED, len(samples))))
            rates = measure_rates(model, blocks, few)
            return CRATEModel(
                self,
                model,
                stack.pop_all(),
                blocks,
                rates,
                losses=losses,
                trained=self.steps > 0,
            )

    def reattach(
        self, model: nn.Module, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> CRATEModel:
        """Put stored blocks into a loaded model."""
        blocks = self._blocks(model, meta["heads"])
        for path, block in blocks.items():
            head = f"{path}."
            own = {k.removeprefix(head): v for k, v in tensors.items() if k.startswith(head)}
            try:
                block.load_state_dict(own)
            except RuntimeError:
                raise GossamerError(
                    f"the saved block {path} does not fit this model; use the model it was saved "
                    "with"
                ) from None
        with ExitStack() as stack:
            stack.enter_context(swapped(model, dict(blocks)))
            rates = {name: LayerRates(**values) for name, values in meta["rates"].items()}
            undo = stack.pop_all()
            return CRATEModel(self, model, undo, blocks, rates, trained=meta["trained"])

    def _blocks(self, model: nn.Module, heads: int) -> dict[str, CRATEBlock]:
        """Fresh blocks by path, drawn by the seed, on the device and in the mode of the old."""
        sites = find_sites(model)
        made: dict[str, CRATEBlock] = {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            for index, path in enumerate(sites.blocks):
                old = model.get_submodule(path)
                query = next(s for s in sites.in_block(index) if s.role.startswith("attention."))
                attention = model.get_submodule(sites.attentions[index])
                block = CRATEBlock(
                    query.shape[1],
                    heads,
                    step=self.step,
                    penalty=self.penalty,
                    causal=bool(getattr(attention, "is_causal", sites.head is not None)),
                    layer=index,
                    like=old,
                )
                weight = query.weight(model)
                made[path] = block.to(weight.device, weight.dtype).train(old.training)
        return made


def _heads(model: nn.Module) -> int:
    config: Any = model.config
    text = config.get_text_config() if hasattr(config, "vocab_size") else config
    return int(text.num_attention_heads)
