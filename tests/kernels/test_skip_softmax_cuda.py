"""Attention that skips tiles, on a GPU against its definition; skipped where there is none."""

import pytest
import torch

from gossamer.kernels.skip_softmax import skip_softmax, skip_softmax_decode

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

LIMIT = {torch.float32: 1e-5, torch.float16: 1.5e-3, torch.bfloat16: 1e-2}


def _loud(query: torch.Tensor, key: torch.Tensor) -> None:
    """Make a key in every 300 large for all queries: tiles without one can be skipped."""
    query += 3.0
    key[:, :, ::300] = 3.0


def _error(found, expected) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("threshold", [0.0, 0.02])
@pytest.mark.parametrize(
    ("dtype", "width", "tile"),
    [
        (torch.bfloat16, 128, (128, 128)),
        (torch.float16, 64, (64, 64)),
        (torch.float32, 80, (64, 32)),
    ],
)
def test_prefill(threshold, dtype, width, tile) -> None:
    for batch, heads, lengths, padded, softcap in (
        (1, (4, 2), (700, 700), False, None),
        (2, (2, 1), (257, 800), True, 60.0),
    ):
        query = 2 * torch.randn(batch, heads[0], lengths[0], width, device="cuda")
        key = torch.randn(batch, lengths[1], heads[1], width, device="cuda").transpose(1, 2)
        _loud(query, key)
        query, key, value = query.to(dtype), key.to(dtype), torch.randn_like(key).to(dtype)
        options = {
            "query_offset": lengths[1] - lengths[0],
            "first": torch.tensor([0, 150], device="cuda") if padded else None,
            "softcap": softcap,
            "tile": tile,
        }
        found, count = skip_softmax(query, key, value, threshold, **options, backend="triton")
        expected, wanted = skip_softmax(
            *(x.double() for x in (query, key, value)), threshold, **options, backend="reference"
        )
        assert torch.equal(count[..., 1], wanted[..., 1])
        # Rounding may turn a decision at the very threshold.
        assert int((count[..., 0] - wanted[..., 0]).abs().sum()) <= 2
        assert (int(count[..., 0].sum()) > 0) == (threshold > 0)
        assert _error(found, expected) < LIMIT[dtype] + threshold


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_decode(dtype) -> None:
    query = torch.randn(2, 8, 1, 128, device="cuda").to(dtype)
    key, value = (torch.randn(2, 2, 3000, 128, device="cuda").to(dtype) for _ in range(2))
    _loud(query, key)
    first, sinks = torch.tensor([0, 700], device="cuda"), torch.randn(8, device="cuda")
    for threshold in (0.0, 0.05):
        options = {"first": first, "sinks": sinks, "splits": 5, "end": 2950}
        found, count = skip_softmax_decode(
            query, key, value, threshold, **options, backend="triton"
        )
        expected, wanted = skip_softmax_decode(
            *(x.double() for x in (query, key, value)), threshold, **options, backend="reference"
        )
        assert torch.equal(count[..., 1], wanted[..., 1])
        assert int((count[..., 0] - wanted[..., 0]).abs().sum()) <= 2
        assert (int(count[..., 0].sum()) > 0) == (threshold > 0)
        assert _error(found, expected) < LIMIT[dtype] + threshold
    found, _ = skip_softmax_decode(query, key, value, 0.01, backend="triton")
    assert bool(torch.isfinite(found).all())
