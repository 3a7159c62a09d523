import pytest
import torch

from gossamer.core import GossamerError
from gossamer.methods.features.circuits.data import as_pairs
from gossamer.models import Tokens, templates
from tests.models.tiny import tiny_model

IDS = torch.randint(3, 128, (4, 9), generator=torch.Generator().manual_seed(3))


def test_templated_examples_bring_their_twins():
    made = templates.batch("names", 5)
    pairs = as_pairs(made, templates.load())
    assert torch.equal(pairs.positive.input_ids, made.ids)
    assert torch.equal(pairs.negative.input_ids, made.corrupted)


def test_one_set_is_corrupted_by_shuffling():
    pairs = as_pairs(Tokens.from_ids(IDS), tiny_model("llama"))
    assert torch.equal(pairs.positive.input_ids, IDS)
    assert not torch.equal(pairs.negative.input_ids, IDS)
    assert torch.equal(pairs.negative.input_ids.sort(1).values, IDS.sort(1).values)


def test_sets_that_do_not_pair_up_are_refused():
    model = tiny_model("llama")
    with pytest.raises(GossamerError, match="do not pair up"):
        as_pairs((Tokens.from_ids(IDS), Tokens.from_ids(IDS[:, 1:])), model)
    with pytest.raises(GossamerError, match="1 example tells nothing apart"):
        as_pairs(Tokens.from_ids(IDS[:1]), model)
    mask = torch.ones_like(IDS, dtype=torch.bool)
    mask[0, 0] = False
    with pytest.raises(GossamerError, match="without padding"):
        as_pairs(Tokens(IDS, mask), model)
