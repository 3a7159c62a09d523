"""Sparse dictionaries in the files of SAELens, sparsify, dictionary_learning and Gemma Scope.

``read_dictionary`` tells the format by the files it finds; ``write_dictionary`` writes SAELens' or
sparsify's. Nothing is unpickled.
"""

from gossamer.export.sae.reading import read_dictionary
from gossamer.export.sae.writing import write_dictionary

__all__ = ["read_dictionary", "write_dictionary"]
