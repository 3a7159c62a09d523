"""Interaction bases: directions of a layer by how much the next one listens to them."""
