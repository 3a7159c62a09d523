"""Any loop: the model stays frozen, few parameters train, stopping and folding are exact."""

import copy

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from gossamer.core import GossamerError
from gossamer.methods.tuning.pst import PST
from gossamer.methods.weights.magnitude import Magnitude
from gossamer.models import Inputs, find_sites
from tests.models.subjects import random_tokens
from tests.models.tiny import tiny_model

METHOD = PST(sparsity=0.75, steps=8, rank=2, score_rank=2)


def classifier():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_labels=3,
    )
    return BertForSequenceClassification(config).eval()


def batch(step):
    ids = random_tokens(step).input_ids[:2]
    return {"input_ids": ids, "labels": ids}


def optimizer_of(tuner):
    return torch.optim.AdamW(tuner.parameters(), lr=1e-2)


def run(model, tuner, optimizer, steps):
    for step in steps:
        model(**batch(step)).loss.backward()
        optimizer.step()
        tuner.step()
        optimizer.zero_grad()


def trained(model, method=METHOD, **values):
    tuner = method.attach(model, **values)
    run(model, tuner, optimizer_of(tuner), range(method.steps))
    return tuner


@torch.no_grad()
def logits(model, seed=50):
    return model(input_ids=random_tokens(seed).input_ids[:2]).logits


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "mixtral"])
def test_the_model_itself_stays_frozen_and_folding_keeps_every_logit(name):
    model = tiny_model(name)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    tuner = trained(model)
    now = model.state_dict()
    assert all(torch.equal(now[k], v) for k, v in before.items())
    assert {k.rpartition(".")[2] for k in set(now) - set(before)} == set("uvab") | {"row", "column"}
    expected = logits(model)
    work = tuner.finish()
    assert torch.allclose(logits(model), expected, atol=1e-5, rtol=0)
    assert model.state_dict().keys() == before.keys()
    assert not any("forward" in vars(module) for module in model.modules())
    for site_name, site in work.sites.items():
        zeros = int((site.weight(model) == 0).sum())
        assert zeros == site.size - round(0.25 * site.size), site_name
    others = {k: v for k, v in before.items() if k.removesuffix(".weight") not in work.sites}
    assert others
    assert all(torch.equal(model.state_dict()[k], v) for k, v in others.items())


def test_tied_embeddings_and_head_are_untouched():
    model = tiny_model("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    before = model.lm_head.weight.clone()
    trained(model).finish()
    assert model.lm_head.weight is model.transformer.wte.weight
    assert torch.equal(model.lm_head.weight, before)


def test_only_what_the_tuner_names_wants_gradients():
    model = tiny_model("llama")
    wanted = [p.requires_grad for p in model.parameters()]
    tuner = METHOD.attach(model)
    named = {id(p) for p in tuner.parameters()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == named
    sides = sum(sum(site.shape) for site in tuner.sites.values())
    assert tuner.trainable == sum(p.numel() for p in tuner.parameters()) == (2 + 2 + 1) * sides
    tuner.remove()
    assert [p.requires_grad for p in model.parameters()] == wanted


def test_sparsity_follows_the_schedule_from_update_to_update():
    model = tiny_model("llama")
    method = PST(sparsity=0.75, steps=10, rank=1, score_rank=1)
    tuner = method.attach(model)
    optimizer = optimizer_of(tuner)
    found = []
    for step in range(10):
        run(model, tuner, optimizer, [step])
        found.append(tuner.sparsity)
    wanted = [0.75 - 0.75 * (1 - min(1, max(0, t - 1) / 6)) ** 3 for t in range(1, 11)]
    assert found == pytest.approx(wanted, abs=1e-3)
    assert found[0] == 0
    assert found[6:] == pytest.approx([0.75] * 4, abs=1e-9)


def test_masks_are_chosen_only_where_it_is_time():
    model = tiny_model("llama")
    tuner = METHOD.lasting(7).attach(model)
    tuner.method = PST(**{**vars(METHOD), "steps": 7, "every": 3})
    assert [tuner.step() for _ in range(7)] == [False, False, True, False, False, True, True]


def test_resuming_mid_schedule_is_bit_exact():
    straight = tiny_model("llama")
    whole = trained(straight)

    first = tiny_model("llama")
    half = METHOD.attach(first)
    optimizer = optimizer_of(half)
    run(first, half, optimizer, range(5))
    saved = copy.deepcopy((half.state_dict(), optimizer.state_dict()))

    again = tiny_model("llama")
    rest = METHOD.attach(again, state=saved[0])
    optimizer = optimizer_of(rest)
    optimizer.load_state_dict(saved[1])
    assert rest.updates == 5
    run(again, rest, optimizer, range(5, 8))
    for name, adapter in whole.adapters.items():
        assert torch.equal(adapter.mask, rest.adapters[name].mask)
    for a, b in zip(whole.parameters(), rest.parameters(), strict=True):
        assert torch.equal(a, b)
    whole.finish()
    rest.finish()
    for a, b in zip(straight.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_accumulated_gradients_are_those_of_the_whole_batch():
    found = []
    for parts in (1, 2):
        model = tiny_model("llama")
        tuner = METHOD.attach(model)
        optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
        for step in range(4):
            rows = batch(step)
            for at in range(parts):
                part = {k: v[at::parts] for k, v in rows.items()}
                (model(**part).loss / parts).backward()
            optimizer.step()
            tuner.step()
            optimizer.zero_grad()
        found.append([p.detach().clone() for p in tuner.parameters()])
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_a_deep_copy_trains_by_itself():
    model = tiny_model("llama")
    tuner = METHOD.attach(model)
    twin = copy.deepcopy(model)
    expected = logits(twin)
    run(model, tuner, optimizer_of(tuner), range(2))
    assert torch.equal(logits(twin), expected)
    assert not torch.equal(logits(model), expected)


def test_a_classifier_trains_with_its_head_and_is_put_back():
    model = classifier()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    ids = torch.cat([random_tokens(seed).input_ids for seed in range(4)])
    labels = torch.arange(len(ids)) % 3
    ids[:, ::3] = 20 + labels[:, None]
    data = Inputs({"input_ids": ids, "labels": labels})
    method = PST(sparsity=0.5, steps=40, rank=4, score_rank=4, lr=1e-2, head="classifier")
    work = method.apply(model, data)
    with torch.no_grad():
        found = model(input_ids=ids).logits.argmax(1)
    assert (found == labels).float().mean() > 0.9
    assert not torch.equal(model.classifier.weight, before["classifier.weight"])
    assert "classifier among them" in str(work.report())
    work.restore()
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())


def test_half_precision_folds_to_what_ran():
    model = tiny_model("llama").bfloat16()
    frozen = model.model.layers[0].mlp.up_proj.weight.clone()
    work = METHOD.apply(model, random_tokens(), fold=False)
    assert work.tuner.parameters()[0].dtype == torch.float32
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, frozen)
    expected = logits(model)
    work.fold()
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert torch.equal(logits(model), expected)


def test_unusable_models_are_refused_and_left_alone():
    model = tiny_model("llama")
    keys = set(model.state_dict())
    cases = [
        (PST(pattern="5:7", steps=4), {}, "input width divisible by 7"),
        (PST(steps=4, head="clasifier"), {}, "unknown head 'clasifier'"),
        (PST(steps=4, roles="experts"), {}, "no single matrix has the roles experts"),
        (METHOD, {"state": {"method": {"method": "pst"}}}, "state is of another tuning"),
    ]
    for method, given, message in cases:
        with pytest.raises(GossamerError, match=message):
            method.attach(model, **given)
        assert set(model.state_dict()) == keys
        assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(GossamerError, match="shares a weight with transformer.wte"):
        PST(steps=4, head="lm_head").attach(tiny_model("gpt2"))
    first = METHOD.attach(model)
    with pytest.raises(GossamerError, match="is already tuned"):
        METHOD.attach(model)
    # The first tuner is not harmed by the second's failure.
    assert set(find_sites(model).sites) == set(first.sites.values())
    run(model, first, optimizer_of(first), range(1))
    first.remove()
    pruned = Magnitude(sparsity=0.5).apply(model)
    with pytest.raises(GossamerError, match="magnitude holds weights"):
        METHOD.attach(model)
    pruned.restore()
    METHOD.attach(model).remove()


def test_a_state_of_another_model_is_refused():
    model = tiny_model("llama")
    tuner = METHOD.attach(model)
    state = tuner.state_dict()
    stranger = {**state, "tensors": {"model.layers.9.mlp.up_proj:u": torch.zeros(1)}}
    with pytest.raises(GossamerError, match="names model.layers.9.mlp.up_proj"):
        tuner.load_state_dict(stranger)
    missing = {k: v for k, v in state["tensors"].items() if not k.endswith("up_proj:u")}
    with pytest.raises(GossamerError, match="do not fit this method \\(u\\)"):
        tuner.load_state_dict({**state, "tensors": missing})


def test_the_report_says_what_trained_and_what_was_held():
    model = tiny_model("llama")
    size = sum(p.numel() for p in model.parameters())
    tuner = METHOD.attach(model, undo=True)
    run(model, tuner, optimizer_of(tuner), range(3))
    work = tuner.finish()
    text = str(work.report())
    tuned = sum(site.size for site in work.sites.values())
    assert f"{work.trained:,} parameters trained: {work.trained / size:.2%} of the model's" in text
    assert f"masks {tuned:,} bytes" in text
    assert f"to undo what is folded, {4 * tuned:,} bytes" in text
    assert "training ended at update 3 of 8" in text
    assert work.report().all_size == size
    assert isinstance(model.model.layers[0].mlp.up_proj, nn.Linear)


def test_what_is_no_state_of_a_tuning_or_no_model():
    state = METHOD.attach(tiny_model("llama")).state_dict()
    worse = {**state["tensors"], next(iter(state["tensors"])): "x"}
    for given, match in (
        (3, "no dict"),
        ({}, "its method is missing"),
        ({"a": 1}, "this is no state of a tuning"),
        (tiny_model("llama").state_dict(), "this is no state of a tuning"),
        ({**state, "updates": -1}, "of update -1"),
        ({**state, "updates": "x"}, "its updates is a str"),
        ({**state, "tensors": 3}, "its tensors is a int"),
        ({**state, "tensors": {}}, "do not fit"),
        ({**state, "tensors": worse}, "the state is damaged"),
    ):
        with pytest.raises(GossamerError, match=match) as caught:
            METHOD.attach(tiny_model("llama"), state=given)
        assert "\n" not in str(caught.value)
    for model in (None, "nano"):
        with pytest.raises(GossamerError, match="the model is .* give a transformers model"):
            METHOD.attach(model)
