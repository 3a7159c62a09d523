"""Tickets: sparse networks found by training in rounds and rewinding, or by searching."""
