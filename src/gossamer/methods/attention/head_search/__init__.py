"""Patterns of attention heads: what they are, how they are found offline, how they are kept."""

from gossamer.methods.attention.head_search.heads import Head, Kind, read_heads, write_heads
from gossamer.methods.attention.head_search.patterns import Online
from gossamer.methods.attention.head_search.prompt import retrieval_prompt
from gossamer.methods.attention.head_search.search import PAPER, HeadSearch, candidates

__all__ = [
    "PAPER",
    "Head",
    "HeadSearch",
    "Kind",
    "Online",
    "candidates",
    "read_heads",
    "retrieval_prompt",
    "write_heads",
]
