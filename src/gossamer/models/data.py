"""Data: documents and images become batches that a model's own forward accepts.

Shapes: N windows of T tokens; B windows in a batch.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gossamer.core import GossamerError, check_count
from gossamer.models.documents import read_documents

__all__ = ["Inputs", "Tokens", "as_tokens", "check_vocabulary", "context_length"]

# Text tokenised for a sample of windows; 64 windows of 1024 tokens need about 0.3 MB of it.
_SAMPLED_CHARACTERS = 1 << 24


@dataclass(frozen=True, eq=False)
class Tokens:
    """Windows of token ids of one length, with the padding marked.

    Parameters
    ----------
    input_ids : (N, T) int64.
    attention_mask : (N, T) bool, True for real tokens.

    Raises
    ------
    GossamerError
        If there is no window, the shapes differ, or a window has no real token.
    """

    input_ids: Tensor
    attention_mask: Tensor

    def __post_init__(self) -> None:
        ids, mask = self.input_ids, self.attention_mask
        if ids.dim() != 2 or not ids.numel():
            raise GossamerError(f"token ids have shape {tuple(ids.shape)}; give (windows, tokens)")
        if ids.dtype.is_floating_point or ids.dtype == torch.bool:
            raise GossamerError(f"token ids are {ids.dtype}; give whole numbers")
        if mask.shape != ids.shape:
            raise GossamerError(
                f"the attention mask has shape {tuple(mask.shape)}, the ids {tuple(ids.shape)}"
            )
        object.__setattr__(self, "input_ids", ids.long())
        object.__setattr__(self, "attention_mask", mask.bool())
        if not bool(self.attention_mask.any(1).all()):
            raise GossamerError("a window holds padding only; leave it out")

    @classmethod
    def from_ids(cls, input_ids: Tensor) -> "Tokens":
        """Windows without padding."""
        return cls(input_ids, torch.ones_like(input_ids, dtype=torch.bool))

    @classmethod
    def from_documents(
        cls,
        documents: Sequence[str],
        tokenizer: Any,
        *,
        length: int,
        samples: int | None = None,
        seed: int = 0,
    ) -> "Tokens":
        """Cut the documents, joined by the end-of-text token, into consecutive full windows.

        A tokenizer that opens every text with a special token (Llama, Gemma, BERT) opens every
        window with it; the rest of the windows tile the joined documents exactly, and what
        does not fill a last window is left out.

        Parameters
        ----------
        length : tokens per window, at least 2.
        samples : at most this many windows, drawn without replacement and kept in order;
            None takes all.
        seed : of the draw.

        Raises
        ------
        GossamerError
            If the documents do not fill one window.
        """
        check_count("length", length, 2)
        if samples is not None:
            check_count("samples", samples, 1)
            check_count("seed", seed, 0)
            documents = _enough(documents, seed)
        prefix, separator = _specials(tokenizer)
        body = length - len(prefix)
        stream: list[int] = []
        for ids in _encode(tokenizer, list(documents)):
            stream += ids
            stream += separator
        count = len(stream) // body
        if not count:
            raise GossamerError(
                f"the text holds {len(stream)} tokens, one window needs {body}; "
                "give more text or a shorter length"
            )
        windows = torch.tensor(stream[: count * body], dtype=torch.int64).view(count, body)
        if samples is not None and samples < count:
            generator = torch.Generator().manual_seed(seed)
            chosen = torch.randperm(count, generator=generator)[:samples]
            windows = windows[chosen.sort().values]
        opening = torch.tensor(prefix, dtype=torch.int64).expand(len(windows), -1)
        return cls.from_ids(torch.cat([opening, windows], 1))

    @classmethod
    def from_texts_padded(
        cls,
        texts: Sequence[str],
        tokenizer: Any,
        *,
        length: int | None = None,
        side: Literal["left", "right"] = "right",
    ) -> "Tokens":
        """One window per text, cut at ``length`` tokens and padded to the longest."""
        if side not in ("left", "right"):
            raise GossamerError(f"side is {side!r}; give 'left' or 'right'")
        prefix, _ = _specials(tokenizer)
        rows = [(prefix + ids)[:length] for ids in _encode(tokenizer, list(texts))]
        if not rows or not all(rows):
            raise GossamerError("a text has no tokens; leave empty texts out")
        width = max(map(len, rows))
        pad = getattr(tokenizer, "pad_token_id", None)
        ids = torch.full((len(rows), width), 0 if pad is None else pad, dtype=torch.int64)
        mask = torch.zeros(len(rows), width, dtype=torch.bool)
        for i, row in enumerate(rows):
            span = slice(width - len(row), width) if side == "left" else slice(0, len(row))
            ids[i, span] = torch.tensor(row)
            mask[i, span] = True
        return cls(ids, mask)

    def batches(
        self, size: int, device: torch.device | str | None = None
    ) -> Iterator[dict[str, Tensor]]:
        """The windows in order, as keyword arguments of a model.

        ``attention_mask`` is left out of a batch without padding, so that attention kernels
        keep their causal fast path. A batch padded on the left also carries ``position_ids``
        that count real tokens only, as ``generate`` would.
        """
        check_count("batch size", size, 1)
        for start in range(0, len(self), size):
            ids = self.input_ids[start : start + size].to(device)
            mask = self.attention_mask[start : start + size].to(device)
            batch = {"input_ids": ids}
            if not bool(mask.all()):
                batch["attention_mask"] = mask.long()
                if not bool(mask[:, 0].all()):
                    batch["position_ids"] = (mask.long().cumsum(1) - 1).clamp_min(0)
            yield batch

    def slice(self, start: int, stop: int | None = None) -> "Tokens":
        """Windows ``start`` to ``stop``; with one argument the first ``start`` windows."""
        span = slice(0, start) if stop is None else slice(start, stop)
        return Tokens(self.input_ids[span], self.attention_mask[span])

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def length(self) -> int:
        """Tokens per window, padding included."""
        return self.input_ids.shape[1]

    @property
    def count(self) -> int:
        """Real tokens in all windows."""
        return int(self.attention_mask.sum())


@dataclass(frozen=True, eq=False)
class Inputs:
    """Ready-made keyword arguments of a model, such as ``pixel_values`` of a vision model.

    Parameters
    ----------
    values : name to tensor; the first dimension of all counts the samples.
    """

    values: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        sizes = {name: len(value) for name, value in self.values.items()}
        if not sizes or len(set(sizes.values())) != 1 or 0 in sizes.values():
            raise GossamerError(f"the inputs need one common number of samples; they have {sizes}")

    def batches(
        self, size: int, device: torch.device | str | None = None
    ) -> Iterator[dict[str, Tensor]]:
        """The samples in order, as keyword arguments of a model."""
        check_count("batch size", size, 1)
        for start in range(0, len(self), size):
            yield {k: v[start : start + size].to(device) for k, v in self.values.items()}

    def __len__(self) -> int:
        return len(next(iter(self.values.values())))


def context_length(model: nn.Module) -> int | None:
    """Most tokens the model was made for, or None where it sets no limit."""
    config = getattr(model, "config", None)
    if config is None:
        return None
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    for name, module in model.named_modules():
        # RoBERTa's learned positions start behind the padding index.
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            limit = module.num_embeddings
            if module.padding_idx is not None:
                limit -= module.padding_idx + 1
            break
    return limit if isinstance(limit, int) and limit > 0 else None


def as_tokens(
    data: Any,
    model: Any,
    *,
    samples: int = 64,
    length: int = 1024,
    seed: int = 0,
    tokenizer: Any = None,
) -> Tokens:
    """Whatever a user may mean by calibration data, as windows of tokens.

    Parameters
    ----------
    data : Tokens; (N, T) token ids; a mapping with ``input_ids`` and maybe ``attention_mask``;
        a list of texts; the path of a text, JSONL or parquet file; or None for the packaged
        calibration text.
    samples, length, seed : windows cut from texts; ``length`` is clipped to the model's context.
    tokenizer : for texts; None takes the one found beside the model.

    Raises
    ------
    GossamerError
        If the data is none of these, is too short, or holds ids outside the vocabulary.
    """
    if isinstance(data, Inputs):
        raise GossamerError("this method needs tokens; the data holds ready-made inputs")
    if isinstance(data, Tokens):
        tokens = data
    elif isinstance(data, Tensor):
        tokens = Tokens.from_ids(data)
    elif hasattr(data, "keys") and "input_ids" in data:
        ids = torch.as_tensor(data["input_ids"])
        mask = data["attention_mask"] if "attention_mask" in data else torch.ones_like(ids)
        tokens = Tokens(ids, torch.as_tensor(mask))
    else:
        tokens = _from_texts(data, model, tokenizer, samples=samples, length=length, seed=seed)
    check_vocabulary(tokens, model)
    return tokens


def _from_texts(
    data: Any, model: Any, tokenizer: Any, *, samples: int, length: int, seed: int
) -> Tokens:
    from gossamer.models.loading import find_tokenizer

    if data is None or isinstance(data, str | Path):
        documents = read_documents(data, "calibration")
    elif isinstance(data, Sequence) and all(isinstance(text, str) for text in data):
        documents = list(data)
    else:
        raise GossamerError(
            f"data is a {type(data).__name__}; give Tokens, (windows, tokens) ids, a list of "
            "texts, or the path of a text, JSONL or parquet file"
        )
    limit = context_length(model)
    return Tokens.from_documents(
        documents,
        find_tokenizer(model) if tokenizer is None else tokenizer,
        length=length if limit is None else min(length, limit),
        samples=samples,
        seed=seed,
    )


def check_vocabulary(tokens: Tokens, model: Any) -> None:
    """Refuse ids that the model's embedding has no row for."""
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    size = getattr(embedding, "num_embeddings", None)
    low, high = int(tokens.input_ids.min()), int(tokens.input_ids.max())
    if low < 0 or (size is not None and high >= size):
        raise GossamerError(
            f"token ids go from {low} to {high}, the model's vocabulary from 0 to "
            f"{'...' if size is None else size - 1}; tokenise with the model's own tokenizer"
        )


def _enough(documents: Sequence[str], seed: int) -> list[str]:
    """A seeded choice of documents, in order, once there is more text than a sample needs."""
    if sum(map(len, documents)) <= _SAMPLED_CHARACTERS:
        return list(documents)
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed))
    left, chosen = _SAMPLED_CHARACTERS, {}
    for index in order.tolist():
        chosen[index] = documents[index][:left]
        left -= len(chosen[index])
        if not left:
            break
    return [chosen[index] for index in sorted(chosen)]


def _encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    if not texts:
        return []
    # verbose=False: documents longer than the context are wanted here, they are cut later.
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


def _specials(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before every text, and what ends a text; each 0 or 1 ids."""
    opening = tokenizer("")["input_ids"]
    starts = {getattr(tokenizer, name, None) for name in ("bos_token_id", "cls_token_id")}
    prefix = opening[:1] if opening and opening[0] in starts - {None} else []
    ends = (getattr(tokenizer, name, None) for name in ("eos_token_id", "sep_token_id"))
    end = next((token for token in ends if token is not None), None)
    return prefix, [] if end is None else [end]
