import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from gossamer.core import GossamerError, SparseRows
from gossamer.methods.features.autoencoder import Dictionary
from gossamer.methods.features.rules import ReLU, TopK


def worked() -> Dictionary:
    """Two channels, three atoms: e1, e2 and the diagonal; k = 1."""
    made = Dictionary(2, 3, TopK(1))
    with torch.no_grad():
        made.W_dec.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]))
        made.W_enc.copy_(made.W_dec.T)
        made.b_enc.copy_(torch.tensor([0.0, 0.5, 0.0]))
        made.b_dec.copy_(torch.tensor([1.0, -1.0]))
    return made


@torch.no_grad()
def test_encode_and_decode_by_hand():
    made = worked()
    x = torch.tensor([[4.0, -1.0], [1.0, 1.0], [4.0, 3.0], [0.0, -2.0]])
    # x - b_dec: (3, 0), (0, 2), (3, 4), (-1, -1); pre-activations by atom:
    # (3, .5, 1.8), (0, 2.5, 1.6), (3, 4.5, 5), (-1, -.5, -1.4)
    codes = made.encode(x)
    assert isinstance(codes, SparseRows)
    assert codes.shape == (4, 3)
    assert codes.indices.tolist() == [[0], [1], [2], [-1]]
    torch.testing.assert_close(codes.values, torch.tensor([[3.0], [2.5], [5.0], [0.0]]))
    wanted = torch.tensor([[4.0, -1.0], [1.0, 1.5], [4.0, 3.0], [1.0, -1.0]])
    torch.testing.assert_close(made.decode(codes), wanted)
    torch.testing.assert_close(made.decode(codes.to_csr()), wanted)
    torch.testing.assert_close(made(x.view(2, 2, 2)), wanted.view(2, 2, 2))


@torch.no_grad()
def test_never_more_than_k_and_exactly_k_where_enough_are_positive():
    made = Dictionary.random(16, 64, TopK(7), seed=0)
    x = torch.randn(500, 16, generator=torch.Generator().manual_seed(1))
    codes = made.encode(x)
    count = (codes.indices >= 0).sum(1)
    positive = (made.pre_activations(x) > 0).sum(1)
    assert torch.equal(count, positive.clamp_max(7))
    assert int(count.max()) == 7
    assert bool((codes.values[codes.indices >= 0] > 0).all())


def test_random_atoms_have_norm_one_and_may_be_tied():
    tied = Dictionary.random(8, 20, TopK(2), seed=3)
    torch.testing.assert_close(tied.W_dec.norm(dim=1), torch.ones(20))
    assert torch.equal(tied.W_enc, tied.W_dec.T)
    assert tied.W_dec.is_contiguous()
    free = Dictionary.random(8, 20, TopK(2), seed=3, tied=False)
    assert torch.equal(free.W_dec, tied.W_dec)
    assert not torch.allclose(free.W_enc, free.W_dec.T)
    assert not torch.equal(Dictionary.random(8, 20, TopK(2), seed=4).W_dec, tied.W_dec)


@torch.no_grad()
def test_folding_the_input_scale_keeps_reconstructions():
    made = Dictionary.random(8, 32, TopK(4), seed=0).double()
    made.b_enc.normal_(generator=torch.Generator().manual_seed(1))
    made.b_dec.normal_(generator=torch.Generator().manual_seed(2))
    x = torch.randn(50, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    scale = 3.7
    wanted, codes = made(scale * x) / scale, made.encode(scale * x)
    made.fold_input_scale(scale)
    torch.testing.assert_close(made(x), wanted)
    after = made.encode(x)
    assert torch.equal(after.indices, codes.indices)
    torch.testing.assert_close(after.values * scale, codes.values)
    torch.testing.assert_close(made.W_dec.norm(dim=1), torch.ones(32, dtype=torch.float64))


def test_wrong_width_and_nan_are_refused():
    made = worked()
    with pytest.raises(GossamerError, match=r"reads 2 channels.*have 3"):
        made.encode(torch.zeros(1, 3))
    with pytest.raises(GossamerError, match="NaN"):
        made.encode(torch.tensor([[float("nan"), 0.0]]))
    with pytest.raises(GossamerError, match="5 latents; this dictionary has 3"):
        made.decode(SparseRows.from_dense(torch.ones(1, 5)))


def test_k_above_the_width_is_refused():
    with pytest.raises(GossamerError, match="k = 9"):
        Dictionary(4, 8, TopK(9))


@pytest.mark.parametrize("rule", [TopK(4), ReLU()])
def test_files_come_back_exactly(tmp_path, rule):
    made = Dictionary.random(8, 32, rule, seed=0)
    made.metadata = {"hook_name": "model.layers.1", "sink_norm": 12.5}
    folder = made.save(tmp_path / "sae")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["sae"]
    assert sorted(p.name for p in folder.iterdir()) == ["cfg.json", "sae_weights.safetensors"]
    back = Dictionary.load(folder)
    for name, tensor in made.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    assert back.metadata == made.metadata
    assert back.config() == made.config()
    x = torch.randn(20, 8)
    assert torch.equal(back(x), made(x))


def test_files_are_laid_out_as_other_tools_read_them(tmp_path):
    folder = Dictionary.random(8, 32, TopK(4), seed=0).save(tmp_path / "sae")
    config = json.loads((folder / "cfg.json").read_text())
    assert config["architecture"] == "topk"
    assert (config["d_in"], config["d_sae"], config["k"]) == (8, 32, 4)
    assert config["dtype"] == "float32"
    assert config["apply_b_dec_to_input"] is True
    assert config["normalize_activations"] == config["reshape_activations"] == "none"
    shapes = {
        name: tuple(t.shape) for name, t in load_file(folder / "sae_weights.safetensors").items()
    }
    assert shapes == {"W_enc": (8, 32), "W_dec": (32, 8), "b_enc": (32,), "b_dec": (8,)}


@torch.no_grad()
def test_a_file_that_ranks_by_atom_norm_is_folded(tmp_path):
    made = Dictionary.random(6, 24, TopK(3), seed=0).double()
    scale = torch.linspace(0.2, 3.0, 24, dtype=torch.float64)
    made.W_dec.mul_(scale[:, None])
    config = made.config() | {"rescale_acts_by_decoder_norm": True}
    back = Dictionary.from_tensors(config, made.tensors())
    x = torch.randn(30, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    pre = made.pre_activations(x)
    kept = (pre * scale).topk(3, dim=1).indices
    codes = torch.zeros_like(pre).scatter(1, kept, pre.gather(1, kept).relu())
    torch.testing.assert_close(back(x), codes @ made.W_dec + made.b_dec)


def write(folder, config, tensors):
    folder.mkdir()
    (folder / "cfg.json").write_text(config if isinstance(config, str) else json.dumps(config))
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "sae_weights.safetensors")
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "gru"}, "unknown dictionary architecture"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations is 'layer_norm'"),
        ({"apply_b_dec_to_input": False}, "apply_b_dec_to_input"),
        ({"d_sae": 33}, "do not fit"),
        ({"d_in": "8"}, "misstates"),
        ({"k": None}, "k is None"),
    ],
)
def test_unusable_configurations_are_refused(tmp_path, change, message):
    made = Dictionary.random(8, 32, TopK(4), seed=0)
    folder = write(tmp_path / "sae", made.config() | change, made.tensors())
    with pytest.raises(GossamerError, match=message):
        Dictionary.load(folder)


def test_damaged_or_missing_files_are_refused(tmp_path):
    made = Dictionary.random(8, 32, TopK(4), seed=0)
    with pytest.raises(GossamerError, match="no readable dictionary"):
        Dictionary.load(tmp_path / "nowhere")
    with pytest.raises(GossamerError, match="no readable dictionary"):
        Dictionary.load(write(tmp_path / "a", "{", made.tensors()))
    with pytest.raises(GossamerError, match="it holds a list"):
        Dictionary.load(write(tmp_path / "list", [], made.tensors()))
    torn = made.save(tmp_path / "b")
    weights = torn / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(GossamerError, match="no readable dictionary"):
        Dictionary.load(torn)
    extra = {**made.tensors(), "threshold": torch.zeros(32)}
    with pytest.raises(GossamerError, match="threshold"):
        Dictionary.load(write(tmp_path / "c", made.config(), extra))


def test_a_full_folder_is_not_overwritten(tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(GossamerError, match="not empty"):
        Dictionary.random(4, 8, TopK(1), seed=0).save(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
