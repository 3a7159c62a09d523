from math import exp, inf, isnan

import pytest
import torch
from torch import Tensor, nn

from gossamer.core import GossamerError
from gossamer.evaluate import forward as forward_module
from gossamer.evaluate import score
from gossamer.models import Tokens
from tests.models.tiny import tiny_model


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny_model("llama")


def text(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(128, (rows, length), generator=torch.Generator().manual_seed(seed))


def full(ids: Tensor) -> Tokens:
    return Tokens(ids, torch.ones_like(ids, dtype=torch.bool))


def nats(model: nn.Module, ids: Tensor) -> Tensor:
    """Loss of tokens 1.. of one text, alone and unpadded, in fp64."""
    with torch.no_grad():
        logits = model(input_ids=ids[None]).logits[0].double()
    log_probs = logits.log_softmax(-1)
    return -log_probs[torch.arange(len(ids) - 1), ids[1:]]


def test_equals_the_direct_calculation(model: nn.Module):
    ids = text(3, 20)
    result = score(model, full(ids))
    wanted = torch.cat([nats(model, row) for row in ids])
    assert result.loss == pytest.approx(float(wanted.mean()), abs=1e-5)
    assert result.perplexity == pytest.approx(exp(result.loss))
    assert (result.tokens, result.context, result.stride) == (57, 20, 20)
    assert result.kl is None
    assert result.agreement is None


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "mixtral"])
def test_other_architectures(name: str):
    other, ids = tiny_model(name), text(2, 12)
    wanted = torch.cat([nats(other, row) for row in ids])
    assert score(other, full(ids)).loss == pytest.approx(float(wanted.mean()), abs=1e-5)


def test_sliding_gives_each_token_its_window(model: nn.Module):
    ids = text(2, 8)
    line = ids.flatten()
    # Windows of 8 at 0, 3, 6, 8: new tokens 1-7, 8-10, 11-13, 14-15.
    parts = [
        nats(model, line[0:8]),
        nats(model, line[3:11])[-3:],
        nats(model, line[6:14])[-3:],
        nats(model, line[8:16])[-2:],
    ]
    result = score(model, full(ids), stride=3)
    assert result.tokens == 15
    assert result.loss == pytest.approx(float(torch.cat(parts).mean()), abs=1e-5)


def test_more_context_changes_the_score(model: nn.Module):
    tokens = full(text(4, 16))
    assert score(model, tokens, stride=4).loss != score(model, tokens).loss


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_counts_for_nothing(model: nn.Module, side: str):
    texts = [text(1, n, seed=n)[0] for n in (12, 5, 9)]
    ids, mask = torch.zeros(3, 12, dtype=torch.int64), torch.zeros(3, 12, dtype=torch.bool)
    for row, line in enumerate(texts):
        place = slice(0, len(line)) if side == "right" else slice(12 - len(line), 12)
        ids[row, place], mask[row, place] = line, True
    wanted = torch.cat([nats(model, line) for line in texts])
    result = score(model, Tokens(ids, mask))
    assert result.tokens == 11 + 4 + 8
    assert result.loss == pytest.approx(float(wanted.mean()), abs=1e-5)
    noisy = torch.where(mask, ids, 77)
    assert score(model, Tokens(noisy, mask)).loss == pytest.approx(result.loss, abs=1e-6)


def test_batch_size_and_chunks_do_not_matter(model: nn.Module, monkeypatch: pytest.MonkeyPatch):
    tokens = full(text(7, 16))
    whole = score(model, tokens, batch_size=7)
    assert score(model, tokens, batch_size=2).loss == pytest.approx(whole.loss, abs=1e-6)
    monkeypatch.setitem(forward_module.CHUNK_BYTES, "cpu", 5 * 128 * 4)
    monkeypatch.setattr(forward_module, "LOGIT_BYTES", 3 * 16 * 128 * 4)
    seen: list[tuple[int, int, str]] = []
    small = score(model, tokens, batch_size=7, progress=lambda *event: seen.append(event))
    assert small.loss == pytest.approx(whole.loss, abs=1e-6)
    assert [done for done, _, _ in seen] == [3, 6, 7]
    assert {total for _, total, _ in seen} == {7}


def test_mode_and_gradients_are_put_back():
    model = tiny_model("llama")
    model.train()
    model.model.layers[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    score(model, full(text(1, 8)))
    assert {name: module.training for name, module in model.named_modules()} == before
    assert torch.is_grad_enabled()


def test_an_error_on_the_way_puts_them_back_too():
    model = tiny_model("llama")
    model.train()

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        score(model, full(text(4, 8)), batch_size=2, progress=stop)
    assert torch.is_grad_enabled()
    assert model.training
    del caught


class Fixed(nn.Module):
    """A model with the logits it is told."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, input_ids: Tensor, **_: object) -> "Fixed":
        self.out = self.logits.expand(*input_ids.shape, -1)
        return self

    def __getattribute__(self, name: str) -> object:
        if name == "logits" and "out" in self.__dict__:
            return self.__dict__["out"]
        return super().__getattribute__(name)


def test_worked_example():
    # p = (1/2, 1/4, 1/4): the tokens 0 1 0 2 cost ln 4, ln 2 and ln 4 after the first.
    fixed = Fixed(torch.tensor([0.5, 0.25, 0.25]).log())
    result = score(fixed, full(torch.tensor([[0, 1, 0, 2]])))
    assert result.perplexity == pytest.approx((4 * 2 * 4) ** (1 / 3))


def test_a_broken_model_is_a_result():
    ids = full(torch.tensor([[0, 1, 0, 1]]))
    assert isnan(score(Fixed(torch.tensor([0.0, float("nan")])), ids).perplexity)
    assert score(Fixed(torch.tensor([0.0, -3e3])), ids).perplexity == inf


def test_bad_input(model: nn.Module):
    ids = full(text(1, 8))
    with pytest.raises(GossamerError, match="batch_size is 0"):
        score(model, ids, batch_size=0)
    with pytest.raises(GossamerError, match="AutoModelForCausalLM"):
        score(model.model, ids)  # type: ignore[arg-type]
