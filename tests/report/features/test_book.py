import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gossamer.methods.features.autoencoder import Dictionary
from gossamer.methods.features.rules import AbsTopK, TopK
from gossamer.models import Tokens
from gossamer.report.features import Book, Firing, Vocabulary
from gossamer.report.features.book import histogram
from tests.report.features.made import AMOUNTS, made


def test_figures_of_all_latents():
    _, _, tokens, codes, book = made()
    rows = int(tokens.attention_mask.sum())
    fired = codes != 0
    assert book.l0 == pytest.approx(float(fired.sum()) / rows)
    assert torch.allclose(book.density, fired.double().sum(0) / rows)
    assert torch.allclose(book.top, codes.amax(0), atol=1e-5)
    assert torch.equal(book.bottom, torch.zeros(40))
    assert torch.allclose(book.mean, codes.sum(0) / fired.sum(0).clamp_min(1), atol=1e-5)
    ids = tokens.input_ids.reshape(-1)
    for latent in range(40):
        sums = torch.zeros(128).index_add_(0, ids, codes[:, latent])
        best = [int(i) for i in sums.sort(descending=True, stable=True).indices if sums[i] > 0][:4]
        words = book.tokens_of(latent)
        assert sums[[book.vocabulary._tokenizer.convert_tokens_to_ids(w) for w in words]].tolist() \
            == pytest.approx(sums[best].tolist(), rel=1e-4)  # fmt: skip


def test_a_feature_in_full():
    model, dictionary, _, codes, book = made()
    feature = book.feature(7)
    fired = codes[:, 7][codes[:, 7] != 0]
    assert feature.index == 7
    assert feature.explanation == "Capital letters"
    assert sum(feature.histogram.counts) == len(fired)
    assert feature.histogram.high == pytest.approx(float(fired.max()), rel=1e-3)
    effect = model.lm_head.weight @ (model.model.norm.weight * dictionary.W_dec[7])
    best = effect.topk(5)
    assert [v for _, v in feature.positive] == pytest.approx(best.values.tolist(), rel=1e-3)
    assert [t for t, _ in feature.positive] == list(book.vocabulary(best.indices.tolist()))
    worst = effect.topk(5, largest=False).values.tolist()
    assert [v for _, v in feature.negative] == pytest.approx(worst, rel=1e-3)
    assert sum(feature.logits.counts) == 128
    unit = torch.nn.functional.normalize(dictionary.W_dec, dim=1)
    cosine = unit @ unit[7]
    cosine[7] = 0
    expected = cosine.abs().sort(descending=True).indices[:4]
    assert [index for index, _ in feature.neighbours] == expected.tolist()
    assert [c for _, c in feature.neighbours] == pytest.approx(cosine[expected].tolist(), rel=1e-3)


def test_a_dead_feature():
    feature = made().book.feature(5)
    assert feature.dead
    assert (feature.density, feature.top, feature.groups) == (0.0, 0.0, ())
    assert feature.histogram.counts == ()
    assert feature.fires == ()
    assert len(feature.neighbours) == 4


def test_examples_are_pieces_of_the_text_with_their_codes():
    _, _, tokens, codes, book = made()
    words = book.vocabulary
    pieces = {}
    for place in range(7 * 24):
        window = place // 24 * 24
        span = range(max(window, place - 3), min(window + 24, place + 3))
        span = [p for p in span if tokens.attention_mask.reshape(-1)[p]]
        text = words(tokens.input_ids.reshape(-1)[span].tolist())
        pieces.setdefault((text, span.index(place) if place in span else -1), []).append(span)
    for feature in book.features(range(40)):
        for group in feature.groups:
            for example in group.examples:
                spans = pieces[example.tokens, example.at]
                values = [codes[span, feature.index].tolist() for span in spans]
                assert any(v == pytest.approx(example.values, rel=1e-3) for v in values)
                assert example.values[example.at] != 0


def test_groups_hold_what_they_say():
    _, _, _, codes, book = made()
    seen = 0
    for feature in book.features(range(40)):
        if feature.dead:
            continue
        fired = codes[:, feature.index][codes[:, feature.index] != 0]
        top, *intervals = feature.groups
        assert top.kind == "top"
        first = [example.values[example.at] for example in top.examples]
        assert first[0] == pytest.approx(float(fired.max()), rel=1e-3)
        assert first == sorted(first, reverse=True)
        assert len(top.examples) <= 3
        if len(fired) > 1:
            assert sum(g.share for g in intervals) == pytest.approx(1, abs=1e-3)
        for group in intervals:
            seen += 1
            inside = ((fired >= group.low * 0.999) & (fired <= group.high * 1.001)).sum()
            assert group.share <= float(inside) / len(fired) + 1e-3
            assert 1 <= len(group.examples) <= 2
            for example in group.examples:
                assert group.low * 0.999 <= example.values[example.at] <= group.high * 1.001
    assert seen > 60


def test_examples_of_a_group_do_not_overlap():
    ids = torch.arange(40).view(2, 20)
    values = torch.linspace(2, 1, 20)
    starts = torch.tensor([0, 20, 20])
    firing = Firing(Tokens.from_ids(ids), 40, starts, torch.arange(20).int(), values)
    dictionary = Dictionary.random(4, 2, TopK(1), seed=0)
    book = Book(dictionary, firing, Vocabulary([str(i) for i in range(40)]), amounts=AMOUNTS)
    top = book.feature(0).groups[0]
    # 5 tokens of context: the next code that may be shown lies 6 further on.
    assert [example.tokens[example.at] for example in top.examples] == ["0", "6", "12"]
    assert top.examples[0].tokens == ("0", "1", "2")
    assert top.examples[1].tokens == ("3", "4", "5", "6", "7", "8")


def test_signed_codes_are_shown_on_both_sides():
    ids = torch.arange(60).view(3, 20)
    places = torch.tensor([2, 15, 27, 41]).int()
    values = torch.tensor([-3.0, 1.0, 2.0, -0.5])
    firing = Firing(Tokens.from_ids(ids), 60, torch.tensor([0, 4, 4]), places, values)
    book = Book(
        Dictionary.random(4, 2, AbsTopK(1), seed=0), firing, Vocabulary(list(map(str, range(60))))
    )
    feature = book.feature(0)
    assert (feature.top, feature.bottom) == (2.0, -3.0)
    kinds = {g.kind: [e.tokens[e.at] for e in g.examples] for g in feature.groups[:2]}
    assert kinds == {"top": ["27", "15"], "bottom": ["2", "41"]}
    assert feature.fires[0] == "2"


def test_the_seed_decides_the_examples():
    book = made().book
    other = Book(book.dictionary, book.firing, book.vocabulary, amounts=AMOUNTS, seed=4)
    assert book.feature(3).groups == other.feature(3).groups
    different = Book(book.dictionary, book.firing, book.vocabulary, amounts=AMOUNTS, seed=5)
    assert any(book.feature(i).groups != different.feature(i).groups for i in range(12))


@given(st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=40), st.integers(1, 9))
def test_histograms_count_every_value_once(values: list[float], bins: int):
    counted = histogram(torch.tensor(values), bins)
    assert sum(counted.counts) == len(values)
    assert len(counted.centres) == len(counted.counts)
    assert all(counted.low - 1e-3 <= c <= counted.high + 1e-3 for c in counted.centres)
