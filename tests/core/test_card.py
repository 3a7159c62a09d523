import pytest

from gossamer.core import FAMILIES, Card, GossamerError, systems

AXES = {
    "family": "weights",
    "when": "after training",
    "site": "linear weight",
    "score": "|w|",
    "pattern": "any",
    "budget": "count",
}


def test_the_list_of_systems_is_whole():
    known = systems()
    assert len(known) == 130
    assert sorted(system.id for system in known.values()) == list(range(1, 131))
    # One row of the list is a handbook: it is the vocabulary itself and belongs to no family.
    assert {system.family for system in known.values()} <= {*FAMILIES, "core"}
    assert all(system.title.strip() for system in known.values())


def test_a_card_of_a_listed_system_carries_its_exact_title():
    system = next(iter(systems().values()))
    card = Card(title=system.title, year=2024, system=system.key, **AXES)
    assert card.system_id == system.id
    assert card.to_dict()["title"] == system.title
    with pytest.raises(GossamerError, match="title of system"):
        Card(title=system.title + ".", year=2024, system=system.key, **AXES)


def test_a_baseline_outside_the_list_has_no_number():
    assert Card(title="A baseline", year=1989, **AXES).system_id is None


@pytest.mark.parametrize(
    "change",
    [
        {"family": "weight"},
        {"when": "after"},
        {"system": "no_such_system"},
        {"start": "sparse"},
        {"masks": "frozen"},
    ],
)
def test_words_outside_the_vocabulary_are_refused(change: dict[str, str]):
    with pytest.raises(GossamerError, match="unknown"):
        Card(title="A baseline", year=2024, **{**AXES, **change})
