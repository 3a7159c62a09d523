"""The closed language: every word has a token, and text comes back as it went in."""

from random import Random

import pytest

from gossamer.core import GossamerError
from gossamer.evaluate.long_context import TASKS
from gossamer.models import recall
from gossamer.models.loading import load_tokenizer
from gossamer.models.recall import language
from gossamer.models.recall.tokenizer import build, vocabulary, write


def test_names_fall_apart_into_their_syllables():
    tokenizer = build()
    words = {*language.NOUNS, *language.VERBS, *language.ADJECTIVES, *language.LITERALS}
    total = len(language.SYLLABLES) ** 2
    for index in range(0, total, 97):
        name = language.name(index)
        first, second = divmod(index, len(language.SYLLABLES))
        pieces = ["\u2581" + language.SYLLABLES[first], language.SYLLABLES[second]]
        assert tokenizer.encode(name).tokens[1:] == pieces
    assert not words & {language.name(i) for i in range(total)}


def test_every_task_is_read_and_written_without_loss():
    tokenizer = build()
    unknown = vocabulary()["<unk>"]
    for task in TASKS.values():
        draft = task.make(Random(2), 130, 0)
        text = " ".join((*draft.units, draft.question, draft.answer))
        ids = tokenizer.encode(text).ids
        assert unknown not in ids
        assert tokenizer.decode(ids) == text


def test_what_the_language_lacks_is_unknown():
    assert build().encode("Schnee!").tokens.count("<unk>") > 0


def test_the_folder_opens_as_any_other(tmp_path):
    write(tmp_path, 4096)
    tokenizer = load_tokenizer(tmp_path, required=True)
    assert tokenizer.padding_side == "left"
    assert tokenizer("The number of kalo is 0000042.")["input_ids"][0] == tokenizer.bos_token_id
    assert len(tokenizer) == len(vocabulary()) <= 1024


def test_a_missing_folder_says_how_to_train(tmp_path):
    with pytest.raises(GossamerError, match=r"models\.recall\.train"):
        recall.load(tmp_path / "none")
