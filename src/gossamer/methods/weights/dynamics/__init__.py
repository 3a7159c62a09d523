"""Learned dynamics with few ReLUs, and planning through them by mixed-integer programming."""
