import pytest
import torch

from gossamer.core import GossamerError
from gossamer.methods.features.interp.intervention import find_strength, intervention, pushed
from gossamer.methods.features.interp.judges import WordJudge
from tests.models.tiny import tiny_model

HOOK = "model.layers.1"
IDS = torch.randint(3, 100, (8, 6), generator=torch.Generator().manual_seed(0))


def direction(seed):
    made = torch.randn(32, generator=torch.Generator().manual_seed(seed))
    return made / made.norm()


@torch.no_grad()
def logs(model):
    return model(input_ids=IDS).logits[:, -1].double().log_softmax(-1)


@pytest.mark.parametrize("target", [0.05, 0.5])
@pytest.mark.parametrize("start", [0.01, 1.0, 300.0])
def test_the_strength_reaches_the_target(target, start):
    model = tiny_model("llama")
    found = find_strength(model, IDS, HOOK, direction(1), target=target, start=start, most=20)
    assert found.hit
    clean = logs(model)
    with pushed(model, HOOK, direction(1), found.value):
        moved = logs(model)
    kl = float((clean.exp() * (clean - moved)).sum(-1).mean())
    assert kl == pytest.approx(target, rel=0.1)
    assert kl == pytest.approx(found.kl)
    assert torch.equal(logs(model), clean)


def test_what_cannot_be_reached_says_so():
    found = find_strength(tiny_model("llama"), IDS, HOOK, torch.zeros(32), most=3)
    assert (found.hit, found.steps) == (False, 3)
    with pytest.raises(GossamerError, match="target"):
        find_strength(tiny_model("llama"), IDS, HOOK, direction(1), target=0)


def test_a_push_is_undone_after_an_error():
    model = tiny_model("llama")
    clean = logs(model)
    with pytest.raises(KeyError), pushed(model, HOOK, direction(1), 9.0):
        raise KeyError
    assert torch.equal(logs(model), clean)


def test_words_pushed_for_are_less_surprising_than_others():
    model = tiny_model("llama")
    rows = model.get_output_embeddings().weight.detach()
    towards = rows[[40, 41]].mean(0)
    towards = towards / towards.norm()

    def score(told):
        return intervention(
            WordJudge(), told, model, IDS, HOOK, towards, lambda i: f" w{i}", target=5.0
        )

    assert score("w40, w41") > 0.5
    assert score("w998, w999") == pytest.approx(0, abs=0.2)
