"""The definition of block-sparse attention against sums written pair by pair; and its errors."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.core import GossamerError
from gossamer.kernels.block_attention import block_attention, block_backend
from tests.kernels.attention_cases import block_case, csr


def _pair_by_pair(case) -> torch.Tensor:
    """One query, one head, one key at a time."""
    options = {"scale": None, "window": None, "softcap": None, "causal": True} | case.options
    (batch, heads, queries, width), keys = case.query.shape, case.key.shape[2]
    lists, shared = case.indptr.shape[1], case.key.shape[1]
    out = torch.zeros(batch, heads, queries, case.value.shape[3], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            i, g = h * lists // heads, h * shared // heads
            for q in range(queries):
                row = case.indptr[b, i, q // case.block[0] :]
                blocks = case.indices[int(row[0]) : int(row[1])].tolist()
                single = set(options["columns"][b, i].tolist()) if "columns" in options else set()
                place = options["query_offset"] + q
                top, scores = [], []
                for k in range(keys):
                    wanted = k // case.block[1] in blocks or k in single
                    wanted &= k <= place or not options["causal"]
                    wanted &= options["window"] is None or k > place - options["window"]
                    wanted &= "first" not in options or k >= int(options["first"][b])
                    if wanted:
                        score = float(case.query[b, h, q] @ case.key[b, g, k]) / math.sqrt(width)
                        if options["softcap"] is not None:
                            score = options["softcap"] * math.tanh(score / options["softcap"])
                        top.append(k)
                        scores.append(score)
                if not scores:
                    continue
                weight = torch.tensor(scores, dtype=torch.float64).exp()
                total = weight.sum()
                if "sinks" in options:
                    total = total + options["sinks"][h].double().exp()
                out[b, h, q] = (weight / total) @ case.value[b, g, top].double()
    return out


@given(
    shape=st.sampled_from([(1, 1, 1), (2, 1, 1), (4, 2, 2), (4, 2, 4), (4, 2, 1)]),
    queries=st.integers(1, 9),
    past=st.integers(0, 6),
    block=st.sampled_from([(1, 1), (2, 3), (4, 4)]),
    columns=st.integers(0, 3),
    flags=st.integers(0, 7),
    window=st.sampled_from([None, 3]),
    causal=st.booleans(),
    seed=st.integers(0, 100),
)
@settings(max_examples=40, deadline=None)
def test_definition_is_the_sum_over_pairs(
    shape, queries, past, block, columns, flags, window, causal, seed
):
    keys = queries + past
    case = block_case(
        *(2, shape, (queries, keys), (4, 3), block),
        offset=past,
        columns=min(columns, keys),
        padded=bool(flags & 1),
        sinks=bool(flags & 2),
        softcap=2.0 if flags & 4 else None,
        window=window,
        causal=causal,
        seed=seed,
        dtype=torch.float64,
    )
    torch.testing.assert_close(block_attention(*case[:-1], **case.options), _pair_by_pair(case))


def test_full_lists_are_dense_attention() -> None:
    query, key, value = (torch.randn(1, h, 50, 8) for h in (4, 2, 2))
    lists = csr(torch.ones(1, 1, 4, 4, dtype=torch.bool))
    found = block_attention(query, key, value, *lists, (16, 16))
    dense = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(found, dense, atol=1e-5, rtol=1e-4)


def test_a_column_inside_a_listed_block_counts_once() -> None:
    query, key, value = (torch.randn(1, 1, 8, 4) for _ in range(3))
    lists = csr(torch.ones(1, 1, 2, 2, dtype=torch.bool))
    plain = block_attention(query, key, value, *lists, (4, 4))
    columns = torch.tensor([[[0, 3, 5, -1]]])
    named = block_attention(query, key, value, *lists, (4, 4), columns=columns)
    assert torch.equal(plain, named)


def test_errors_name_what_is_wrong() -> None:
    query, key, value = (torch.randn(1, h, 8, 4) for h in (2, 2, 2))
    lists = csr(torch.ones(1, 1, 2, 2, dtype=torch.bool))
    assert block_backend(query, key, value, (4, 4)) == "reference"
    for backend in ("triton", "hopper"):
        with pytest.raises(GossamerError, match="the tensors are on cpu; the kernel needs CUDA"):
            block_attention(query, key, value, *lists, (4, 4), backend=backend)
    with pytest.raises(GossamerError, match="backend"):
        block_attention(query, key, value, *lists, (4, 4), backend="nope")  # type: ignore[arg-type]
    with pytest.raises(GossamerError, match="indptr of 4 query blocks"):
        block_attention(query, key, value, *lists, (2, 4))
    with pytest.raises(GossamerError, match="3 query heads do not divide into 2"):
        block_attention(query[:, :1].expand(-1, 3, -1, -1), key, value, *lists, (4, 4))
    with pytest.raises(GossamerError, match="do not fit"):
        block_attention(query, key, value[:, :, :3], *lists, (4, 4))


def test_compilers_see_one_operator() -> None:
    query, key, value = (torch.randn(1, h, 20, 4) for h in (4, 2, 2))
    indptr, indices = csr(torch.rand(1, 2, 3, 3) < 0.7)
    operator = torch.ops.gossamer.block_attention
    rest = ([8, 8], None, None, None, 0, None, None, True)
    compiled = torch.compile(
        lambda q: operator(q, key, value, indptr, indices, *rest) * 2,
        fullgraph=True,
        backend="aot_eager",
    )
    expected = 2 * block_attention(query, key, value, indptr, indices, (8, 8)).transpose(1, 2)
    torch.testing.assert_close(compiled(query), expected)
