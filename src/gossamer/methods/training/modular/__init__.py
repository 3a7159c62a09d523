"""Modular wiring: groups of units that speak to groups, rewired where activities go together."""
