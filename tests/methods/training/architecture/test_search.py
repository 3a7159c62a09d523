"""The search: who learns from which samples, at which sparsity, and what restarts."""

import pytest
import torch
from torch import nn

from gossamer.core import GossamerError
from gossamer.methods.training.architecture.masked import masked_layers
from gossamer.methods.training.architecture.search import (
    SearchPlan,
    Trainer,
    batches,
    parted,
    search,
    train_found,
)
from gossamer.methods.training.architecture.space import linear_space, mixed_ops

PLAN = SearchPlan(
    sparsity=0.75,
    search="sparse",
    pretrain=3,
    learn=3,
    tune=3,
    batch_size=8,
    lr=0.01,
    score_lr=0.03,
    alpha_lr=0.05,
    validation=0.5,
    seed=0,
)


def data(seed=0, count=32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 6, generator=generator), torch.randint(
        0, 3, (count,), generator=generator
    )


def space():
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return linear_space(6, 3, width=8, nodes=1)


def planned(**values):
    return SearchPlan(**{**vars(PLAN), **values})


@pytest.mark.parametrize("share", [0.1, 0.5, 0.8])
def test_the_parts_are_disjoint_and_all(share):
    train, held = parted(33, share, 0)
    assert len(held) == round(share * 33)
    assert sorted([*train.tolist(), *held.tolist()]) == list(range(33))


class Recorder:
    """Notes what each part of a network learned from: rows carry their own number."""

    def __init__(self, trainer):
        self.rows = {"alpha": set(), "weights": set(), "scores": set()}
        self.trainer = trainer
        update = trainer.update

        def noted(optimizer, batch):
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            kinds = {
                "alpha": {id(p) for p in trainer.alphas},
                "weights": {id(p) for p in trainer.weights},
                "scores": {id(p) for p in trainer.scores},
            }
            (kind,) = [k for k, ids in kinds.items() if held <= ids]
            self.rows[kind] |= set(batch[0][:, 0].tolist())
            return update(optimizer, batch)

        trainer.update = noted


def test_the_architecture_learns_from_held_out_samples_only_and_nothing_else_does():
    x, y = data()
    x[:, 0] = torch.arange(32.0)
    train, held = parted(32, 0.5, 0)
    net = space()
    trainer = Trainer(net, PLAN)
    recorder = Recorder(trainer)
    made = [
        batches((x[rows], y[rows]), 8, torch.Generator().manual_seed(0)) for rows in (train, held)
    ]
    trainer.phases(*made)
    assert recorder.rows["alpha"] == set(held.float().tolist())
    assert recorder.rows["weights"] == set(train.float().tolist())
    assert recorder.rows["scores"] <= set(train.float().tolist())
    assert recorder.rows["scores"]


def parts(net):
    alphas = {id(place.alpha) for place in mixed_ops(net).values()}
    scores = {id(layer.scores) for layer in masked_layers(net).values()}
    named = {n: p.detach().clone() for n, p in net.named_parameters()}
    of = {n: "alpha" if id(p) in alphas else "scores" if id(p) in scores else "weights"
          for n, p in net.named_parameters()}  # fmt: skip
    return named, of


@pytest.mark.parametrize("what", ["alpha", "weights", "scores"])
def test_an_update_changes_nothing_but_what_it_is_of(what):
    net = space()
    trainer = Trainer(net, PLAN)
    trainer.enter("learning")
    before, of = parts(net)
    x, y = data()
    if what == "alpha":
        trainer.decide((x, y))
    else:
        params = getattr(trainer, what)
        trainer.update(torch.optim.SGD(params, lr=0.5), (x, y))
    after, _ = parts(net)
    moved = {of[n] for n in before if not torch.equal(before[n], after[n])}
    assert moved == {what}
    assert all(p.grad is None for p in net.parameters())


def test_masks_are_at_the_target_sparsity_from_the_first_to_the_last():
    net = space()
    for layer in masked_layers(net).values():
        layer.sparsity = 0.75
    trainer = Trainer(net, PLAN)
    seen = []
    update = trainer.update

    def noted(optimizer, batch):
        for layer in masked_layers(net).values():
            seen.append((layer.phase, float((layer.shown() == 0).double().mean())))
        return update(optimizer, batch)

    trainer.update = noted
    source = batches(data(), 8, torch.Generator().manual_seed(0))
    trainer.phases(source, source)
    shares = {phase: {share for p, share in seen if p == phase} for phase, _ in seen}
    assert shares == {"dense": {0.0}, "learning": {0.75}, "fixed": {0.75}}


def test_weights_do_not_see_held_out_samples_at_all():
    x, y = data()
    train, held = parted(32, 0.5, 0)
    trained = []
    for corrupt in (False, True):
        inputs, labels = x.clone(), y.clone()
        if corrupt:
            inputs[held], labels[held] = -5 * inputs[held], 2 - labels[held]
        net = space()
        # An architecture that hardly moves leaves training samples as the only difference.
        trainer = Trainer(net, planned(alpha_lr=1e-12))
        made = [
            batches((inputs[rows], labels[rows]), 8, torch.Generator().manual_seed(0))
            for rows in (train, held)
        ]
        trainer.phases(*made)
        trained.append(torch.cat([p.detach().flatten() for p in trainer.weights]))
    assert torch.allclose(*trained, atol=1e-6)


@pytest.mark.parametrize("objective", ["sparse", "dense", "random"])
def test_a_search_is_seeded_and_leaves_the_space_alone(objective):
    made = space()
    before = {n: t.clone() for n, t in made.state_dict().items()}
    plan = planned(search=objective)
    first, again = (search(made, data(), plan) for _ in range(2))
    assert first == again
    assert set(first.architecture) == set(mixed_ops(made))
    assert all(torch.equal(before[n], t) for n, t in made.state_dict().items())
    if objective != "random":
        assert first.updates == 9
        assert first.decisions == 6
        other = search(made, data(), planned(search=objective, seed=1))
        assert other.chances != first.chances


def test_what_was_found_is_trained_from_scratch_at_the_target_sparsity():
    made = space()
    architecture = dict.fromkeys(mixed_ops(made), "linear")
    net = train_found(made, architecture, data(), PLAN)
    again = train_found(space(), architecture, data(), PLAN)
    for layer, other in zip(
        masked_layers(net).values(), masked_layers(again).values(), strict=True
    ):
        assert layer.phase == "fixed"
        assert float((layer.shown() == 0).double().mean()) == 0.75
        assert torch.equal(layer.shown(), other.shown())
    assert len(masked_layers(net)) == 3


def test_divergence_and_too_few_samples_are_said():
    with pytest.raises(GossamerError, match=r"validation 0.5 of 1 samples leaves a part empty"):
        search(space(), data(count=1), PLAN)
    x, y = data()
    with pytest.raises(GossamerError, match=r"the loss is (inf|nan); lower lr"):
        search(space(), (x * 1e30, y), planned(lr=1e30, pretrain=20))


def test_progress_is_told():
    told = []
    search(space(), data(), PLAN, lambda done, total, what: told.append((done, total, what)))
    assert [(done, total) for done, total, _ in told] == [(i, 9) for i in range(1, 10)]
    assert all("searching, loss" in what for _, _, what in told)


def test_modules_without_weights_are_no_obstacle():
    net = nn.Sequential(space(), nn.Identity())
    assert search(net, data(), PLAN).architecture.keys() == mixed_ops(net).keys()
