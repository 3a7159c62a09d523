"""What parameters of sparse training and tuning cannot be is refused in one line."""

import pytest
import torch
from torch import nn

from gossamer import methods
from gossamer.core import GossamerError
from gossamer.methods.training.architecture.masked import SparseLinear
from gossamer.methods.training.architecture.space import MixedOp
from gossamer.methods.training.dass import DASS
from gossamer.methods.training.imp import IMP
from gossamer.methods.training.rigl import RigL
from gossamer.methods.training.tickets.rounds import find_ticket
from gossamer.methods.tuning.pst import PST
from tests.models.tiny import tiny_model

BAD = [
    *((key, {"temperature": v}) for key in ("cast", "ast") for v in ("x", None, float("inf"), 0)),
    *(("random_search", {"trial_lr": v}) for v in ("x", None, 0.0)),
    *(
        ("pst", {name: v})
        for name in ("alpha1", "alpha2", "beta", "initial_warmup", "final_warmup", "head")
        for v in (3 if name == "head" else "x", None)
    ),
    *(("rigl", {"skip": v}) for v in (3, None, (3,))),
    ("snip", {"invert": "yes"}),
    ("gmp", {"keep_removed": 3}),
    ("gradient_flow", {"straight_through": "yes"}),
    ("rigl", {"pattern": "2:4", "allocation": "zz"}),
    ("rigl", {"until": True}),
]


@pytest.mark.parametrize(("key", "given"), BAD)
def test_refused_at_construction(key, given):
    name = list(given)[-1]
    with pytest.raises(GossamerError, match=name) as caught:
        methods.get(key)(**given)
    assert "\n" not in str(caught.value)


def test_names_to_skip_may_be_listed():
    assert RigL(skip=["a", "b"]) == RigL(skip=("a", "b")) == RigL(skip="a,b")


def test_a_rank_beyond_the_matrix():
    with pytest.raises(GossamerError, match="rank is 40, and .*give less"):
        PST(rank=40, steps=4).attach(tiny_model("llama"))


def test_what_is_no_search():
    for method, train in ((RigL(), print), (IMP(), 3)):
        with pytest.raises(GossamerError, match="find_ticket trains rounds of IMP"):
            find_ticket(method, nn.Linear(4, 4), train)
    for choices in ({"a": 3}, 3):
        with pytest.raises(GossamerError, match="a MixedOp's choices"):
            MixedOp(choices)
    with pytest.raises(GossamerError, match="architecture is 'sparse'"):
        DASS().apply(
            nn.Sequential(SparseLinear(4, 3), MixedOp({"a": nn.Identity})),
            (torch.zeros(8, 4), torch.zeros(8, dtype=torch.long)),
            architecture="sparse",
        )


def test_the_mask_of_an_unknown_layer():
    model = nn.Linear(4, 4)
    sparsifier = RigL().attach(model, torch.optim.SGD(model.parameters()))
    with pytest.raises(GossamerError, match="unknown layer 'zzz'"):
        sparsifier.mask("zzz")
