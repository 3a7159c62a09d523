"""Editing: one object for every change to what a model computes, on channels or on latents."""

from gossamer.methods.features.editing.activations import Pooling, gathered, pooled
from gossamer.methods.features.editing.intervention import Edit, Hooked, Intervention
from gossamer.methods.features.editing.laws import Affine, Law, Posterior, Within
from gossamer.methods.features.editing.steering import (
    Plan,
    SteeredModel,
    SteeringMethod,
    middle_block,
)

__all__ = [
    "Affine",
    "Edit",
    "Hooked",
    "Intervention",
    "Law",
    "Plan",
    "Pooling",
    "Posterior",
    "SteeredModel",
    "SteeringMethod",
    "Within",
    "gathered",
    "middle_block",
    "pooled",
]
