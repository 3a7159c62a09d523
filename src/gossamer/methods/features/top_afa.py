"""top-AFA: as many latents as make the code as long as the input, and no k to choose.

If atoms are nearly orthogonal, the squared norm of what is explained is the sum of the squared
codes; so a token keeps its largest codes until their norm matches its own.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from gossamer.core import Card
from gossamer.methods.features import rules
from gossamer.methods.features.base import RevivedMethod

__all__ = ["TopAFA"]


@dataclass(frozen=True, kw_only=True)
class TopAFA(RevivedMethod):
    """Learn a dictionary in which every token chooses how many latents it needs.

    :func:`gossamer.methods.features.measure.norm_match` gives the data of the ZF plot: norms of
    inputs beside norms of codes, and the paper's bound, for dictionaries of any rule;
    ``gossamer.report.zf.zf_plot`` draws it. Where true atoms are far from orthogonal, the count
    found is far above the true one.

    Parameters
    ----------
    gamma : weight of the squared difference of the two norms, >= 0; the paper sweeps 1/128 to
        1/16.

    Source: arXiv 2503.24277, §4. Departs from the paper: the penalty compares the norm of the
    centred input, as the selection does (the authors' code: of the standardised input); the last
    latent may be kept; activations are scaled by one number.
    """

    card: ClassVar[Card] = Card(
        title="Evaluating and Designing Sparse Autoencoders by Approximating Quasi-Orthogonality",
        year=2025,
        arxiv="2503.24277",
        system="top_afa",
        family="features",
        when="after training",
        start="dense",
        masks="dynamic",
        site="output of any module",
        score="squared pre-activation times squared atom norm",
        pattern="unstructured per token",
        budget="emergent: until the norm of the code matches that of the token",
        schedule="constant",
        update="learned dictionary",
        kernel="sparse_code",
        departs="the penalty uses the centred norm, as the selection does; activations scaled by "
        "one number",
    )

    example: ClassVar[Mapping[str, Any]] = {}

    gamma: float = 1 / 32

    def __post_init__(self) -> None:
        super().__post_init__()
        rules.TopAFA(self.gamma)

    def rule(self) -> rules.Rule:
        return rules.TopAFA(self.gamma)
