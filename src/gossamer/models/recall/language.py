"""The recall language: the words, sentences and questions that long-context tasks are written in.

Everything is made here, so no text is scraped and any length is a loop away. The vocabulary is
closed: a tokenizer with one token per lexicon word, syllable and pair of digits reads all of it.
A template is plain text with slots in braces; the same templates make the evaluation's prompts as
text and the training batches as token ids.
"""

from itertools import product

__all__ = [
    "ADJECTIVES",
    "LITERALS",
    "NOUNS",
    "PROSE",
    "SYLLABLES",
    "TEMPLATES",
    "VALUE_DIGITS",
    "VERBS",
    "name",
    "value",
]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NOUNS = _words("""
    anchor apple arrow autumn badger barrel basket beacon bell bird blanket boat bottle branch
    brick bridge brook bucket butter button candle canyon carpet castle cave chair chalk
    cherry clock cloud coast copper corner cotton cradle crow curtain desert door dragon drum
    dust eagle engine farm feather fence field finger flag flower forest fountain fox garden
    glass goose grain hammer harbor hill honey horse house ice iron island jacket kettle key
    ladder lamp lantern leaf lemon letter lion market meadow mirror moon morning mountain
    needle nest night ocean orchard owl paper path pepper pillow planet pocket pond potter
    rabbit rain ribbon ring river road roof salt sand shadow ship silver sky snow storm street
    summer sun thread tower train tree valley village wagon wall water wheel whistle wind
    window winter wolf wood wool
""")
"""Also the words that the counting tasks count."""
VERBS = _words("""
    follows finds keeps carries meets leaves crosses covers guards holds watches touches moves
    reaches passes hides brings turns lifts paints
""")
ADJECTIVES = _words("""
    old small quiet bright heavy green warm narrow broken clean dark early empty golden high
    long round sharp soft
""")
_ONSETS = (*"bdfghjklmnprstvwz", "bl", "br", "dr", "fl", "fr", "gl", "gr", "kl", "kr", "pl", "pr")
_ONSETS = (*_ONSETS, "sk", "sl", "sm", "sp", "st", "tr")
SYLLABLES = tuple("".join(parts) for parts in product(_ONSETS, "aeiou"))
"""Consonants and one vowel each, so a word falls apart into syllables in one way."""
VALUE_DIGITS = 7

PROSE = (
    "The {adjective} {noun} {verb} the {noun}.",
    "A {noun} near the {noun} {verb} the road again.",
    "Every {adjective} {noun} {verb} a {noun} under the {noun}.",
    "In the morning the {noun} {verb} a {adjective} {noun}.",
    "The {noun} and the {noun} {verb} the {adjective} {noun} today.",
    "Nobody knows why the {noun} {verb} the {noun} at night.",
)
"""Sentences of the haystack."""

TEMPLATES = {
    "needle": "The number of {name} is {value}.",
    "one": "Question: what is the number of {name}? Answer:",
    "all": "Question: what are all the numbers of {name}? Answer:",
    "several": "Question: what are the numbers of {names}? Answer:",
    "set": "VAR {name} = {value}.",
    "copy": "VAR {name} = VAR {other}.",
    "trace": "Question: which variables hold {value}? Answer:",
    "common": "Question: which words are most common? Answer:",
    "frequent": "Question: which words are most frequent? Answer:",
}
LITERALS = _words("""
    The A Every In Nobody the a near again under morning and today knows why at night number
    numbers of is Question what are all Answer VAR which variables hold words most common
    frequent
""")
"""Words of the templates that are no slot; some are nouns too."""


def name(index: int) -> str:
    """The two-syllable word with a number from 0 to ``len(SYLLABLES) ** 2 - 1``.

    >>> name(0), name(1)
    ('baba', 'babe')
    """
    first, second = divmod(index, len(SYLLABLES))
    return SYLLABLES[first] + SYLLABLES[second]


def value(number: int) -> str:
    """A number as its seven digits.

    >>> value(42)
    '0000042'
    """
    return f"{number:0{VALUE_DIGITS}d}"
