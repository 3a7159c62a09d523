"""PPL-p%: the search meets the growth asked for, on any rule, and reports on other text."""

from math import exp

import pytest
import torch

from gossamer.core import GossamerError
from gossamer.evaluate import score
from gossamer.methods.activations.sparsing_law import SparsingLaw
from gossamer.models import Inputs, Tokens
from tests.models.tiny import tiny_model

torch.set_num_threads(1)


def _tokens(model, seed: int = 0, rows: int = 8) -> Tokens:
    """Text the model itself writes: on it, losing neurons does raise perplexity."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 128, (rows, 1), generator=generator)
    with torch.no_grad():
        for _ in range(31):
            chances = model(ids).logits[:, -1].mul(3).softmax(-1)
            ids = torch.cat([ids, torch.multinomial(chances, 1, generator=generator)], 1)
    return Tokens.from_ids(ids)


@pytest.mark.parametrize("rule", ["cett", "topk", "fat", "plain", "unweighted"])
def test_the_search_meets_the_growth(rule) -> None:
    model = tiny_model("llama")
    data = _tokens(model)
    for percent in (1.0, 10.0):
        found = SparsingLaw(percent=percent, rule=rule).find(model, data)
        assert 1 < found.ratio <= 1 + 1.01 * percent / 100
        if rule != "topk":  # whole neurons: its ratios come in steps
            assert found.ratio == pytest.approx(1 + percent / 100, abs=0.2 * percent / 100)
        assert 0 < found.sparsity < 1


def test_what_is_found_is_what_works() -> None:
    model = tiny_model("llama")
    data, other = _tokens(model), _tokens(model, 1)
    dense = [score(model, text).perplexity for text in (data, other)]
    method = SparsingLaw(percent=5.0)
    report = method.measure(model, data, other)
    with method.apply(model, data) as work:
        (fact,) = (note for note in work.report().notes if note.startswith("level found"))
        assert f"{report.level:.4f}" in fact
        assert f"{report.fitted - 1:.2%}" in fact
        ratios = [score(model, t).perplexity / d for t, d in zip((data, other), dense, strict=True)]
        shares = work.measure(other)
    assert report.fitted == pytest.approx(ratios[0], rel=1e-4)
    assert report.growth == pytest.approx(ratios[1], rel=1e-4)
    assert report.shares == pytest.approx(shares, abs=1e-6)
    assert report.sparsity == pytest.approx(sum(shares.values()) / 2)
    assert report.active == pytest.approx(1 - report.sparsity)
    assert 1.0 < ratios[0] <= 1.0506


def test_more_is_removed_at_a_higher_price() -> None:
    model = tiny_model("llama")
    data = _tokens(model)
    found = [SparsingLaw(percent=p).find(model, data).sparsity for p in (0.5, 5.0, 50.0)]
    assert found == sorted(found)
    assert found[0] < found[2] - 0.05


def test_the_search_reads_as_many_tokens_as_it_is_given() -> None:
    model = tiny_model("llama")
    data = _tokens(model)
    seen: list[tuple[int, int, str]] = []
    short = SparsingLaw(tokens=64).find(model, data, progress=lambda *a: seen.append(a))
    same = SparsingLaw(tokens=64).find(model, data)
    assert short.level == same.level
    assert any("perplexity at level" in what for _, _, what in seen)
    assert all(done <= total for done, total, _ in seen)
    ratio = exp(score(model, data.slice(2)).loss)
    with SparsingLaw(tokens=64).apply(model, data):
        assert exp(score(model, data.slice(2)).loss) / ratio == pytest.approx(short.ratio, rel=1e-4)


def test_what_has_no_perplexity_is_refused() -> None:
    with pytest.raises(GossamerError, match="needs tokens"):
        SparsingLaw().apply(tiny_model("llama"), Inputs({"input_ids": torch.ones(2, 4).long()}))
    with pytest.raises(GossamerError, match="no language-model head"):
        SparsingLaw().find(tiny_model("bert"), _tokens(tiny_model("llama")))
    for values in ({"percent": 0.0}, {"percent": "x"}, {"rule": "x"}, {"tokens": 1}):
        with pytest.raises(GossamerError):
            SparsingLaw(**values)
