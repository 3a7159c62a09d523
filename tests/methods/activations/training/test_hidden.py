"""Hidden units: found on every architecture, watched over real tokens, penalised."""

import pytest
import torch

from gossamer.methods.activations.training.fatrelu import FATReLU
from gossamer.methods.activations.training.hidden import (
    HiddenPenalty,
    activation_functions,
    hidden_units,
    measure_activity,
    swapped,
    watching,
)
from gossamer.models import Tokens, find_sites
from tests.models.subjects import random_tokens
from tests.models.tiny import ARCHITECTURES, DECODERS, tiny_model


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_hidden_units_are_found(name):
    model = tiny_model(name)
    units = hidden_units(model)
    assert [unit.tap.block for unit in units] == [0, 1]
    functions = activation_functions(model, find_sites(model))
    assert {path for unit in units for path in unit.functions} == set(functions)
    assert not any("pooler" in path for path in functions)
    gated = name not in ("gpt2", "opt", "gpt_neox", "bert", "vit")
    assert all(unit.readers == unit.tap.size * (2 if gated else 1) for unit in units)


@pytest.mark.parametrize("name", DECODERS)
def test_padding_is_not_seen(name):
    model = tiny_model(name)
    ids = random_tokens(1).input_ids[:2]
    alone = measure_activity(model, Tokens.from_ids(ids[:, 4:]), tolerance=0.1)
    wide = ids.clone()
    wide[:, :4] = 0
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, :4] = False
    padded = measure_activity(model, Tokens(wide, mask), tolerance=0.1)
    for key, activity in alone.items():
        assert padded[key].nonzero == pytest.approx(activity.nonzero, abs=2e-3)


def test_counts_of_a_relu_model_are_those_of_its_activation():
    model = tiny_model("opt")
    seen = []
    hook = model.model.decoder.layers[1].activation_fn.register_forward_hook(
        lambda m, a, out: seen.append(out)
    )
    tokens = random_tokens()
    activity = measure_activity(model, tokens, batch_size=6)
    hook.remove()
    (out,) = seen
    rows = out.reshape(-1, out.shape[-1])
    share = activity["model.decoder.layers.1.fc2"]
    assert share.nonzero == pytest.approx(float((rows > 0).float().mean()))
    assert share.live == pytest.approx(float((rows > 0).any(0).float().mean()))


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_the_penalty_is_the_mean_over_layers_of_the_mean_over_rows(name):
    model = tiny_model(name)
    rows: dict[str, list[torch.Tensor]] = {}
    batch = {"input_ids": random_tokens().input_ids}
    with watching(model, lambda tap, x: rows.setdefault(tap.name, []).append(x.flatten(0, -2))):
        model(**batch)
    means = [torch.cat(x).double().abs().sum(1).mean() for x in rows.values()]
    with HiddenPenalty(model, lambda r: r.abs().sum(-1)) as penalty:
        model(**batch)
        first = penalty()
        # A pass that nobody asked about is forgotten with the next one.
        model(input_ids=batch["input_ids"][:1])
        model(**batch)
        value = penalty()
    assert float(value.detach()) == pytest.approx(
        float(torch.stack(means).mean().detach()), rel=1e-5
    )
    assert torch.equal(first, value)
    value.backward()
    weight = model.model.layers[0].input_layernorm.weight
    assert weight.grad is not None
    assert weight.grad.abs().sum() > 0
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_modules_are_swapped_and_come_back_after_an_error():
    model = tiny_model("llama")
    path = "model.layers.0.mlp.act_fn"
    before = model.get_submodule(path)
    with pytest.raises(RuntimeError), swapped(model, {path: FATReLU(0.1)}):
        assert isinstance(model.get_submodule(path), FATReLU)
        raise RuntimeError
    assert model.get_submodule(path) is before


def test_fatrelu_keeps_from_its_threshold_on():
    x = torch.tensor([-1.0, 0.0, 0.05, 0.1, 2.0, float("nan")])
    assert FATReLU(0.1)(x)[:5].tolist() == pytest.approx([0, 0, 0, 0.1, 2.0])
    assert FATReLU(0.1)(x)[5].isnan()
    assert FATReLU()(x)[:5].tolist() == pytest.approx([0, 0, 0.05, 0.1, 2.0])
