import pytest
import torch

from gossamer.core import GossamerError
from gossamer.methods.features.autoencoder import Dictionary
from gossamer.methods.features.probing.tasks import last_token, one_against_rest, windows_of
from gossamer.methods.features.rules import TopK
from gossamer.models import Inputs, Tokens
from tests.models.tiny import tiny_model


def test_the_last_real_token_is_read_on_either_side_of_padding():
    model = tiny_model("llama")
    ids = torch.randint(3, 100, (1, 6), generator=torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(ids, (0, 3))
    mask = torch.arange(9)[None] < 6
    alone = last_token(model, Tokens.from_ids(ids), "model.layers.1")
    behind = last_token(model, Tokens(padded, mask), "model.layers.1")
    assert torch.allclose(alone, behind, atol=1e-5)
    whole = model.model(ids, output_hidden_states=True).hidden_states
    assert torch.allclose(
        last_token(model, Tokens.from_ids(ids), "model.layers.0"), whole[1][:, -1], atol=1e-5
    )


def made(width=5):
    return Dictionary.random(width, 16, TopK(3), seed=0).eval()


def test_every_class_is_a_task_and_no_row_is_trained_and_tested_on():
    rows = torch.arange(60.0)[:, None].expand(60, 5) / 60
    labels = torch.arange(60) % 3
    away = torch.arange(60) >= 51
    tasks = one_against_rest(rows, labels, made(), shifted=away, test_share=0.4)
    assert [t.name for t in tasks] == ["class 0", "class 1", "class 2"]
    (first, *_) = tasks
    trained = set((first.pool.x[:, 0] * 60).round().tolist())
    tested = set((first.test.x[:, 0] * 60).round().tolist())
    assert first.shifted is not None
    assert set((first.shifted.x[:, 0] * 60).round().tolist()) == set(range(51, 60))
    assert trained | tested == set(range(51))
    assert not trained & tested
    assert len(tested) == 21
    assert float(first.labels.double().mean()) == pytest.approx(1 / 3, abs=0.02)
    assert first.pool.codes is not None
    assert first.pool.codes.shape == (30, 16)


def test_two_classes_make_one_task_and_one_none():
    rows = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    assert len(one_against_rest(rows, torch.arange(20) % 2, made())) == 1
    with pytest.raises(GossamerError, match="1 class"):
        one_against_rest(rows, torch.zeros(20, dtype=torch.long), made())
    with pytest.raises(GossamerError, match="class 1 has 2 rows"):
        one_against_rest(rows, (torch.arange(20) < 2).long(), made())


def test_data_without_labels_is_refused():
    model = tiny_model("llama")
    ids = torch.full((4, 3), 5)
    with pytest.raises(GossamerError, match="labelled windows"):
        windows_of(model, Tokens.from_ids(ids))
    with pytest.raises(GossamerError, match="whole number"):
        windows_of(model, Inputs({"input_ids": ids, "labels": torch.rand(4)}))
    with pytest.raises(GossamerError, match="vocabulary|id"):
        windows_of(model, Inputs({"input_ids": ids * 1000, "labels": torch.arange(4)}))
