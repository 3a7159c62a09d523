"""Supervised dictionaries: atoms read off known attributes, and tests of any dictionary by them."""
