import pytest
import torch

from gossamer.core import GossamerError
from gossamer.models import load_model
from gossamer.models.templates import TASKS, batch, encode, load, path, vocabulary, words
from gossamer.models.templates.tasks import FEELINGS, LETTERS, NAMES, TOPICS
from gossamer.models.templates.train import accuracy


def text(ids):
    return " ".join(words()[i] for i in ids.tolist())


@pytest.mark.parametrize("task", TASKS)
def test_examples_are_seeded_and_shaped_alike(task):
    one, two, other = batch(task, 20, 3), batch(task, 20, 3), batch(task, 20, 4)
    assert torch.equal(one.ids, two.ids)
    assert not torch.equal(one.ids, other.ids)
    assert one.ids.shape == one.corrupted.shape
    assert len(one) == 20
    assert all(len(value) == 20 for value in one.attributes.values())
    assert bool((one.ids != one.corrupted).any(1).all()) or task == "years"
    if task != "topics":
        assert bool(one.right.gather(1, one.answer[:, None]).all())
        assert not bool(one.right.gather(1, one.wrong[:, None]).any())


def test_names_by_hand():
    made = batch("names", 50, 0)
    for row in range(50):
        said = text(made.ids[row]).split()
        one, other = NAMES[made.attributes["subject"][row]], words()[made.answer[row]]
        assert said.count(one) == 2
        assert said.count(other) == 1
        assert said[2 if made.attributes["order"][row] else 4] == other
        twin = text(made.corrupted[row]).split()
        assert [a for a, b in zip(said, twin, strict=True) if a != b] == [one]
        assert NAMES[made.attributes["indirect object"][row]] == other


def test_years_exclude_what_is_not_later():
    made = batch("years", 200, 1)
    start = made.attributes["year"]
    assert torch.equal(made.right.sum(1), 79 - start)
    assert int((made.answer - vocabulary()["10"] - start).min()) >= 1


def test_arguments_keep_their_order():
    made = batch("arguments", 30, 2)
    for row in range(30):
        said = text(made.ids[row]).split()
        named = [w for w in said[3:8] if w in LETTERS]
        assert words()[made.answer[row]] == named[2]
        assert [w for w in said[10:] if w in LETTERS] == named[:2]


def test_feelings_and_topics_carry_their_attribute():
    feelings, topics = batch("feelings", 40, 5), batch("topics", 400, 5)
    names = list(FEELINGS)
    for row in range(40):
        felt = text(feelings.ids[row]).split()[3]
        assert felt in FEELINGS[names[feelings.attributes["feeling"][row]]][0]
    own = [
        sum(w in list(TOPICS.values())[t] for w in text(ids).split()) / 15
        for ids, t in zip(topics.ids, topics.attributes["topic"].tolist(), strict=True)
    ]
    assert 0.7 < sum(own) / len(own) < 0.8


def test_impossible_requests():
    with pytest.raises(GossamerError, match="unknown task"):
        batch("name", 3)
    with pytest.raises(GossamerError, match="at least one"):
        batch("names", 0)
    with pytest.raises(GossamerError, match="unknown word"):
        encode("when Ada felt hapy")


def test_the_packaged_tokenizer_knows_the_words():
    loaded = load_model(path())
    made = batch("names", 3, 0)
    ids = loaded.tokenizer([text(row) for row in made.ids], return_tensors="pt").input_ids
    assert torch.equal(ids, made.ids)


def test_the_packaged_model_solves_its_tasks():
    found = accuracy(load(), 200)
    assert all(found[task] >= 0.9 for task in TASKS), found
    assert (path() / "model.safetensors").stat().st_size < 700_000
