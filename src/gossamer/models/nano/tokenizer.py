"""Byte-level BPE: merge the byte pairs that occur most, so that any text has an exact code."""

import json
from collections.abc import Iterable

SEPARATOR = "<|endoftext|>"
PADDING = "<|pad|>"
# Digits stand alone, so numbers have one spelling; a run of blanks gives up its last blank to
# the word after it, so a word has one token at any indentation.
_PIECES = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def build(texts: Iterable[str], size: int = 4096):
    """Train the tokenizer.

    Parameters
    ----------
    texts : training documents.
    size : vocabulary, the 256 bytes and two special tokens included.

    Returns
    -------
    tokenizers.Tokenizer
        ``<|endoftext|>`` is id 0 and ``<|pad|>`` id 1.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=[SEPARATOR, PADDING],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    return tokenizer


def files(tokenizer, context: int) -> dict[str, bytes]:
    """Contents of ``tokenizer.json`` and ``tokenizer_config.json`` for ``AutoTokenizer``."""
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SEPARATOR,
        "eos_token": SEPARATOR,
        "pad_token": PADDING,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    return {
        "tokenizer.json": tokenizer.to_str(pretty=False).encode(),
        "tokenizer_config.json": (json.dumps(settings, indent=2) + "\n").encode(),
    }


def token_bytes(tokenizer_json: bytes) -> list[int]:
    """Bytes each token stands for: one per character of its byte-level name, none if special."""
    data = json.loads(tokenizer_json)
    lengths = [0] * (1 + max(data["model"]["vocab"].values()))
    for token, index in data["model"]["vocab"].items():
        lengths[index] = len(token)
    for special in data["added_tokens"]:
        lengths[special["id"]] = 0
    return lengths
