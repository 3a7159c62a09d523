import pytest
import torch

from gossamer.claims.control.beds import feelings, moods, net
from gossamer.core import GossamerError
from gossamer.methods.control.base import Affine
from gossamer.methods.control.emotion_circuits import (
    EmotionCircuits,
    directions,
    find_circuit,
    shares,
)
from gossamer.models import templates
from tests.models.tiny import tiny_model


@pytest.fixture(scope="module")
def circuit():
    return find_circuit(net(), feelings(6, 0), "label", "anger")


def test_directions_take_off_what_the_groups_are_about():
    feeling = torch.tensor([0, 1, 0, 1, 0])
    group = torch.tensor([0, 0, 1, 1, 2])
    own = torch.tensor([[1.0, 0], [-1.0, 0]])
    rows = own[feeling] + 100 * group[:, None]
    # The third group lacks a feeling; its level must not count.
    assert torch.allclose(directions(rows, feeling, group), own)


def test_directions_need_a_group_with_every_feeling():
    with pytest.raises(GossamerError, match="all 2 values"):
        directions(torch.ones(2, 3), torch.tensor([0, 1]), torch.tensor([0, 1]))


def test_shares_follow_importance_and_room():
    assert shares(torch.tensor([3.0, 1.0, 0.0]), 4, 10) == [3, 1, 0]
    assert shares(torch.tensor([3.0, 1.0, -5.0]), 5, 2) == [2, 2, 1]
    assert shares(torch.tensor([-1.0, -1.0]), 9, 2) == [2, 2]
    assert sum(shares(torch.tensor([0.3, 0.2, 0.1]), 7, 5)) == 7


def test_the_circuit_keeps_its_budget(circuit):
    assert (circuit.neurons, circuit.heads) == ((10, 512), (1, 16))
    mlp = [u for p, u in circuit.units.items() if "mlp" in p]
    heads = [u for p, u in circuit.units.items() if "attn" in p]
    assert sum(map(len, mlp)) == 10
    assert sum(map(len, heads)) == 16
    (head,) = [u for u in heads if len(u)]
    assert head.tolist() == list(range(int(head[0]), int(head[0]) + 16))
    assert int(head[0]) % 16 == 0


def test_random_circuits_have_the_same_budget(circuit):
    other, again = circuit.random(3), circuit.random(3)
    for path in circuit.units:
        assert torch.equal(other.units[path], again.units[path])
        assert len(other.units[path].unique()) == len(other.units[path])
    for part in ("mlp", "attn"):
        counts = [sum(len(u) for p, u in c.units.items() if part in p) for c in (circuit, other)]
        assert counts[0] == counts[1]


def test_edits_add_the_feelings_change(circuit):
    for edit in circuit.edits():
        path = edit.path.removesuffix(":in")
        assert isinstance(edit.law, Affine)
        assert torch.equal(edit.law.shift, circuit.change[path][circuit.units[path]])
        assert (edit.law.scale == 1).all()


def test_neurons_are_those_that_write_the_direction(circuit):
    """Recomputed without the shared code for one MLP."""
    from gossamer.methods.features.editing import gathered

    data = feelings(6, 0)
    path = max((p for p in circuit.units if "mlp" in p), key=lambda p: len(circuit.units[p]))
    label = data.codes("label")
    out = gathered(net(), data.tokens, (path,))[path]
    toward = out[label == 2].mean(0) - out.mean(0)
    inside = gathered(net(), data.tokens, (f"{path}:in",))[f"{path}:in"]
    wrote = inside[label == 2].mean(0) * (toward @ net().get_submodule(path).weight)
    wanted = wrote.topk(len(circuit.units[path])).indices
    assert set(wanted.tolist()) == set(circuit.units[path].tolist())


def test_generated_texts_show_the_feeling():
    model = templates.load()
    neutral = templates.batch("feelings", 40, 5).corrupted
    with EmotionCircuits(target="anger").apply(model, feelings(6, 0)) as work:
        mask = torch.ones_like(neutral)
        out = model.generate(
            neutral, attention_mask=mask, max_new_tokens=1, do_sample=False, pad_token_id=0
        )
        assert "10 of 512 neurons, 1 of 16 heads" in str(work.report())
    angry = [templates.vocabulary()[w] for w in ("shouted", "stamped", "cursed")]
    assert torch.isin(out[:, -1], torch.tensor(angry)).float().mean() > 0.9
    assert moods(neutral)[1][:, 2].float().mean() < 0.6


def test_bad_input():
    data = feelings(2, 0)
    with pytest.raises(GossamerError, match="neurons is 600; the model has 512"):
        EmotionCircuits(target="joy", neurons=600).apply(templates.load(), data)
    with pytest.raises(GossamerError, match="heads"):
        EmotionCircuits(heads=-1)
    with pytest.raises(GossamerError, match="MLP of its own"):
        from tests.models.subjects import SUBJECTS

        labelled = SUBJECTS["steered language model"].data()
        EmotionCircuits().apply(tiny_model("qwen3_moe"), labelled)
