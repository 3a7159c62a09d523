"""Paged decoding: dispatch. ``triton`` (CUDA), ``reference`` (any device), ``auto``.

Shapes: B = batch, H = heads, G = key-value heads, P = pages, K = keys, D, E = head widths of
queries and values.
"""

from functools import cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from gossamer.core.errors import GossamerError, unknown
from gossamer.kernels.page_attention.reference import (
    Scorer,
    choose_reference,
    page_attention_reference,
    page_bounds_reference,
    page_scores_reference,
)

__all__ = [
    "Backend",
    "page_attention",
    "page_bounds",
    "page_decode",
    "page_refusal",
    "page_scores",
]

Backend = Literal["auto", "reference", "triton"]
_TYPES = (torch.bfloat16, torch.float16, torch.float32)


@cache
def _triton() -> bool:
    try:
        import triton  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        return False
    return True


def page_refusal(query: Tensor, key: Tensor, value: Tensor, page: int) -> str | None:
    """Why the kernel does not take a call, or None."""
    if query.device.type != "cuda":
        return f"the tensors are on {query.device}; the kernel needs CUDA"
    if not _triton():
        return "triton is not installed"
    if query.shape[2] != 1:
        return f"there are {query.shape[2]} queries a row; the kernel takes one"
    if query.dtype not in _TYPES or key.dtype != query.dtype or value.dtype != query.dtype:
        return (
            f"queries, keys and values are {query.dtype}, {key.dtype} and {value.dtype}; the "
            "kernel takes one of bfloat16, float16 and float32"
        )
    if max(query.shape[3], value.shape[3]) > 256:
        return f"heads are {query.shape[3]} and {value.shape[3]} wide; the kernel takes up to 256"
    if page & (page - 1) or not 1 <= page <= 128:
        return f"pages hold {page} keys; the kernel takes a power of 2 up to 128"
    if any(x.stride(3) != 1 for x in (query, key, value)):
        return "the entries of a head do not lie side by side"
    return None


def _runs(backend: Backend, reason: str | None) -> bool:
    """Whether the kernel runs."""
    if backend not in get_args(Backend):
        raise unknown("backend", backend, get_args(Backend))
    if backend == "triton" and reason is not None:
        raise GossamerError(f"backend triton cannot run here: {reason}; use backend='reference'")
    return backend != "reference" and reason is None


def _check(query: Tensor, key: Tensor, value: Tensor) -> None:
    if query.shape[1] % key.shape[1]:
        raise GossamerError(
            f"{query.shape[1]} query heads do not divide into {key.shape[1]} key-value heads"
        )
    if (
        query.shape[2] != 1
        or key.shape[:3] != value.shape[:3]
        or len(key) != len(query)
        or key.shape[3] != query.shape[3]
    ):
        raise GossamerError(
            f"queries {tuple(query.shape)}, keys {tuple(key.shape)} and values "
            f"{tuple(value.shape)} do not fit; decoding takes one query a row"
        )


def page_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indptr: Tensor,
    indices: Tensor,
    page: int,
    *,
    end: int | None = None,
    first: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Attention of one token that reads only the listed pages of keys.

    Parameters
    ----------
    query : (B, H, 1, D). key : (B, G, K, D). value : (B, G, K, E), of any strides: caches are
        read where they lie.
    indptr : int, (B or 1, G or 1, 2), offsets into ``indices``. indices : int, page numbers, each
        once. page : keys of a page; page n holds keys n * page and following.
    end : keys that exist (a static cache is longer); all when left out.
    first : int, (B,), the first key each row reads: left padding, or a window of the model's.
    scale : on the scores; D ** -0.5 when left out. softcap, sinks : as in ``block_attention``.

    Returns
    -------
    (B, H, 1, E); rows that read nothing give zeros.

    Raises
    ------
    GossamerError
        On shapes that do not fit, or if backend triton cannot run.
    """
    _check(query, key, value)
    options: dict[str, Any] = {"first": first, "softcap": softcap, "sinks": sinks}
    if not _runs(backend, page_refusal(query, key, value, page)):
        return page_attention_reference(
            *(query, key, value, indptr, indices, page), end=end, scale=scale, **options
        )
    from gossamer.kernels.page_attention.decode import decode

    return decode(
        *(query, key, value, page),
        end=key.shape[2] if end is None else end,
        scale=query.shape[3] ** -0.5 if scale is None else scale,
        indptr=indptr,
        indices=indices.to(torch.int32),
        **_prepared(options, query),
    )


def _prepared(options: dict[str, Any], query: Tensor) -> dict[str, Any]:
    first, sinks = options["first"], options["sinks"]
    if first is not None:
        options["first"] = first.to(torch.int32).expand(len(query)).contiguous()
    if sinks is not None:
        options["sinks"] = sinks.float().contiguous()
    return options


def page_bounds(
    key: Tensor, page: int, scorer: Scorer = "minmax", *, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """Two vectors of every whole page of keys (B, G, K, D), in one pass over them.

    Returns
    -------
    (B, G, K // page, D) twice, in the keys' dtype: least and greatest of each channel, or mean
    and standard deviation (``meanstd``).
    """
    _check_scorer(scorer)
    if not _runs(backend, page_refusal(key[:, :, :1], key, key, page)):
        return page_bounds_reference(key, page, scorer)
    from gossamer.kernels.page_attention.decode import bounds

    return bounds(key, page, scorer == "minmax")


def _check_scorer(scorer: str) -> None:
    if scorer not in get_args(Scorer):
        raise unknown("page scorer", scorer, get_args(Scorer))


def page_scores(
    query: Tensor,
    first: Tensor,
    second: Tensor,
    scorer: Scorer = "minmax",
    *,
    backend: Backend = "auto",
) -> Tensor:
    """Estimated largest q . k of every page, summed over the heads that share keys.

    Parameters
    ----------
    query : (B, H, 1, D). first, second : (B, G, P, D) of :func:`page_bounds`.

    Returns
    -------
    (B, G, P) float32.
    """
    _check_scorer(scorer)
    reason = page_refusal(query, first, second, 1)
    if not _runs(backend, reason):
        return page_scores_reference(query, first, second, scorer)
    from gossamer.kernels.page_attention.decode import scores

    return scores(query, first, second, scorer == "minmax")


def page_decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score: Tensor,
    keep: int,
    page: int,
    *,
    end: int | None = None,
    first: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Attention of one token over the pages with the highest scores, chosen on the device.

    Nothing returns to the host, so a step of decoding can be captured in a CUDA graph.

    Parameters
    ----------
    score : float32, (B, G, P), of the pages before the token's own, P = (end - 1) // page.
        No NaN. Of equal scores the earlier pages are taken.
    keep : pages read, the token's own among them in any case; 1 to P + 1.

    Others as in :func:`page_attention`.

    Raises
    ------
    GossamerError
        On shapes or a ``keep`` that do not fit, or if backend triton cannot run.
    """
    _check(query, key, value)
    end = key.shape[2] if end is None else end
    pages = (end - 1) // page
    if score.shape != (*key.shape[:2], pages) or not 1 <= keep <= pages + 1:
        raise GossamerError(
            f"{end} keys in pages of {page} take scores (batch, heads, {pages}) and keep 1 to "
            f"{pages + 1} pages; got {tuple(score.shape)} and {keep}"
        )
    options: dict[str, Any] = {"first": first, "softcap": softcap, "sinks": sinks}
    reason = page_refusal(query, key, value, page)
    if reason is None:
        from gossamer.kernels.page_attention.decode import MOST_PAGES, choose, decode

        if pages > MOST_PAGES:
            reason = f"a row has {pages} pages; the kernel chooses among {MOST_PAGES} at most"
        elif _runs(backend, None):
            return decode(
                *(query, key, value, page),
                end=end,
                scale=query.shape[3] ** -0.5 if scale is None else scale,
                indices=choose(score.contiguous(), keep),
                keep=keep,
                **_prepared(options, query),
            )
    _runs(backend, reason)
    chosen = choose_reference(score, keep)
    rows = torch.arange(chosen[..., 0].numel(), device=chosen.device) * keep
    starts = rows.view(chosen.shape[:2])
    indptr = torch.stack([starts, starts + keep], dim=-1)
    return page_attention(
        *(query, key, value, indptr, chosen.flatten(), page),
        end=end,
        scale=scale,
        **options,
        backend="reference" if backend == "reference" else "auto",
    )
