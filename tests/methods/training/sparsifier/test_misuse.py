"""What a loop of one's own can get wrong when it attaches: one line, and nothing is touched."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from gossamer.core import GossamerError
from gossamer.methods.training.ast import AST
from gossamer.methods.training.cast import CAST
from gossamer.methods.training.g2gnet import G2GNet
from gossamer.methods.training.gmp import GMP
from gossamer.methods.training.gradient_flow import GradientFlow
from gossamer.methods.training.granet import GraNet
from gossamer.methods.training.imp import IMP
from gossamer.methods.training.random_search import RandomSearch
from gossamer.methods.training.rigl import RigL
from gossamer.methods.training.set import SET
from gossamer.methods.training.sparse_pretraining import SparsePretraining
from gossamer.methods.training.sr_ste import SRSTE
from tests.models.subjects import random_tokens
from tests.models.tiny import tiny_model


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def train(model, optimizer, sparsifier, steps):
    for _ in range(steps):
        cross_entropy(model(torch.ones(2, 8)), torch.tensor([0, 1])).backward()
        optimizer.step()
        sparsifier.step()
        optimizer.zero_grad()


def one_line(caught):
    text = str(caught.value)
    assert "\n" not in text
    return text


class TestTeacher:
    def refused(self, model, teacher, match, method=CAST):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        with pytest.raises(GossamerError, match=match) as caught:
            method(steps=6).attach(model, adamw(model), teacher=teacher)
        one_line(caught)
        assert all(p.requires_grad for p in model.parameters())
        assert all(module.training for module in model.modules())
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())

    def test_the_model_itself(self):
        model = tiny_model("llama").train()
        self.refused(model, model, "the teacher is the model itself")

    def test_shared_weights(self):
        model = tiny_model("llama").train()
        self.refused(model, copy.copy(model), "shares model.embed_tokens.weight")
        views = copy.deepcopy(model)
        for ours, theirs in zip(model.parameters(), views.parameters(), strict=True):
            theirs.data = ours.data
        self.refused(model, views, "shares", AST)

    def test_another_vocabulary_or_no_module(self):
        model = tiny_model("llama").train()
        other = copy.deepcopy(model)
        other.config.vocab_size += 1
        self.refused(model, other, "vocabulary of")
        self.refused(model, "nano", "the teacher is 'nano', a str")

    @pytest.mark.parametrize("teacher", [nn.Linear(3, 3), tiny_model("mistral")])
    def test_what_only_a_forward_pass_can_tell(self, teacher):
        model, ids = tiny_model("llama").train(), random_tokens().input_ids[:2]
        if not isinstance(teacher, nn.Linear):
            teacher.lm_head = nn.Linear(teacher.config.hidden_size, 3)
        sparsifier = CAST(steps=6).attach(model, adamw(model), teacher=teacher)
        with pytest.raises(GossamerError, match="the teacher.*give the dense model") as caught:
            model(input_ids=ids, labels=ids)
        one_line(caught)
        sparsifier.remove()
        assert all(p.requires_grad for p in teacher.parameters())

    @pytest.mark.parametrize("end", ["finish", "remove", "failure"])
    def test_modes_and_flags_are_put_back(self, end):
        model = tiny_model("llama").train()
        teacher = copy.deepcopy(model)
        teacher.model.layers[0].eval()
        frozen = teacher.lm_head.weight.requires_grad_(False)
        if end == "failure":
            with pytest.raises(GossamerError):
                CAST(steps=2).attach(model, adamw(model), teacher=teacher, state={})
        else:
            sparsifier = CAST(steps=2).attach(model, adamw(model), teacher=teacher)
            assert not teacher.training
            assert not any(p.requires_grad for p in teacher.parameters())
            getattr(sparsifier, end)()
        assert teacher.training
        assert not teacher.model.layers[0].mlp.training
        assert not frozen.requires_grad
        assert all(p.requires_grad for p in teacher.parameters() if p is not frozen)


KINDS = {
    "rigl": RigL(sparsity=0.5, steps=6, every=2),
    "gmp": GMP(sparsity=0.5, steps=6, every=2, keep_removed=True),
    "imp": IMP(sparsity=0.5, steps=6),
    "sr_ste": SRSTE(steps=6),
    "gradient_flow": GradientFlow(steps=6),
    "g2gnet": G2GNet(sparsity=0.5, steps=6, every=2, watch=2, groups=2),
    "ast": AST(steps=6, distill=0.0),
    "cast": CAST(steps=6, distill=0.0),
    "sparse_pretraining": SparsePretraining(sparsity=0.5, steps=6, every=1),
    "random_search": RandomSearch(sparsity=0.5, steps=6, draws=2),
}


def trained(method, steps=2):
    model = net()
    optimizer = adamw(model)
    loss = {"loss": lambda m: m(torch.ones(2, 8)).square().mean()}
    given = loss if isinstance(method, RandomSearch) else {}
    sparsifier = method.attach(model, optimizer, **given)
    train(model, optimizer, sparsifier, steps)
    return model, optimizer, sparsifier


@pytest.mark.parametrize("key", KINDS)
class TestState:
    def refused(self, key, state, match):
        model = net()
        before = copy.deepcopy(model.state_dict())
        optimizer = adamw(model)
        with pytest.raises(GossamerError, match=match) as caught:
            KINDS[key].attach(model, optimizer, state=state)
        one_line(caught)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        # Nothing holds the model: another may attach.
        RigL(steps=2).attach(model, optimizer).remove()

    def test_foreign(self, key):
        model, optimizer, _ = trained(KINDS[key])
        for state in (3, [], {}, {"a": 1}, model.state_dict(), optimizer.state_dict()):
            self.refused(key, state, "this is no state of a sparse training")
        other = KINDS["rigl" if key != "rigl" else "imp"]
        self.refused(key, trained(other)[2].state_dict(), "of another training .method")

    def test_malformed(self, key):
        state = trained(KINDS[key])[2].state_dict()
        for part, value in state.items():
            rest = {name: one for name, one in state.items() if name != part}
            if part == "point":
                continue
            self.refused(key, rest, f"its {part} is missing")
            wrong = "x" if not isinstance(value, str) else 3
            self.refused(key, {**state, part: wrong}, f"its {part} is a")
        for updates in (-1, 7, True):
            self.refused(key, {**state, "updates": updates}, "update")
        masks = {**state["masks"], "0.weight": 3}
        self.refused(key, {**state, "masks": masks}, "packed mask of 0.weight")
        self.refused(key, {**state, "masks": {"a": 1}}, "does not fit the model's layers")
        self.refused(key, {**state, "flops": {}}, "its updates is missing")

    def test_damaged(self, key):
        state = trained(KINDS[key])[2].state_dict()
        if not state["removed"]:
            return
        self.refused(key, {**state, "removed": {}}, "the state is damaged")
        first = next(iter(state["removed"]))
        worse = {**state["removed"], first: "x"}
        self.refused(key, {**state, "removed": worse}, "the state is damaged")


def test_a_training_beyond_its_steps_goes_on():
    _, _, sparsifier = trained(KINDS["rigl"], steps=8)
    model = net()
    again = KINDS["rigl"].attach(model, adamw(model), state=sparsifier.state_dict())
    assert again.updates == 8


class TestOneAtATime:
    def test_a_second_one_is_refused_until_the_first_ends(self):
        model, optimizer, first = trained(KINDS["rigl"])
        for end in ("remove", "finish"):
            weights = copy.deepcopy(model.state_dict())
            with pytest.raises(
                GossamerError, match="rigl is attached to this Sequential"
            ) as caught:
                GMP(steps=2).attach(model, adamw(model))
            one_line(caught)
            assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
            getattr(first, end)()
            first = KINDS["rigl"].attach(model, optimizer)
        other = net()
        optimizer.add_param_group({"params": list(other.parameters())})
        with pytest.raises(GossamerError, match="rigl is attached to this AdamW"):
            GMP(steps=2).attach(other, optimizer)
        first.remove()
        GMP(steps=2).attach(other, optimizer).remove()

    def test_a_failed_one_holds_nothing(self):
        model = net()
        optimizer = adamw(model)
        with pytest.raises(GossamerError, match="loss="):
            RandomSearch(steps=2).attach(model, optimizer)
        assert not optimizer._optimizer_step_pre_hooks
        RigL(steps=2).attach(model, optimizer).remove()


@pytest.mark.parametrize("model", [None, "nano", RigL])
@pytest.mark.parametrize("undo", [False, True])
@pytest.mark.parametrize("method", [RigL(), IMP(), CAST()])
def test_what_is_no_model(method, model, undo):
    with pytest.raises(GossamerError, match="the model is .* give a torch.nn.Module") as caught:
        method.attach(model, adamw(net()), undo=undo)
    one_line(caught)


@pytest.mark.parametrize(
    ("masters", "match"),
    [
        (3, "masters is 3"),
        ({"0.weight": 3}, "the master of 0.weight is 3"),
        ({"zz": torch.zeros(16, 8)}, "no parameter in masters|unknown parameter in masters"),
    ],
)
def test_masters(masters, match):
    model = net()
    with pytest.raises(GossamerError, match=match) as caught:
        RigL(steps=2).attach(model, adamw(model), masters=masters)
    one_line(caught)


class TestSchedule:
    @pytest.mark.parametrize(
        "method",
        [
            RigL(steps=6),
            RigL(steps=6, every=2, until=0.1),
            SET(steps=6, every=6),
            GraNet(steps=6, sparsity=0.5, initial=0.5),
            G2GNet(steps=6, sparsity=0.5, groups=2),
            SRSTE(steps=6, every=7),
        ],
    )
    def test_no_update_changes_the_masks(self, method):
        _, _, sparsifier = trained(method, steps=6)
        assert any("no update of 6 steps changes" in text for text in sparsifier.warnings)
        (text,) = sparsifier.finish().report().warnings
        assert f"every is {method.every}" in text

    @pytest.mark.parametrize(
        "method",
        [
            RigL(steps=6, every=2),
            RigL(steps=6, every=100, exchange=0.0),
            SET(steps=6, every=3),
            G2GNet(steps=6, sparsity=0.5, groups=2, exchange=0.0),
            SRSTE(steps=6),
            IMP(sparsity=0.0, steps=6),
        ],
    )
    def test_silent_where_masks_move_or_are_kept_on_purpose(self, method):
        assert not trained(method, steps=6)[2].finish().report().warnings

    def test_in_apply(self):
        work = RigL(steps=2, batch_size=2).apply(tiny_model("llama"), random_tokens())
        assert any("every is 100" in text for text in work.report().warnings)

    def test_a_schedule_without_length(self):
        with pytest.raises(GossamerError, match="before it starts"):
            RigL(until=0.0)

    def test_pruning_once_is_noted(self):
        for every, noted in ((100, True), (1, False)):
            work = trained(GMP(steps=6, sparsity=0.5, every=every), steps=6)[2].finish()
            assert any("weights were due once" in text for text in work.report().notes) == noted

    def test_uniform_patterns_are_noted(self):
        for method, noted in (
            (RigL(steps=6, every=2, pattern="2:4", allocation="erk"), True),
            (RigL(steps=6, every=2, pattern="2:4", sparsity=0.5), False),
        ):
            work = trained(method, steps=6)[2].finish()
            assert any("2:4 in every layer" in text for text in work.report().notes) == noted
