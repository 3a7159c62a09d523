"""HyLRA: measure which layers can borrow another's keys, and let a programme pick who chooses.

Some layers suffer from reading few keys, some want the very keys an earlier layer wanted. Both are
measured once; dynamic programming then finds the cheapest split into layers that read all keys and
layers that reuse the choice of the latest such layer.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from gossamer.core import Card, GossamerError, check_count
from gossamer.methods.attention.base import AttentionMethod
from gossamer.methods.attention.decoding.choose import Amount
from gossamer.methods.attention.decoding.profile import Costs, best_anchors, profile
from gossamer.methods.attention.decoding.record import calibration_rows
from gossamer.methods.attention.decoding.reuse import ReuseSelector, check_table
from gossamer.models import Progress

__all__ = ["HyLRA"]


@dataclass(frozen=True, kw_only=True)
class HyLRA(AttentionMethod):
    """While decoding, layers found to agree with an earlier one read the keys it chose.

    Parameters
    ----------
    sparsity : share of the visible keys that reusing layers leave out, in [0, 1); 0.5 when no
        budget is given.
    budget_tokens : keys they read instead.
    tolerance : a layer may reuse only if 1 - cosine between its output over its own best keys and
        over all keys is at most this on average, >= 0.
    overlap : a layer may reuse only if at least this share of its own best keys is among its
        anchor's, on average and beyond chance: 0 as keys drawn by lot, 1 the same keys.
    unlike : price of disagreeing wholly, against 1 for a layer that reads all keys and the share
        of keys read for one that reuses, >= 0.
    prompts : sequences of the data that are looked at. queries : last queries of each.
    local : latest keys read in any case, the query's own among them, >= 1.

    Notes
    -----
    ``apply`` needs data of about the length that will be used: which layers agree drifts with it.
    Layer 0 always reads all keys. Whoever agrees with nobody does too, at any sparsity, so the
    pairs read may be far more than asked for, up to all: the report says how many.
    :class:`TidalDecode` is the special case of two fixed anchors.

    Departs from the paper: only the abstract was at hand, so the measure of sensitivity, the
    agreement beyond chance (half of the keys always hold half of any others), the thresholds and
    the programme's costs are a reconstruction; prompts stay full, only decoding is sparse; the
    heads that share keys choose together by their mean probability.
    """

    card: ClassVar = Card(
        title="HyLRA: Hybrid Layer Reuse Attention for Efficient Long-Context Inference",
        system="hylra",
        year=2026,
        arxiv="2602.00777",
        family="attention",
        when="inference",
        start="dense",
        masks="dynamic",
        site="attention scores of decoded tokens",
        score="true attention probability in the layer that chooses",
        pattern="keys per query and key-value head, shared by consecutive layers",
        budget="number of keys, or sparsity over visible keys; layers by dynamic programming",
        schedule="layers once before, keys at every decoded token",
        kernel="key gather, fused attention",
        departs="reconstructed from the abstract: measures (agreement beyond chance), thresholds "
        "and costs are ours; prompts stay full; heads of a group choose together",
    )
    phases: ClassVar = frozenset({"decode"})
    subject: ClassVar = "decoding language model"
    full: ClassVar = {"sparsity": 0.0}
    example: ClassVar = {"tolerance": 2.0, "overlap": 0.0, "unlike": 0.0}
    exempt: ClassVar = {
        "exact sparsity": "layers that choose read all keys",
        "encoders": "the family works on causal decoders",
        "beats window": "layers of the packaged model agree too little: on its short texts the "
        "latest keys hold more mass than those another layer chose",
    }

    sparsity: float | None = None
    budget_tokens: int | None = None
    tolerance: float = 0.1
    overlap: float = 0.3
    unlike: float = 1.0
    prompts: int = 4
    queries: int = 32
    local: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        Amount.check(self)
        for name in ("prompts", "queries", "local"):
            check_count(name, getattr(self, name), 1)
        for name, most in (("tolerance", 2.0), ("overlap", 1.0), ("unlike", float("inf"))):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0.0 <= value <= most:
                raise GossamerError(f"{name} is {value!r}; give a number from 0 to {most}")

    def plan(self, model: nn.Module, data: Any, length: int) -> ReuseSelector:
        return self.planned(model, data, length, None)

    def planned(
        self, model: nn.Module, data: Any, length: int, progress: Progress | None
    ) -> ReuseSelector:
        rows = calibration_rows(self.key(), data, model, self.prompts, length)
        amount = Amount(self.sparsity, self.budget_tokens)
        found = profile(model, rows, amount, self.queries, progress)
        table = best_anchors(found, self.costs(length))
        # Layers the guard keeps full choose nothing; who would read them reads all keys too.
        first = self.dense_layers
        return self._selector([max(a, first) if i > first else i for i, a in enumerate(table)])

    def costs(self, length: int) -> Costs:
        """What the programme charges at a length."""
        share = 1.0 - self.sparsity if self.sparsity is not None else 0.0
        if self.budget_tokens is not None:
            share = min(1.0, self.budget_tokens / max(1, length))
        return Costs(1.0, share, self.unlike, self.tolerance, self.overlap)

    def replan(self, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ReuseSelector:
        return self._selector(meta["table"])

    def _selector(self, table: Any) -> ReuseSelector:
        return ReuseSelector(check_table(table), self.sparsity, self.budget_tokens, self.local)
