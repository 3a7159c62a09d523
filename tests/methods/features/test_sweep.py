import pytest
import torch

from gossamer.core import GossamerError
from gossamer.methods.features.rules import TopK
from gossamer.methods.features.source import ActivationSource
from gossamer.methods.features.sweep import Run, train_many
from gossamer.methods.features.training import Recipe, train
from gossamer.models import Tokens
from tests.models.tiny import tiny_model

FIRST, SECOND = "model.layers.0", "model.layers.1"
SMALL = {"windows": 2, "buffer": 64}


def tokens(windows=12):
    generator = torch.Generator().manual_seed(0)
    return Tokens.from_ids(torch.randint(3, 128, (windows, 20), generator=generator))


def recipe(steps=8, batch=16, seed=0):
    return Recipe(steps=steps, batch_size=batch, lr=1e-2, seed=seed)


def runs():
    return {
        "few": Run(path=FIRST, width=48, rule=TopK(2), recipe=recipe()),
        "many": Run(path=FIRST, width=64, rule=TopK(6), recipe=recipe(seed=1)),
        "longer": Run(path=SECOND, width=48, rule=TopK(4), recipe=recipe(steps=12, batch=24)),
        "through": Run(
            path=(f"{SECOND}.mlp:in", f"{SECOND}.mlp"),
            width=48,
            rule=TopK(4),
            recipe=recipe(steps=5),
            options={"sites": (32, 32)},
        ),
    }


@pytest.mark.parametrize("resident", [0, 1 << 28])
def test_each_is_what_training_it_alone_gives(resident):
    model, data = tiny_model("llama"), tokens()
    options = {**SMALL, "resident_bytes": resident}
    together = train_many(model, data, runs(), **options)
    for name, run in runs().items():
        source = ActivationSource(model, run.path, data, **options)
        alone = train(
            source.batches(run.recipe.batch_size),
            width=run.width,
            rule=run.rule,
            recipe=run.recipe,
            **(run.options or {}),
        )
        for key, wanted in alone.state_dict().items():
            assert torch.equal(together[name].state_dict()[key], wanted), (name, key)
    assert together["few"].metadata["hook_name"] == FIRST


@pytest.mark.parametrize("resident", [0, 1 << 28])
def test_the_model_runs_once_for_all(resident):
    model, data, calls = tiny_model("llama"), tokens(), []
    handle = model.model.layers[0].register_forward_pre_hook(lambda m, a: calls.append(1))
    try:
        train_many(model, data, runs(), **SMALL, resident_bytes=resident)
        shared = len(calls)
        calls.clear()
        for name, run in runs().items():
            train_many(model, data, {name: run}, **SMALL, resident_bytes=resident)
    finally:
        handle.remove()
    # Looking at the first rows is each source's own; everything else is shared.
    assert shared < 0.6 * len(calls)


def test_a_sweep_goes_on_where_it_stopped(tmp_path):
    model, data = tiny_model("llama"), tokens()
    options = {**SMALL, "resident_bytes": 0}
    whole = train_many(model, data, runs(), **options)

    class Stop(Exception):  # noqa: N818
        pass

    def stop(done, total, text):
        if done >= 22:
            raise Stop

    path = tmp_path / "sweep.safetensors"
    with pytest.raises(Stop):
        train_many(model, data, runs(), checkpoint=path, every=2, progress=stop, **options)
    assert path.exists()
    again = train_many(model, data, runs(), checkpoint=path, every=2, **options)
    for name, made in whole.items():
        for key, wanted in made.state_dict().items():
            assert torch.equal(again[name].state_dict()[key], wanted), (name, key)
    assert not path.exists()


def test_what_makes_no_sweep_is_refused():
    model, data = tiny_model("llama"), tokens()
    with pytest.raises(GossamerError, match="needs a run"):
        train_many(model, data, {})
    rule = TopK(2)
    both = {n: Run(path=FIRST, width=48, rule=rule, recipe=recipe()) for n in "ab"}
    with pytest.raises(GossamerError, match="one for each"):
        train_many(model, data, both)
    wrong = {"a": Run(path="model.layers.7", width=48, rule=TopK(2), recipe=recipe())}
    with pytest.raises(GossamerError, match=r"did you mean|it holds"):
        train_many(model, data, wrong)
