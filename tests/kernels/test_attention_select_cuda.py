"""Selection kernels on a GPU against their definitions; skipped where there is none."""

import pytest
import torch

from gossamer.kernels.attention_select import block_means, last_mass, mass_cut

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("count", [1, 37, 64, 128])
@pytest.mark.parametrize(
    ("dtype", "width"), [(torch.bfloat16, 128), (torch.float32, 64), (torch.float16, 80)]
)
def test_last_mass(count, dtype, width) -> None:
    for batch, heads, shared, keys, padded, softcap in (
        (1, 8, 2, 3000, False, None),
        (2, 6, 2, 1111, True, 4.0),
        (1, 2, 2, 128, False, None),
    ):
        query = torch.randn(batch, count, heads, width, device="cuda").to(dtype).transpose(1, 2)
        key = torch.randn(batch, shared, keys, width, device="cuda").to(dtype)
        first = torch.randint(0, keys // 2, (batch,), device="cuda") if padded else None
        options = {"first": first, "softcap": softcap}
        found = last_mass(query, key, **options, backend="triton")
        expected = last_mass(query, key, **options, backend="reference")
        for one, two in zip(found, expected, strict=True):
            assert one.shape == two.shape
            torch.testing.assert_close(one.sum(-1), torch.ones_like(one[..., 0]))
            assert float((one - two).abs().sum(-1).max()) < (1e-4 if width == 64 else 2e-3)


def test_block_means() -> None:
    for block in (16, 100, 128):
        x = torch.randn(2, 999, 3, 96, device="cuda").bfloat16().transpose(1, 2)
        first = torch.tensor([0, 333], device="cuda")
        for own in (None, first):
            found = block_means(x, block, first=own, backend="triton")
            expected = block_means(x, block, first=own, backend="reference")
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [1, 100, 5000, 70000])
def test_mass_cut_is_exact(size) -> None:
    weights = torch.rand(3, size, device="cuda").square()
    weights[0] = 1.0
    weights[1, ::3] = 0.25
    weights = weights / weights.sum(-1, keepdim=True)
    for mass in (1e-9, 0.3, 0.9, 0.9999, 1.0, 2.0):
        found = mass_cut(weights, mass, backend="triton")
        assert torch.equal(found, mass_cut(weights, mass, backend="reference")), mass
