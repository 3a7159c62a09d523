"""Block-sparse attention on a GPU against its definition; skipped where there is none."""

import pytest
import torch

from gossamer.kernels.block_attention import block_attention, block_backend
from tests.kernels.attention_cases import block_case, csr

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

LIMIT = {torch.float32: 1e-5, torch.float16: 1.5e-3, torch.bfloat16: 8e-3}


def _error(case, backend: str) -> float:
    arguments = case[:-1]
    wide = [x.double() for x in arguments[:3]]
    expected = block_attention(*wide, *arguments[3:], **case.options, backend="reference")
    torch.empty(64 << 20, device="cuda").fill_(float("nan"))  # what is not written shows
    found = block_attention(*arguments, **case.options, backend=backend)
    assert found.dtype == case.query.dtype
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("backend", "dtype", "width", "block"),
    [
        ("hopper", torch.bfloat16, 128, (128, 128)),
        ("hopper", torch.float16, 64, (64, 64)),
        ("hopper", torch.bfloat16, 128, (256, 64)),
        ("triton", torch.bfloat16, 128, (128, 128)),
        ("triton", torch.float16, 64, (64, 64)),
        ("triton", torch.float32, 128, (128, 64)),
        ("triton", torch.bfloat16, 96, (64, 128)),
        ("triton", torch.bfloat16, 256, (128, 128)),
    ],
)
def test_matches_float64(backend, dtype, width, block) -> None:
    plain = {"dtype": dtype, "device": "cuda"}
    cases = [
        block_case(1, (8, 2, 2), (700, 700), (width, width), block, **plain),
        block_case(2, (8, 2, 8), (300, 900), (width, width), block, offset=600, **plain),
        block_case(
            *(2, (4, 2, 2), (257, 640), (width, width), block),
            **dict(offset=383, columns=77, padded=True, **plain),
        ),
        block_case(
            *(2, (8, 4, 1), (257, 640), (width, width), block),
            offset=300,
            columns=33,
            padded=True,
            sinks=True,
            softcap=5.0,
            window=200,
            **plain,
        ),
        block_case(1, (4, 2, 1), (200, 1000), (width, width), block, causal=False, **plain),
        block_case(1, (4, 2, 1), (400, 400), (width, width), block, kept=0.0, columns=60, **plain),
    ]
    if block[0] == 64 and backend == "hopper":
        assert block_backend(*cases[1][:3], block, 8) == "triton"
        del cases[1]
    errors = [_error(case, backend) for case in cases]
    assert max(errors) < LIMIT[dtype], errors


def test_long_lists_and_unequal_widths() -> None:
    case = block_case(
        *(1, (8, 2, 2), (2048, 8192), (128, 128), (128, 128)),
        offset=6144,
        kept=0.7,
        columns=300,
        dtype=torch.bfloat16,
        device="cuda",
    )
    for backend in ("hopper", "triton"):
        assert _error(case, backend) < LIMIT[torch.bfloat16]
        case.options.pop("columns", None)
    other = block_case(
        *(2, (4, 4, 4), (130, 130), (192, 128), (64, 64)),
        dtype=torch.bfloat16,
        device="cuda",
    )
    assert _error(other, "triton") < LIMIT[torch.bfloat16]


def test_runs_are_equal_and_rows_without_keys_are_zero() -> None:
    case = block_case(
        *(1, (8, 2, 2), (600, 600), (128, 128), (128, 128)),
        kept=0.5,
        columns=50,
        dtype=torch.bfloat16,
        device="cuda",
    )
    for backend in ("hopper", "triton"):
        one = block_attention(*case[:-1], **case.options, backend=backend)
        for _ in range(5):
            again = block_attention(*case[:-1], **case.options, backend=backend)
            assert torch.equal(one, again)
        indptr, indices = csr(torch.zeros(1, 1, 5, 5, dtype=torch.bool, device="cuda"))
        none = block_attention(*case[:3], indptr, indices, (128, 128), backend=backend)
        assert int(none.count_nonzero()) == 0


def test_faults_in_keys_that_are_not_listed_stay_out() -> None:
    case = block_case(
        *(1, (4, 2, 2), (512, 512), (128, 128), (128, 128)),
        dtype=torch.bfloat16,
        device="cuda",
    )
    kept = torch.eye(4, dtype=torch.bool, device="cuda")[None, None]
    kept[..., 1:, 0] = True
    kept[..., 3] = False
    indptr, indices = csr(kept)
    for backend in ("hopper", "triton"):
        key, value = case.key.clone(), case.value.clone()
        key[:, :, 384:] = float("nan")
        value[:, :, 384:] = float("nan")
        found = block_attention(
            case.query, key, value, indptr, indices, (128, 128), backend=backend
        )
        assert bool(torch.isfinite(found[:, :, :384]).all())
