"""TidalDecode: neighbouring layers want the same keys, so choose in two layers and reuse.

While decoding, an early layer attends to all keys and keeps the places of the best; the layers
behind it read only those. One layer in the middle attends to all keys and corrects the choice.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from gossamer.core import Card, GossamerError, check_count
from gossamer.methods.attention.base import AttentionMethod
from gossamer.methods.attention.decoding.choose import Amount
from gossamer.methods.attention.decoding.reuse import ReuseSelector, check_table
from gossamer.models import find_sites

__all__ = ["TidalDecode", "tidal_table"]

_CORRECTION = 13 / 32
"""Depth of the correction layer in the reference: 13 of 32 layers."""


def tidal_table(layers: int, first: int, correction: int | None) -> tuple[int, ...]:
    """The anchor of every layer.

    Parameters
    ----------
    layers : of the model. first : first layer that chooses; those before it read all keys.
    correction : layer that chooses anew, or None for none.

    >>> tidal_table(8, first=2, correction=5)
    (0, 1, 2, 2, 2, 5, 5, 5)
    """
    table = [layer if layer < first else first for layer in range(layers)]
    if correction is not None:
        table[correction:] = [correction] * (layers - correction)
    return check_table(table)


@dataclass(frozen=True, kw_only=True)
class TidalDecode(AttentionMethod):
    """While decoding, choose keys by true attention in two layers; the others read those.

    Parameters
    ----------
    sparsity : share of the visible keys that reusing layers leave out, in [0, 1); 0.5 when no
        budget is given.
    budget_tokens : keys they read instead; 128 to 512 in the paper.
    correction : layer that reads all keys and chooses anew; None takes 13/32 of the depth, as the
        reference has it for 32 layers. Which layers are best depends on the model:
        ``benchmarks/tidal_layers.py`` sweeps both on needle prompts. 0 means none.
    local : latest keys read in any case, the query's own among them, >= 1.
    dense_layers : layers before the first that chooses; 2 as in the reference.

    Head h of a layer reads the keys chosen by head h of its anchor. All keys stay in the cache.

    Sweep before use: the recall model of 8 layers answers 0.08 of its needles at the defaults
    (layers 2 and 3 choose), 0.92 where layers 3 and 5 do, and all only from layer 5 on, which
    leaves one layer that reuses.

    Departs from the paper: the heads that share keys choose together, by the sum of their
    attention probabilities (the reference has no grouped-query models).
    """

    card: ClassVar = Card(
        title="TidalDecode: Fast and Accurate LLM Decoding with Position Persistent Sparse "
        "Attention",
        system="tidal_decode",
        year=2024,
        arxiv="2410.05076",
        family="attention",
        when="inference",
        start="dense",
        masks="dynamic",
        site="attention scores of decoded tokens",
        score="true attention probability in the layer that chooses",
        pattern="keys per query and key-value head, shared by consecutive layers",
        budget="number of keys, or sparsity over visible keys",
        schedule="chosen anew in two layers for every decoded token",
        kernel="key gather, fused attention",
        departs="heads of a group choose together by summed probabilities",
    )
    phases: ClassVar = frozenset({"decode"})
    subject: ClassVar = "decoding language model"
    full: ClassVar = {"sparsity": 0.0}
    example: ClassVar = {"dense_layers": 0, "correction": 0}
    exempt: ClassVar = {
        "exact sparsity": "layers that choose read all keys",
        "encoders": "the family works on causal decoders",
        "beats window": "layers of the packaged model agree too little: on its short texts the "
        "latest keys hold more mass than those another layer chose",
    }

    sparsity: float | None = None
    budget_tokens: int | None = None
    correction: int | None = None
    local: int = 1
    dense_layers: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        Amount.check(self)
        check_count("local", self.local, 1)
        if self.correction is not None:
            check_count("correction", self.correction, 0)

    def plan(self, model: nn.Module, data: Any, length: int) -> ReuseSelector:
        layers = len(find_sites(model).attentions)
        if self.dense_layers + 1 >= layers:
            raise GossamerError(
                f"dense_layers {self.dense_layers} leaves no layer to reuse keys in a model of "
                f"{layers}; give at most {max(0, layers - 2)}"
            )
        table = tidal_table(layers, self.dense_layers, self._correction(layers))
        return ReuseSelector(table, self.sparsity, self.budget_tokens, self.local)

    def _correction(self, layers: int) -> int | None:
        correction = self.correction
        if correction is None:
            correction = round(_CORRECTION * layers)
            return correction if self.dense_layers < correction < layers else None
        if correction == 0:
            return None
        if not self.dense_layers < correction < layers:
            raise GossamerError(
                f"correction {correction} must lie behind layer {self.dense_layers}, the first "
                f"that chooses, and before {layers}, the number of layers; or 0 for none"
            )
        return correction

    def replan(self, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ReuseSelector:
        table = check_table(meta["table"])
        return ReuseSelector(table, meta["sparsity"], meta["budget_tokens"], int(meta["local"]))
