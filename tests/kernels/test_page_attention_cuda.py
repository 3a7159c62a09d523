"""Paged decoding on a GPU against its definition; skipped where there is none."""

import pytest
import torch

from gossamer.kernels.page_attention import page_attention, page_bounds, page_decode, page_scores
from gossamer.kernels.page_attention.reference import choose_reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

LIMIT = {torch.float32: 1e-5, torch.float16: 1.5e-3, torch.bfloat16: 8e-3}


def _error(found, expected) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def _call(batch, heads, shared, keys, widths, dtype):
    g = torch.Generator("cuda").manual_seed(keys)
    make = lambda *s: torch.randn(*s, device="cuda", generator=g).to(dtype)  # noqa: E731
    query = make(batch, heads, 1, widths[0])
    # As a static cache gives them, and as a model's projections lie.
    return (
        query,
        make(batch, shared, keys, widths[0]),
        make(batch, keys, shared, widths[1]).transpose(1, 2),
    )


@pytest.mark.parametrize(
    ("page", "shape", "dtype"),
    [
        (16, (1, 8, 2, 3000, (128, 128)), torch.bfloat16),
        (1, (1, 8, 2, 900, (128, 128)), torch.bfloat16),
        (64, (3, 6, 2, 1111, (64, 96)), torch.float16),
        (32, (2, 4, 4, 500, (80, 80)), torch.float32),
        (16, (1, 32, 1, 777, (256, 256)), torch.bfloat16),
        (1, (1, 4, 1, 20_000, (64, 64)), torch.bfloat16),
    ],
)
def test_matches_float64(page, shape, dtype) -> None:
    query, key, value = _call(*shape, dtype)
    batch, shared, keys = key.shape[:3]
    end = keys - 3
    pages = (end - 1) // page
    score = torch.randn(batch, shared, pages, device="cuda")
    score[:, :, ::3] = 0.5  # ties
    first = torch.randint(0, keys // 2, (batch,), device="cuda")
    sinks = torch.randn(query.shape[1], device="cuda")
    for keep, options in (
        (max(1, pages // 3), {}),
        (pages + 1, {"first": first, "sinks": sinks}),
        (1, {"softcap": 3.0}),
    ):
        chosen = choose_reference(score, keep)
        rows = torch.arange(batch * shared, device="cuda").view(batch, shared) * keep
        indptr = torch.stack([rows, rows + keep], dim=-1)
        listed = (indptr, chosen.flatten().to(torch.int32), page)
        wide = [x.double() for x in (query, key, value)]
        expected = page_attention(*wide, *listed, end=end, **options, backend="reference")
        torch.empty(8 << 20, device="cuda").fill_(float("nan"))
        options |= {"end": end, "backend": "triton"}
        found = page_attention(query, key, value, *listed, **options)
        assert _error(found, expected) < LIMIT[dtype]
        assert torch.equal(found, page_attention(query, key, value, *listed, **options))
        again = page_decode(query, key, value, score, keep, page, **options)
        assert _error(again, expected) < LIMIT[dtype]


@pytest.mark.parametrize("scorer", ["minmax", "meanstd"])
@pytest.mark.parametrize("page", [16, 64])
def test_bounds_and_scores(scorer, page) -> None:
    query, key, _ = _call(2, 8, 2, 1000, (128, 128), torch.bfloat16)
    one, two = page_bounds(key, page, scorer, backend="triton")
    expected = page_bounds(key, page, scorer, backend="reference")
    if scorer == "minmax":
        assert torch.equal(one, expected[0])
        assert torch.equal(two, expected[1])
    assert _error(one, expected[0]) < 4e-3
    assert _error(two, expected[1]) < 4e-3
    found = page_scores(query, *expected, scorer, backend="triton")
    wanted = page_scores(query.double(), *expected, scorer, backend="reference")
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-5)


def test_a_step_is_captured_and_follows_its_inputs() -> None:
    query, key, value = _call(1, 8, 2, 2048, (128, 128), torch.bfloat16)
    one, two = page_bounds(key[:, :, :2032], 16)

    def step():
        score = page_scores(query, one, two)
        return page_decode(query, key, value, score, 16, 16)

    step()
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        out = step()
    query.copy_(torch.randn_like(query))
    captured.replay()
    assert torch.equal(out, step())


@pytest.mark.parametrize("keys", [17, 2047, 2049, 66000])
def test_scores_of_some_of_the_remembered_pages_choose_in_a_longer_cache(keys) -> None:
    """As decoding calls them: summaries are a slice, the cache has room, pages grow by one."""
    query, key, value = _call(2, 8, 2, keys + 40, (128, 128), torch.bfloat16)
    one, two = page_bounds(key, 16)
    pages = (keys - 1) // 16
    score = page_scores(query, one[:, :, :pages], two[:, :, :pages], backend="triton")
    wanted = page_scores(query.double(), one[:, :, :pages], two[:, :, :pages], backend="reference")
    torch.testing.assert_close(score, wanted, atol=1e-2, rtol=1e-4)
    for keep in {1, min(3, pages + 1), max(1, pages // 2), pages + 1}:
        found = page_decode(query, key, value, score, keep, 16, end=keys, backend="triton")
        wide = [x.double() for x in (query, key, value)]
        expected = page_decode(*wide, score, keep, 16, end=keys, backend="reference")
        assert _error(found, expected) < LIMIT[torch.bfloat16], keep
