import pytest
import torch

from gossamer.core import GossamerError
from gossamer.methods.control.base import Affine, norm_paths
from gossamer.methods.control.difference_in_means import DifferenceInMeans, mean_difference
from gossamer.methods.features.editing import gathered, pooled
from gossamer.models import Tokens
from tests.models.subjects import SUBJECTS
from tests.models.tiny import DECODERS, tiny_model

IT = SUBJECTS["steered language model"]


@pytest.mark.parametrize("architecture", DECODERS)
def test_norms_of_every_decoder(architecture):
    paths = norm_paths(tiny_model(architecture))
    blocks = {path.rpartition(".")[0] for path in paths}
    assert len(blocks) == 2
    if architecture.startswith("gemma"):
        assert len(paths) == 4


def test_pooling():
    hidden = torch.arange(12.0).view(2, 3, 2)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]]).bool()
    assert pooled(hidden, mask, "last").tolist() == [[2, 3], [10, 11]]
    assert pooled(hidden, mask, "mean").tolist() == [[1, 2], [8, 9]]


def test_padding_changes_no_pooled_activation():
    model, ids = tiny_model("llama"), torch.tensor([[5, 6, 7]])
    padded = Tokens(
        torch.tensor([[5, 6, 7, 0, 0]]), torch.tensor([[1, 1, 1, 0, 0]], dtype=torch.bool)
    )
    for pooling in ("last", "mean"):
        plain = gathered(model, Tokens.from_ids(ids), ("model.layers.1",), pooling)
        other = gathered(model, padded, ("model.layers.1",), pooling)
        assert torch.allclose(plain["model.layers.1"], other["model.layers.1"], atol=1e-5)


def test_the_difference_of_means():
    model, data = IT.build(), IT.data()
    with DifferenceInMeans(source="0", target="1", pooling="mean").apply(model, data) as work:
        (edit,) = work.intervention.edits
    assert isinstance(edit.law, Affine)
    start, end = data.where("label", "0"), data.where("label", "1")
    wanted = mean_difference(model, start, end, "model.layers.1", "mean")
    assert torch.equal(edit.law.shift, wanted)
    back = mean_difference(model, end, start, "model.layers.1", "mean")
    assert torch.allclose(wanted, -back)


def test_without_a_source_all_others_are_it():
    model, data = IT.build(), IT.data()
    laws = []
    for source in ("0", None):
        with DifferenceInMeans(source=source, target="1").apply(model, data) as work:
            laws.append(work.intervention.edits[0].law.tensors()["shift"])
    assert torch.equal(*laws)


def test_interventions_come_out_of_methods_alone(tmp_path):
    model = IT.build()
    with DifferenceInMeans(target="1").apply(model, IT.data()) as work:
        wanted = IT.outputs(model)
        folder = work.intervention.save(tmp_path / "alone")
    with type(work.intervention).load(folder).on(model):
        assert torch.equal(IT.outputs(model), wanted)


def test_one_kind_of_text_is_refused():
    ids = torch.ones(3, 4, dtype=torch.int64)
    with pytest.raises(GossamerError, match="all windows are"):
        DifferenceInMeans().apply(IT.build(), {"calm": ids})
    with pytest.raises(GossamerError, match="pooling"):
        DifferenceInMeans(pooling="max")  # type: ignore[arg-type]
