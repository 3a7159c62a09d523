"""Every task holds its answer in its text, and in no other way than it says."""

import re
from collections import Counter
from random import Random

import pytest

from gossamer.core import GossamerError
from gossamer.evaluate.long_context.tasks import TASKS, find_task, variable_tracking


def numbers(draft, name):
    text = " ".join(draft.units)
    return re.findall(rf"The number of {name} is (\d{{7}})\.", text)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "name", ["niah_single", "niah_multikey", "niah_multivalue", "niah_multiquery"]
)
def test_needles_are_where_the_draft_says(name, seed):
    draft = TASKS[name].make(Random(seed), 40, 5)
    asked = re.findall(r"\b[a-z]+\b", draft.question.partition(" of ")[2].partition("?")[0])
    told = [value for one in asked for value in numbers(draft, one)]
    assert sorted(told) == sorted(draft.answers)
    assert len(told) == {"niah_multivalue": 4, "niah_multiquery": 4}.get(name, 1)
    evidence = " ".join(draft.units[i] for i in draft.evidence)
    assert all(value in evidence for value in draft.answers)
    assert max(draft.evidence) < len(draft.units) - 5
    rest = [u for i, u in enumerate(draft.units) if i not in draft.evidence]
    assert all(value not in " ".join(rest) for value in draft.answers)
    needles = sum("The number of" in unit for unit in draft.units)
    assert needles == (len(draft.units) if name == "niah_multikey" else len(draft.evidence))


def test_values_of_one_name_are_answered_in_the_order_of_the_text():
    draft = TASKS["niah_multivalue"].make(Random(3), 60, 0)
    text = " ".join(draft.units)
    places = [text.index(value) for value in draft.answers]
    assert places == sorted(places)


@pytest.mark.parametrize(("chains", "hops"), [(1, 4), (8, 4), (3, 1)])
def test_variables_hold_the_value_by_running_the_assignments(chains, hops):
    draft = variable_tracking(chains, hops).make(Random(1), 80, 0)
    value = re.search(r"hold (\d+)", draft.question)
    held = {}
    lines = re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", " ".join(draft.units))
    assert len(lines) == chains * (hops + 1)
    for _ in range(hops + 1):
        for name, source in lines:
            held[name] = source if source.isdigit() else held.get(source)
    assert value is not None
    expected = {name for name, what in held.items() if what == value[1]}
    assert set(draft.answers) == expected
    assert len(expected) == hops + 1


@pytest.mark.parametrize("seed", range(4))
def test_counted_words_are_the_most_frequent(seed):
    common = TASKS["common_words"].make(Random(seed), 400, 0)
    ranked = Counter(common.units).most_common()
    assert {word for word, _ in ranked[:10]} == set(common.answers)
    assert ranked[9][1] == 10 * ranked[10][1]
    frequent = TASKS["frequent_words"].make(Random(seed), 300, 0)
    ranked = Counter(frequent.units).most_common()
    assert tuple(word for word, _ in ranked[:3]) == frequent.answers
    assert ranked[2][1] > ranked[3][1]


def test_axes_and_names():
    assert {t.scope for t in TASKS.values()} == {"low", "high"}
    assert {t.dispersion for t in TASKS.values()} == {"low", "high"}
    assert find_task("variable_tracking:2x3").least == 8
    for bad in ("variable_traking", "niah_single:2x2", "variable_tracking:2", "common_words:x"):
        with pytest.raises(GossamerError):
            find_task(bad)
    with pytest.raises(GossamerError, match="at least 1"):
        variable_tracking(0, 4)


def test_the_same_seed_gives_the_same_text():
    for task in TASKS.values():
        assert task.make(Random("a"), 130, 0) == task.make(Random("a"), 130, 0)
        assert task.make(Random("a"), 130, 0) != task.make(Random("b"), 130, 0)
