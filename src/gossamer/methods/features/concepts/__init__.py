"""Concepts as supervised directions: probes, counterfactual offsets, and latents held to both."""

from gossamer.methods.features.concepts.match import ConceptMatch, concept_match
from gossamer.methods.features.concepts.posterior import ConceptNet
from gossamer.methods.features.concepts.probes import OffsetProduct, offset_product, probes

__all__ = [
    "ConceptMatch",
    "ConceptNet",
    "OffsetProduct",
    "concept_match",
    "offset_product",
    "probes",
]
