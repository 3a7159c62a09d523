"""Models: load them, find their matrices by role, and measure what flows through them.

The only part of the package that knows transformers' names for things.
"""

from gossamer.models.applied import Applied, Report, SiteRow, State, at_work
from gossamer.models.calibrate import Block, BlockBatch, Progress, Streamed, stream
from gossamer.models.data import Inputs, Tokens, as_tokens, check_vocabulary, context_length
from gossamer.models.documents import halves, read_documents
from gossamer.models.gradient import gradients
from gossamer.models.loading import Loaded, find_tokenizer, load_model, resolve
from gossamer.models.sites import SiteMap, find_sites

__all__ = [
    "Applied",
    "Block",
    "BlockBatch",
    "Inputs",
    "Loaded",
    "Progress",
    "Report",
    "SiteMap",
    "SiteRow",
    "State",
    "Streamed",
    "Tokens",
    "as_tokens",
    "at_work",
    "check_vocabulary",
    "context_length",
    "find_sites",
    "find_tokenizer",
    "gradients",
    "halves",
    "load_model",
    "read_documents",
    "resolve",
    "stream",
]
