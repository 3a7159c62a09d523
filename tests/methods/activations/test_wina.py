"""WINA: the rotation against the paper's own form by hand, and what is saved."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from gossamer.core import GossamerError, UnsupportedModel
from gossamer.methods.activations.rotation import Rotation, orthogonal_basis
from gossamer.methods.activations.wina import WINA
from gossamer.methods.weights.magnitude import Magnitude
from gossamer.models import Tokens, find_sites
from gossamer.models.store import read_stages
from tests.models.tiny import tiny_model

torch.set_num_threads(1)


def _tokens(rows: int = 4, length: int = 24, seed: int = 0) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    return Tokens.from_ids(torch.randint(3, 128, (rows, length), generator=generator))


def _gains(model) -> None:
    """Norm gains that matter, for random models have ones."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 and "norm" in name:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi3"])
def test_the_rotation_is_exact_and_the_columns_are_orthogonal(name: str) -> None:
    model = tiny_model(name)
    _gains(model)
    ids = _tokens().input_ids
    before = {k: v.clone() for k, v in model.state_dict().items()}
    dense = model(ids).logits
    sites = find_sites(model)
    rotation = Rotation(model, sites)
    torch.testing.assert_close(model(ids).logits, dense, rtol=1e-4, atol=1e-4)
    for site in sites.sites:
        if site.role in ("attention.k", "attention.qkv", "mlp.gate", "mlp.gate_up"):
            gram = site.weight(model).double().T @ site.weight(model).double()
            off = gram - gram.diagonal().diag()
            assert off.square().sum() < 1e-9 * gram.square().sum()
    rotation.undo()
    rotation.undo()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(len(m._forward_hooks) for m in model.modules())


def test_the_papers_shortcuts_give_the_same_masked_function() -> None:
    """Stream in the reader's basis, residuals through Q_prev^T Q_next, writers rotated, fp64."""
    torch.manual_seed(0)
    d, eps = 8, 1e-6
    stream0 = torch.randn(3, d).double()
    gains = [1 + 0.3 * torch.randn(d).double() for _ in range(2)]
    readers = [torch.randn(6, d).double() for _ in range(2)]
    writers = [torch.randn(d, 6).double() for _ in range(2)]
    bases = [orthogonal_basis(r, g) for r, g in zip(readers, gains, strict=True)]

    def norm(h: torch.Tensor) -> torch.Tensor:
        return h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)

    def masked(x: torch.Tensor) -> torch.Tensor:
        return x * (x.abs() > x.abs().median())

    ours = stream0
    for q, g, read, write in zip(bases, gains, readers, writers, strict=True):
        ours = ours + masked(norm(ours) @ q) @ (read * g @ q).T @ write.T
    theirs = stream0 @ bases[0]
    for i in range(2):
        after = bases[min(i + 1, 1)]
        new = masked(norm(theirs)) @ (readers[i] * gains[i] @ bases[i]).T @ (after.T @ writers[i]).T
        theirs = theirs @ (bases[i].T @ after) + new
    torch.testing.assert_close(theirs @ bases[1].T, ours)


@pytest.mark.parametrize("name", ["gpt2", "opt", "gpt_neox", "mixtral", "bert"])
def test_models_that_cannot_be_rotated_are_refused_untouched(name: str) -> None:
    model = tiny_model(name)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(UnsupportedModel, match="transform=False"):
        WINA(transform=True).apply(model, _tokens())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_a_saved_rotated_model_is_the_plain_one_and_comes_back_rotated(tmp_path: Path) -> None:
    model, data = tiny_model("llama"), _tokens()
    _gains(model)
    dense = model(data.input_ids).logits
    method = WINA(sparsity=0.5, transform=True)
    with method.apply(model, data) as work:
        masked = model(data.input_ids).logits
        work.save(tmp_path / "model")
        assert torch.equal(model(data.input_ids).logits, masked)
    assert torch.equal(model(data.input_ids).logits, dense)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    assert torch.equal(loaded(data.input_ids).logits, dense)
    (stage,) = read_stages(tmp_path / "model")
    with WINA.from_dict(stage.method).reattach(loaded, stage.meta, stage.tensors):
        torch.testing.assert_close(loaded(data.input_ids).logits, masked, rtol=1e-4, atol=1e-4)
    assert torch.equal(loaded(data.input_ids).logits, dense)


def test_the_changes_of_basis_are_counted() -> None:
    model, data = tiny_model("llama"), _tokens()
    with WINA(sparsity=0.5).apply(model, data) as work:
        plain = work.weight_bytes_saved()
    with WINA(sparsity=0.5, transform=True).apply(model, data) as work:
        # Two square matrices in each of two blocks.
        assert plain - work.weight_bytes_saved() == 2 * 2 * 32 * 32 * 4


def test_only_the_orthogonal_matrices_are_weighed_after_a_rotation() -> None:
    data = _tokens()
    for transform in (False, True):
        with WINA(transform=transform).apply(tiny_model("llama"), data) as work:
            weighed = {g.role for g in work.gates.values() if g.cut.numel() > 1}
        every = {s.role for s in find_sites(tiny_model("llama")).sites}
        assert weighed == ({"attention.k", "mlp.gate"} if transform else every)


def test_pruning_around_a_rotation_is_undone_in_order_or_refused(tmp_path: Path) -> None:
    """Mixed orders would write rotated values among plain ones, or save zeros that are none."""
    model, calibration = tiny_model("llama"), _tokens()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pruned = Magnitude(sparsity=0.5).apply(model)
    rotated = WINA(transform=True).apply(model, calibration)
    with pytest.raises(GossamerError, match="wina rewrote the weights later"):
        pruned.restore()
    rotated.restore()
    pruned.restore()
    rotated = WINA(transform=True).apply(model, calibration)
    pruned = Magnitude(sparsity=0.5).apply(model)
    with pytest.raises(GossamerError, match="magnitude changed weights that wina had rotated"):
        pruned.save(tmp_path / "mixed")
    assert not (tmp_path / "mixed").exists()
    with pytest.raises(GossamerError, match="magnitude changed weights"):
        rotated.restore()
    pruned.restore()
    rotated.restore()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
