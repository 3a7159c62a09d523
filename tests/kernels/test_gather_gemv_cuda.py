"""The gathered products on a GPU, and a gated model on them; skipped where there is none."""

import pytest
import torch
from torch import Tensor

from gossamer.kernels.gather_gemv import axpy_gemv, dot_gemv, rows
from gossamer.methods.activations.teal import TEAL
from gossamer.models import Tokens
from tests.models.tiny import tiny_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

if torch.cuda.is_available():
    from gossamer.kernels.gather_gemv import triton_gemv as t

NAN = float("nan")


def _wide(x: Tensor, layer, cut: Tensor | None) -> Tensor:
    x = x.double()
    x = x if cut is None else x.masked_fill(x.abs() <= cut, 0)
    return x @ layer.dense(torch.float64).T + layer.bias.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("shape", [(70, 100), (1, 1), (3000, 700)])
def test_matches_float64(dtype, batch, shape) -> None:
    out, inner = shape
    layer = rows(*(torch.randn(*s, device="cuda") for s in ((out, inner), (out,))), dtype=dtype)
    x, cut = torch.randn(batch, inner, device="cuda"), torch.rand(inner, device="cuda")
    for threshold in (None, cut, cut[:1]):
        y = axpy_gemv(x, layer, threshold, backend="triton")
        torch.testing.assert_close(y.double(), _wide(x, layer, threshold), atol=1e-3, rtol=1e-4)
        assert torch.equal(y, axpy_gemv(x, layer, threshold, backend="triton"))
    at = torch.randperm(inner, device="cuda")[: inner // 2 + 1]
    only = torch.zeros(inner, device="cuda").index_fill_(0, at, 1.0)
    y = axpy_gemv(x, layer, index=at, backend="triton")
    torch.testing.assert_close(y.double(), _wide(x * only, layer, None), atol=1e-3, rtol=1e-4)
    turned = rows(layer.dense(torch.float32), layer.bias, "output", dtype)
    at = torch.randperm(out, device="cuda")[: out // 2 + 1]
    y = dot_gemv(x, turned, at, backend="triton")
    torch.testing.assert_close(y.double(), _wide(x, turned, None)[:, at], atol=1e-3, rtol=1e-4)


def test_only_active_rows_are_read_and_faults_stay() -> None:
    x, cut = torch.randn(1, 500, device="cuda"), torch.tensor([0.7], device="cuda")
    weight = torch.randn(600, 500, device="cuda")
    weight[:, (x.abs() <= cut)[0]] = NAN
    assert torch.isfinite(axpy_gemv(x, rows(weight), cut, backend="triton")).all()
    x[0, 3] = NAN
    found = axpy_gemv(x, rows(weight.nan_to_num()), cut + 1e30, backend="triton")
    assert found.isnan().all()
    empty = torch.zeros(0, dtype=torch.int64, device="cuda")
    bias = torch.randn(600, device="cuda")
    found = axpy_gemv(x.nan_to_num(), rows(weight.nan_to_num(), bias), index=empty)
    assert torch.equal(found[0], bias)


def test_norm_residual_and_swiglu_are_fused() -> None:
    h, gain = torch.randn(1, 256, device="cuda"), torch.rand(256, device="cuda") + 0.5
    layer, cut = rows(torch.randn(1200, 256, device="cuda")), torch.tensor([0.6], device="cuda")
    normed = h * gain * torch.rsqrt(h.square().mean() + 1e-6)
    expected = normed.masked_fill(normed.abs() <= cut, 0) @ layer.weight
    part = t.axpy_partial(h, layer.weight, cut, norm=gain)
    residual = torch.randn(1, 1200, device="cuda")
    torch.testing.assert_close(
        t.finish(part, torch.float32, residual=residual), expected + residual, atol=1e-3, rtol=1e-4
    )
    gate, up = expected.chunk(2, dim=1)
    torch.testing.assert_close(
        t.swiglu(part, torch.float32),
        torch.nn.functional.silu(gate) * up,
        atol=1e-2,
        rtol=1e-3,
    )


def test_graphs_and_compilers() -> None:
    x, cut = torch.randn(1, 300, device="cuda"), torch.tensor([0.5], device="cuda")
    layer = rows(torch.randn(400, 300, device="cuda"))
    operator = torch.ops.gossamer.axpy_gemv
    arguments = (layer.weight, None, None, cut, None)
    compiled = torch.compile(
        lambda v: operator(v, *arguments) * 2, fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(x), operator(x, *arguments) * 2)
    operator(x, *arguments)
    captured = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(captured):
        y = operator(x, *arguments)
    x.copy_(torch.randn(1, 300, device="cuda"))
    captured.replay()
    assert torch.equal(y, operator(x, *arguments))


@torch.no_grad()
def test_a_gated_model_decodes_as_its_masks_do() -> None:
    model = tiny_model("llama").cuda()
    ids = torch.randint(3, 128, (8, 32), generator=torch.Generator().manual_seed(0))
    applied = TEAL(sparsity=0.5).apply(model, Tokens.from_ids(ids))
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    prompt = ids[:1, :6].cuda()
    masked = model.generate(prompt, **options)
    table = applied.accelerate()
    assert {row.chosen for row in table} == {"axpy"}
    assert not applied.simulated
    assert torch.equal(model.generate(prompt, **options), masked)
    applied.restore()
    assert all("forward" not in vars(module) for module in model.modules())
