"""Features, seen: what a dictionary's latents fire on and speak for, as a page or served."""

from gossamer.report.features.book import Amounts, Book
from gossamer.report.features.explanations import read_explanations
from gossamer.report.features.firing import Firing, collect
from gossamer.report.features.neuronpedia import (
    is_neuronpedia,
    read_neuronpedia,
    write_neuronpedia,
)
from gossamer.report.features.opening import modules_read, open_dictionary
from gossamer.report.features.page import build_page, render
from gossamer.report.features.records import Example, Feature, Group, Histogram
from gossamer.report.features.serve import Shelf, server
from gossamer.report.features.wording import Unembedding, Vocabulary

__all__ = [
    "Amounts",
    "Book",
    "Example",
    "Feature",
    "Firing",
    "Group",
    "Histogram",
    "Shelf",
    "Unembedding",
    "Vocabulary",
    "build_page",
    "collect",
    "is_neuronpedia",
    "modules_read",
    "open_dictionary",
    "read_explanations",
    "read_neuronpedia",
    "render",
    "server",
    "write_neuronpedia",
]
