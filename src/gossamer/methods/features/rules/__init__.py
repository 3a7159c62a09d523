"""Selection rules: which latents of a row stay, as small plug-ins over one encoder."""

from typing import Any

from gossamer.core import unknown
from gossamer.methods.features.rules.afa import TopAFA
from gossamer.methods.features.rules.base import (
    Batch,
    Codes,
    Rule,
    Step,
    check_k,
    combine,
    top_batch,
    top_rows,
)
from gossamer.methods.features.rules.batches import (
    BatchTopK,
    FeatureChoice,
    Matryoshka,
    MutualChoice,
    zipf_counts,
)
from gossamer.methods.features.rules.penalised import Gated, JumpReLU, ReLU
from gossamer.methods.features.rules.structured import Structured
from gossamer.methods.features.rules.tokens import AbsTopK, GradientTopK, TopK

__all__ = [
    "RULES",
    "AbsTopK",
    "Batch",
    "BatchTopK",
    "Codes",
    "FeatureChoice",
    "Gated",
    "GradientTopK",
    "JumpReLU",
    "Matryoshka",
    "MutualChoice",
    "ReLU",
    "Rule",
    "Step",
    "Structured",
    "TopAFA",
    "TopK",
    "check_k",
    "combine",
    "rule_from_config",
    "top_batch",
    "top_rows",
    "zipf_counts",
]

RULES: dict[str, type[Rule]] = {
    rule.architecture: rule for rule in (TopK, ReLU, JumpReLU, Gated, AbsTopK, TopAFA, Structured)
}
"""Rules that files hold; rules in which a batch competes are stored as the JumpReLU they end as."""


def rule_from_config(config: dict[str, Any]) -> Rule:
    """The rule that a file's configuration names.

    Raises
    ------
    GossamerError
        If the architecture is none of :data:`RULES`.
    """
    name = config.get("architecture")
    if name not in RULES:
        raise unknown("dictionary architecture", name, tuple(RULES))
    return RULES[name].from_config(config)
