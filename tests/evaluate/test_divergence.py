from math import inf, isnan, log

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gossamer.core import GossamerError
from gossamer.evaluate import Reference, kl_divergence, score
from gossamer.models import Tokens
from tests.models.tiny import tiny_model


@pytest.fixture(scope="module")
def dense() -> nn.Module:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def sparse() -> nn.Module:
    model = tiny_model("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            weight = layer.mlp.down_proj.weight
            weight[weight.abs() < weight.abs().median()] = 0
    return model


@pytest.fixture(scope="module")
def tokens() -> Tokens:
    ids = torch.randint(128, (5, 16), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[2, 9:] = False
    return Tokens(ids, mask)


def log_probs(model: nn.Module, tokens: Tokens) -> Tensor:
    """fp64 log-probabilities of every scored token, in order."""
    rows = []
    with torch.no_grad():
        for ids, mask in zip(tokens.input_ids, tokens.attention_mask, strict=True):
            real = ids[mask]
            rows.append(model(input_ids=real[None]).logits[0, :-1].double().log_softmax(-1))
    return torch.cat(rows)


def test_worked_rows():
    p = torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.5, 0.5]]).log()
    q = torch.tensor([[0.25, 0.75], [0.5, 0.5], [1.0, 0.0]]).log()
    exact = p.double(), q.double()
    kept = exact[0].clone(), exact[1].clone()
    wanted = [0.5 * log(2) + 0.5 * log(2 / 3), log(2), inf]
    assert kl_divergence(p, q).tolist() == pytest.approx(wanted)
    assert kl_divergence(*exact).tolist() == pytest.approx(wanted)
    assert torch.equal(exact[0], kept[0])
    assert torch.equal(exact[1], kept[1])


@given(seed=st.integers(0, 10**6), width=st.integers(2, 50), noise=st.floats(0, 30))
@settings(max_examples=60, deadline=None)
def test_never_negative_and_near_torch(seed: int, width: int, noise: float):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(3, width, generator=generator) * 5
    b = a + noise * torch.randn(3, width, generator=generator)
    p, q = a.log_softmax(-1), b.log_softmax(-1)
    ours = kl_divergence(p, q)
    assert bool((ours >= 0).all())
    direct = nn.functional.kl_div(q.double(), p.double(), reduction="none", log_target=True).sum(-1)
    assert torch.allclose(ours, direct, atol=1e-5, rtol=1e-5)
    assert kl_divergence(p, p).tolist() == [0.0, 0.0, 0.0]


def test_the_same_model_does_not_diverge(dense: nn.Module, tokens: Tokens):
    with Reference.record(dense, tokens) as reference:
        result = score(dense, tokens, reference=reference)
        again = score(dense, tokens, reference=reference, batch_size=2)
    assert result == reference.score
    assert (result.kl, result.agreement) == (0.0, 1.0)
    assert again.kl < 1e-12
    assert again.agreement == 1.0


def test_equals_the_direct_formula(dense: nn.Module, sparse: nn.Module, tokens: Tokens):
    p, q = log_probs(dense, tokens), log_probs(sparse, tokens)
    kl = float((p.exp() * (p - q)).sum(-1).mean())
    same = float((p.argmax(-1) == q.argmax(-1)).double().mean())
    with Reference.record(dense, tokens) as reference:
        assert len(reference.positions) == 4 * 15 + 8
        result = score(sparse, tokens, reference=reference)
    assert result.kl == pytest.approx(kl, rel=1e-4)
    assert result.kl > 1e-3
    assert result.agreement == pytest.approx(same)
    plain = score(sparse, tokens)
    assert (result.loss, result.tokens) == (plain.loss, plain.tokens)


def test_a_cap_keeps_evenly_spread_positions(dense: nn.Module, sparse: nn.Module, tokens: Tokens):
    p, q = log_probs(dense, tokens), log_probs(sparse, tokens)
    with Reference.record(dense, tokens, max_bytes=10 * 4 * 128 + 100) as reference:
        held = reference.positions
        result = score(sparse, tokens, reference=reference, batch_size=2)
    assert len(held) == 10
    assert held[0] == 0
    assert held.diff().min() >= 6
    assert held.diff().max() <= 7
    kl = (p.exp() * (p - q)).sum(-1)[held].mean()
    assert result.kl == pytest.approx(float(kl), rel=1e-4)
    assert result.tokens == 68


def test_with_a_stride(dense: nn.Module, sparse: nn.Module, tokens: Tokens):
    with Reference.record(dense, tokens, stride=5) as reference:
        assert score(dense, tokens, stride=5, reference=reference).kl == 0.0
        assert score(sparse, tokens, stride=5, reference=reference).kl > 0
        with pytest.raises(GossamerError, match="another stride"):
            score(dense, tokens, stride=4, reference=reference)


def test_a_destroyed_model_agrees_with_nothing(dense: nn.Module, tokens: Tokens):
    broken = tiny_model("llama")
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    with Reference.record(dense, tokens) as reference:
        result = score(broken, tokens, reference=reference)
    assert isnan(result.kl)
    assert isnan(result.loss)
    assert result.agreement == 0.0


def test_misuse(dense: nn.Module, tokens: Tokens):
    with pytest.raises(GossamerError, match="max_bytes is 511"):
        Reference.record(dense, tokens, max_bytes=511)
    reference = Reference.record(dense, tokens)
    other = Tokens(tokens.input_ids.flip(0), tokens.attention_mask)
    with pytest.raises(GossamerError, match="other tokens"):
        score(dense, other, reference=reference)
    reference.close()
    reference.close()
    with pytest.raises(GossamerError, match="closed"):
        score(dense, tokens, reference=reference)


def test_another_vocabulary_is_refused_and_nothing_stays_switched(dense: nn.Module, tokens: Tokens):
    other = tiny_model("llama")
    other.lm_head = nn.Linear(32, 130, bias=False)
    with Reference.record(dense, tokens) as reference:
        with pytest.raises(
            GossamerError, match="vocabulary of 128, the model one of 130"
        ) as caught:
            score(other, tokens, reference=reference)
        assert torch.is_grad_enabled()
    del caught


def test_a_full_disk_is_one_clear_line(
    dense: nn.Module, tokens: Tokens, monkeypatch: pytest.MonkeyPatch
):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full, raising=False)
    with pytest.raises(GossamerError, match=r"No space left on device.*lower max_bytes"):
        Reference.record(dense, tokens)
