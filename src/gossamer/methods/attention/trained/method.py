"""Methods that put an attention pattern in place and train the model under it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import nn

from gossamer.core import GossamerError
from gossamer.methods.attention.applied import attention_shape
from gossamer.methods.attention.base import AttentionMethod
from gossamer.methods.attention.trained.applied import TrainedAttention
from gossamer.models import Inputs, Progress, Tokens, as_tokens, context_length
from gossamer.models.fit import FitPlan

__all__ = ["TrainedMethod", "as_samples"]


@dataclass(frozen=True, kw_only=True)
class TrainedMethod(AttentionMethod):
    """Base of the methods whose pattern is no drop-in: the model is trained under it.

    Parameters
    ----------
    steps, lr, batch_size, seed : of the training of all weights, the rate falling to 0 over the
        second half; 0 steps only puts the pattern in place.
    """

    selects: ClassVar[bool] = False
    works: ClassVar[type[TrainedAttention]] = TrainedAttention
    """What ``apply`` returns."""

    steps: int = 300
    lr: float = 3e-4
    batch_size: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.training()

    def training(self) -> FitPlan:
        """The training, also for a dense model that is to see the same samples."""
        return FitPlan(
            steps=self.steps, lr=self.lr, batch_size=self.batch_size, seed=self.seed, decay=0.5
        )

    def apply(
        self, model: nn.Module, data: Any = None, *, progress: Progress | None = None
    ) -> TrainedAttention:
        """Put the pattern in place and train the model under it, in place.

        Parameters
        ----------
        data : token windows or text to train on; ``Inputs`` with ``input_ids`` and ``labels``
            score only some tokens. The packaged text if None.

        Raises
        ------
        GossamerError
            If the model is no causal decoder, or the training fails; the model is then as before.
        """
        samples = as_samples(data, model)
        length = _sample_length(samples) if self.length is None else self.length
        limit = context_length(model)
        if limit is not None and length > limit:
            raise GossamerError(
                f"length {length} is over the model's limit of {limit} tokens; give at most {limit}"
            )
        resolved = replace(self, length=length)
        work = self.works(resolved, model, self.plan(model, data, length), length)
        work.train(samples, self.training(), progress)
        return work

    def reattach(
        self, model: nn.Module, meta: Mapping[str, Any], tensors: Mapping[str, Any]
    ) -> TrainedAttention:
        """Put the pattern in place; the loaded weights are already the trained ones."""
        made, here = meta.get("shape"), attention_shape(model)
        if made not in (None, here):
            raise GossamerError(
                f"this {self.key()} plan was made for a model of {made}; {type(model).__name__} "
                f"has {here}: apply the method anew"
            )
        return self.works(self, model, self.replan(meta, tensors), int(meta["length"]))


def as_samples(data: Any, model: nn.Module) -> Tokens | Inputs:
    """Training data: inputs with ``input_ids`` and ``labels`` as they are, all else as tokens.

    Raises
    ------
    GossamerError
        If ready-made inputs hold no token ids.
    """
    if not isinstance(data, Inputs):
        return as_tokens(data, model)
    if "input_ids" not in data.values:
        raise GossamerError(
            f"the inputs hold {', '.join(data.values)}; give input_ids, and labels to score some "
            "of them only"
        )
    return data


def _sample_length(samples: Tokens | Inputs) -> int:
    """Tokens of a sample, padding included."""
    return samples.length if isinstance(samples, Tokens) else samples.values["input_ids"].shape[1]
