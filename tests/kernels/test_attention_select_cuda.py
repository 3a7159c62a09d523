"""Selection kernels on a GPU against their definitions; skipped where there is none."""

import pytest
import torch

from gossamer.kernels.attention_select import (
    Tiling,
    block_lists,
    block_means,
    cover_lines,
    last_mass,
    mass_cut,
    pooled_share,
    top_lines,
)
from gossamer.methods.attention.executor import Call
from gossamer.methods.attention.flexprefill import FlexPrefill
from gossamer.methods.attention.head_search import Head
from gossamer.methods.attention.index import BlockIndex
from gossamer.methods.attention.layout import Layout
from gossamer.methods.attention.minference import HeadSelector

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
        found = block_means(x, block, tail=True, backend="triton")
        expected = block_means(x, block, tail=True, backend="reference")
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [1, 100, 5000, 70000, 200000])
def test_mass_cut_is_exact(size) -> None:
    weights = torch.rand(3, size, device="cuda").square()
    weights[0] = 1.0
    weights[1, ::3] = 0.25
    weights = weights / weights.sum(-1, keepdim=True)
    for mass in (1e-9, 0.3, 0.9, 0.9999, 1.0, 2.0):
        found = mass_cut(weights, mass, backend="triton")
        assert torch.equal(found, mass_cut(weights, mass, backend="reference")), mass


@pytest.mark.parametrize("case", [(4, 2, 40, 3, 50), (32, 8, 256, 0, 256), (6, 2, 9, 0, 9)])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_pooled_share(case, softcap) -> None:
    heads, shared, rows, base, blocks = case
    query = torch.randn(2, heads, rows + 1, 128, device="cuda")
    key = torch.randn(2, shared, blocks, 128, device="cuda")
    options = {"base": base, "softcap": softcap}
    found = pooled_share(query, key, **options, backend="triton")
    expected = pooled_share(query, key, **options, backend="reference")
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("case", [(300, 16, 19, 2), (32768, 128, 256, 4), (131072, 128, 1024, 4)])
def test_cover_lines(case) -> None:
    keys, block, blocks, least = case
    for gamma in (0.3, 0.9):
        vertical, slash = (torch.rand(2, 3, keys, device="cuda").pow(8) for _ in range(2))
        vertical, slash = (x / x.sum(-1, keepdim=True) for x in (vertical, slash))
        guess = torch.nn.functional.pad(vertical, (0, blocks * block - keys))
        guess = guess.unflatten(-1, (blocks, block)).sum(-1)
        guess[:, 1] = 1 / blocks
        guess[:, 1, :3] += 0.3
        options = {"block": block, "gamma": gamma, "tau": 0.1, "least": least}
        found = cover_lines(guess, vertical, slash, **options, backend="triton")
        expected = cover_lines(guess, vertical, slash, **options, backend="reference")
        assert torch.equal(found[2], expected[2])
        for one, two in zip(found, expected, strict=True):
            # Sums in another order may move the last line of a head.
            assert int((one != two).sum(-1).max()) <= (2 if one.dim() == 3 and blocks > 100 else 0)


@pytest.mark.parametrize("case", [(96, 96, 0, 16), (50, 90, 40, 20), (32768, 32768, 0, 128)])
def test_top_lines_and_block_lists(case) -> None:
    tiling = Tiling(*case, case[3])
    end, none = tiling.base + tiling.queries, -(1 << 30)
    vertical, slash = (torch.rand(2, 4, end, device="cuda") for _ in range(2))
    slash[0, 0], vertical[0, 1, ::2] = 0.0, 0.5
    numbers = [[5, 9, 0, none], [0, 0, 2, 30], [end, 3, 1, -none], [end // 9, end // 9, 0, 1]]
    wanted = torch.tensor(numbers, dtype=torch.int32, device="cuda")
    options = {"width": end, "sink": 3, "local": 4}
    found = top_lines(vertical, slash, wanted, tiling, **options, backend="triton")
    if end > 1000:
        # The definition compares every distance with every diagonal.
        expected = top_lines(vertical, slash, wanted, tiling, **options, backend="triton")
        chosen = vertical[0, 3].index_fill(0, torch.arange(3, device="cuda"), torch.inf)
        chosen = chosen.topk(end // 9).indices.sort().values
        assert torch.equal(found[0][0, 3, : end // 9], chosen)
    else:
        expected = top_lines(vertical, slash, wanted, tiling, **options, backend="reference")
    for one, two in zip(found, expected, strict=True):
        assert torch.equal(one, two)
    kept = torch.rand(2, 4, tiling.rows, tiling.columns, device="cuda") > 0.8
    use = torch.rand(2, 4, device="cuda") > 0.5
    for given in (
        {"kept": kept},
        {"kept": kept, "use": use},
        {"lines": found[1:]},
        {"kept": kept, "use": use, "lines": found[1:]},
    ):
        fast = block_lists(tiling, **given, backend="triton")
        slow = block_lists(tiling, **given, backend="reference")
        for one, two in zip(fast, slow, strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize("chunk", [(2048, 2048), (1024, 3000), (999, 999)])
def test_selectors_choose_what_they_choose_on_a_cpu(chunk) -> None:
    queries, keys = chunk
    g = torch.Generator().manual_seed(0)
    query = torch.randn(1, 8, queries, 64, generator=g)
    key = torch.randn(1, 4, keys, 64, generator=g)
    query[..., 0] += 3.0
    key[:, :2, torch.randint(0, keys, (30,), generator=g), 0] += 9.0
    heads = (
        Head("vertical_slash", 100, 300),
        Head("a_shape", 130, 500),
        Head("block_sparse", 5, 1),
        Head("vertical_slash", 40, 10),
    )
    flex = FlexPrefill(gamma=0.8, block_size=64).plan(torch.nn.Module(), None, keys)
    for selector in (flex, HeadSelector((heads,), 64, 64, 30, 100)):
        chosen: list[torch.Tensor] = []
        for device in ("cpu", "cuda"):
            at = Layout(1, queries, keys, keys - queries, device=torch.device(device))
            call = Call(query.to(device), key.to(device), key.to(device))
            index = selector.select(call, at, 0)
            assert isinstance(index, BlockIndex)
            chosen.append(index.blocks().cpu())
        # Rounding may move what lies at the cut.
        assert int((chosen[0] != chosen[1]).sum()) <= 0.002 * chosen[0].numel()
