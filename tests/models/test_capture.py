"""The recording hands blocks exactly what a model prepared, whatever shape that has."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from gossamer.core import UnsupportedModel
from gossamer.models import Tokens, find_sites
from gossamer.models.capture import evaluating, hidden_of, record
from gossamer.models.spool import Spool
from tests.models.tiny import tiny_model


class Block(nn.Module):
    """Attention in name only; takes the hidden states by keyword and returns a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.ModuleDict({"q_proj": nn.Linear(8, 8), "o_proj": nn.Linear(8, 8)})

    def forward(self, *, scale: dict[str, Tensor], hidden_states: Tensor) -> tuple[Tensor, str]:
        x = self.attention["q_proj"](hidden_states) * scale["by"][0]
        return hidden_states + self.attention["o_proj"](x), "extra"


class Model(nn.Module):
    """Runs its blocks in a given order."""

    def __init__(self, order: list[int]) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.layers = nn.ModuleList([Block() for _ in range(3)])
        self.config = SimpleNamespace()
        self.order = order

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.embed(input_ids)
        for index in self.order:
            scale = {"by": torch.tensor([1.5 + index])}
            hidden, extra = self.layers[index](scale=scale, hidden_states=hidden)
            assert extra == "extra"
        return hidden


def tokens() -> Tokens:
    return Tokens.from_ids(torch.arange(12).view(3, 4))


def test_tuples_keywords_and_nested_arguments() -> None:
    torch.manual_seed(0)
    model, data = Model([0, 1, 2]), tokens()
    with Spool() as spool, torch.no_grad():
        tape = record(model, find_sites(model), data, 2, spool)
        assert len(tape) == 2
        for batch, inputs in enumerate(data.batches(2)):
            hidden = spool.read(tape.hidden[batch])
            assert torch.equal(hidden, model.embed(inputs["input_ids"]))
            for index, block in enumerate(model.layers):
                hidden = hidden_of(tape.call(batch, index, block, hidden))
            assert torch.equal(hidden, model(**inputs))


@pytest.mark.parametrize(
    ("order", "words"),
    [
        ([0, 2], "runs block 2 where block 1 was expected"),
        ([0, 0], "runs block 0 where block 1"),
        ([0, 1], "ran 2 of its 3 blocks"),
    ],
)
def test_blocks_must_run_once_and_in_order(order: list[int], words: str) -> None:
    model = Model(order)
    with Spool() as spool, pytest.raises(UnsupportedModel, match=words):
        record(model, find_sites(model), tokens(), 2, spool)
    assert all("forward" not in vars(block) for block in model.layers)


def test_arguments_shared_by_blocks_and_batches_are_stored_once() -> None:
    model = tiny_model("llama")
    sizes = []
    for rows in (2, 8):
        ids = torch.randint(3, 128, (rows, 16))
        with Spool() as spool:
            record(model, find_sites(model), Tokens.from_ids(ids), 2, spool)
            sizes.append(spool.nbytes - rows * 16 * 32 * 4)
    # Rotary tables and positions, once, however many batches.
    assert sizes[0] == sizes[1] == 16 * (8 + 8) * 4 + 16 * 8


def test_nothing_of_the_head_runs() -> None:
    model = tiny_model("llama")
    model.lm_head.register_forward_hook(lambda *_: pytest.fail("the head ran"))
    model.model.norm.register_forward_hook(lambda *_: pytest.fail("the last norm ran"))
    with Spool() as spool:
        record(model, find_sites(model), Tokens.from_ids(torch.ones(1, 4).long()), 2, spool)


def test_evaluating_puts_every_mode_back() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout(), nn.ReLU()))
    model[1].eval()

    def interrupted() -> None:
        with evaluating(model):
            assert not any(module.training for module in model.modules())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [m.training for m in model.modules()] == [True, True, False, False, False]
