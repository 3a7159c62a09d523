import pytest
import torch

from gossamer.core import GossamerError
from gossamer.methods.features.editing import Affine
from gossamer.methods.features.supervised_dictionaries import SupervisedDictionaries
from gossamer.models import Tokens, templates
from gossamer.models.labelled import Labelled
from gossamer.models.templates.tasks import NAMES


def data(count=200):
    made = templates.batch("names", count, 3)
    return made, Labelled(
        Tokens.from_ids(made.ids),
        {name: made.attributes[name] for name in ("indirect object", "subject", "order")},
        {"indirect object": NAMES, "subject": NAMES},
    )


def test_swaps_the_name_that_follows():
    model = templates.load()
    _, labelled = data()
    method = SupervisedDictionaries(attribute="indirect object", source="Ada", target="Ben")
    test = templates.batch("names", 600, 11)
    about = test.attributes["indirect object"] == NAMES.index("Ada")
    about &= test.attributes["subject"] != NAMES.index("Ben")
    ids = test.ids[about]
    with torch.no_grad(), method.apply(model, labelled) as work:
        best = model(ids).logits[:, -1].argmax(-1)
        assert "for 'Ada'" in str(work.report())
    assert (best == templates.vocabulary()["Ben"]).float().mean() > 0.8
    with torch.no_grad():
        assert (model(ids).logits[:, -1].argmax(-1) == templates.vocabulary()["Ada"]).all()


def test_the_edit_is_the_difference_of_two_atoms():
    model = templates.load()
    _, labelled = data(60)
    method = SupervisedDictionaries(attribute="order", source="0", target="1", codes="mean")
    path, _, rows = method.fit(model, labelled)
    (edit,) = method.plan(model, labelled).edits
    order = labelled.codes("order")
    wanted = rows[order == 1].mean(0) - rows[order == 0].mean(0)
    assert path == edit.path == "model.layers.2"
    assert isinstance(edit.law, Affine)
    assert torch.allclose(edit.law.shift, wanted, atol=1e-5)


def test_bad_input():
    _, labelled = data(10)
    model = templates.load()
    with pytest.raises(GossamerError, match="name two values"):
        SupervisedDictionaries(attribute="order", source="1", target="1").apply(model, labelled)
    with pytest.raises(GossamerError, match="codes"):
        SupervisedDictionaries(codes="best")  # type: ignore[arg-type]
    with pytest.raises(GossamerError, match="did you mean order"):
        SupervisedDictionaries(attribute="ordr").apply(model, labelled)
