"""The recall model's tokenizer: one token for a word, a syllable or a pair of digits.

Built in code from the closed vocabulary of :mod:`gossamer.models.recall.language`; a word's first
piece carries the space before it. What the language does not know is ``<unk>``.
"""

import json
from itertools import product
from pathlib import Path
from typing import Any

from gossamer.models.nano.corpus import write_atomic
from gossamer.models.recall.language import ADJECTIVES, LITERALS, NOUNS, SYLLABLES, VERBS

__all__ = ["BEGIN", "END", "PADDING", "UNKNOWN", "build", "vocabulary", "write"]

PADDING, BEGIN, END, UNKNOWN = SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
_SPACE = "\u2581"
_MARKS = (".", ",", ":", "?", "=")


def vocabulary() -> dict[str, int]:
    """Token to id: specials, marks, words; digits and syllables with and without a space before."""
    words = sorted({*NOUNS, *VERBS, *ADJECTIVES, *LITERALS})
    digits = ["".join(pair) for pair in product("0123456789", repeat=2)] + [*"0123456789"]
    pieces = [*digits, *SYLLABLES]
    tokens = [*SPECIAL, *_MARKS, _SPACE + "="]
    tokens += [_SPACE + word for word in words]
    tokens += [_SPACE + piece for piece in pieces] + pieces
    return {token: index for index, token in enumerate(tokens)}


def build() -> Any:
    """The tokenizer as a ``tokenizers.Tokenizer``; it puts ``<bos>`` before every text."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors

    known = vocabulary()
    words = sorted({*NOUNS, *VERBS, *ADJECTIVES, *LITERALS}, key=len, reverse=True)
    pattern = (
        rf"{_SPACE}(?:{'|'.join(words)})(?![a-z])"
        rf"|{_SPACE}?[b-df-hj-np-tv-z]+[aeiou]|{_SPACE}?[0-9]{{1,2}}|{_SPACE}?[^{_SPACE}]"
    )
    tokenizer = tokenizers.Tokenizer(models.WordLevel(known, unk_token=UNKNOWN))
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [
            pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="first"),
            pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
        ]
    )
    tokenizer.decoder = decoders.Metaspace(  # pyright: ignore[reportAttributeAccessIssue]
        replacement=_SPACE, prepend_scheme="first"
    )
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, known[BEGIN])]
    )
    return tokenizer


def write(folder: Path, context: int) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` for ``AutoTokenizer``."""
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PADDING,
        "bos_token": BEGIN,
        "eos_token": END,
        "unk_token": UNKNOWN,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "tokenizer.json", build().to_str(pretty=False).encode())
    write_atomic(folder / "tokenizer_config.json", (json.dumps(settings, indent=2) + "\n").encode())
