"""Labelled: windows of tokens with what they are about, for methods that contrast or control.

An attribute gives every window one of a few values: its label, its topic, the name in it.
Shapes: N windows of T tokens.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core import GossamerError, unknown
from gossamer.models.data import Tokens, as_tokens, check_vocabulary, context_length

__all__ = ["Labelled", "as_labelled"]


@dataclass(frozen=True, eq=False)
class Labelled:
    """Windows of tokens and their attributes.

    Parameters
    ----------
    tokens : N windows.
    attributes : name to int64 (N,), the number of each window's value.
    values : name to what the numbers stand for; a name that is left out counts them.

    Raises
    ------
    GossamerError
        If an attribute does not fit the windows.
    """

    tokens: Tokens
    attributes: Mapping[str, Tensor]
    values: Mapping[str, tuple[str, ...]]

    def __post_init__(self) -> None:
        if not self.attributes:
            raise GossamerError("the windows have no attribute; give each a label")
        named: dict[str, tuple[str, ...]] = dict(self.values)
        for name, codes in self.attributes.items():
            if codes.shape != (len(self.tokens),) or codes.dtype != torch.int64:
                raise GossamerError(
                    f"attribute {name!r} is {codes.dtype} {tuple(codes.shape)}; give a whole "
                    f"number for each of the {len(self.tokens)} windows"
                )
            named.setdefault(name, tuple(str(i) for i in range(int(codes.max()) + 1)))
            if int(codes.min()) < 0 or int(codes.max()) >= len(named[name]):
                raise GossamerError(f"attribute {name!r} has numbers outside its values")
        object.__setattr__(self, "values", named)

    @classmethod
    def from_ids(cls, ids: Tensor, **attributes: Tensor) -> "Labelled":
        """Windows without padding, with attributes of numbered values."""
        return cls(Tokens.from_ids(ids), attributes, {})

    def codes(self, attribute: str) -> Tensor:
        """(N,) numbers of an attribute's values.

        Raises
        ------
        GossamerError
            For an unknown attribute, offering the nearest.
        """
        if attribute not in self.attributes:
            raise unknown("attribute", attribute, tuple(self.attributes))
        return self.attributes[attribute]

    def number(self, attribute: str, value: str) -> int:
        """The number of a value.

        Raises
        ------
        GossamerError
            For an unknown attribute or value, or a value that no window has.
        """
        codes, known = self.codes(attribute), self.values[attribute]
        if value not in known:
            raise unknown(f"value of {attribute!r}", value, known)
        number = known.index(value)
        if not bool((codes == number).any()):
            raise GossamerError(f"no window has {attribute!r} = {value!r}; give some")
        return number

    def where(self, attribute: str, value: str) -> Tokens:
        """The windows with a value."""
        return self.at(self.codes(attribute) == self.number(attribute, value))

    def at(self, rows: Tensor) -> Tokens:
        """Windows by places or by a mask."""
        return Tokens(self.tokens.input_ids[rows], self.tokens.attention_mask[rows])

    def __len__(self) -> int:
        return len(self.tokens)


def as_labelled(
    data: Any, model: nn.Module, *, length: int = 1024, tokenizer: Any = None
) -> Labelled:
    """Whatever a user may mean by labelled text.

    Parameters
    ----------
    data : Labelled; a mapping of label to texts or (n, T) ids of one length; or the path of a
        JSONL file whose lines hold ``text`` and ``label``, and any further attributes.
    length : tokens after which a text is cut, clipped to the model's context.
    tokenizer : for texts; None takes the one found beside the model.

    Raises
    ------
    GossamerError
        If the data is none of these, or holds ids outside the vocabulary.
    """
    if isinstance(data, str | Path):
        data = _read(Path(data).expanduser())
    if isinstance(data, Mapping) and data and "input_ids" not in data:
        data = _from_mapping(dict(data))
    if isinstance(data, list) and data and all(isinstance(row, dict) for row in data):
        data = _from_rows(data, model, length, tokenizer)
    if not isinstance(data, Labelled):
        what = "no data" if data is None else f"a {type(data).__name__}"
        raise GossamerError(
            f"this method needs labelled text and got {what}; give a JSONL file with text and "
            'label on every line, or {"label": ["text", ...], ...}'
        )
    check_vocabulary(data.tokens, model)
    return data


def _read(path: Path) -> list[dict[str, Any]]:
    if path.suffix not in (".jsonl", ".ndjson") or not path.is_file():
        raise GossamerError(f"{path} is no JSONL file; labels come from one, text and label a line")
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, RecursionError):
                raise GossamerError(f"{path}, line {number} is not JSON") from None
            if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                raise GossamerError(f'{path}, line {number} has no string "text"')
            rows.append(row)
    if not rows:
        raise GossamerError(f"{path} holds no text; give a file with text in it")
    return rows


def _from_mapping(data: dict[str, Any]) -> Any:
    if all(isinstance(part, Tensor) for part in data.values()):
        ids = list(data.values())
        if len({part.shape[1:] for part in ids}) != 1:
            raise GossamerError("windows of labels have other lengths; give texts, or cut them")
        counts = torch.tensor([len(part) for part in ids])
        labels = torch.arange(len(ids)).repeat_interleave(counts)
        return Labelled(Tokens.from_ids(torch.cat(ids)), {"label": labels}, {"label": tuple(data)})
    return [{"text": text, "label": label} for label, texts in data.items() for text in texts]


def _from_rows(rows: list[dict[str, Any]], model: nn.Module, length: int, tokenizer: Any) -> Any:
    from gossamer.models.loading import find_tokenizer

    limit = context_length(model)
    tokens = Tokens.from_texts_padded(
        [row["text"] for row in rows],
        find_tokenizer(model) if tokenizer is None else tokenizer,
        length=length if limit is None else min(length, limit),
    )
    as_tokens(tokens, model)
    attributes: dict[str, Tensor] = {}
    values: dict[str, tuple[str, ...]] = {}
    for name in (name for name in rows[0] if name != "text"):
        lacking = sum(name not in row for row in rows)
        if lacking:
            raise GossamerError(f"{lacking} of {len(rows)} texts have no {name!r}; give all one")
        given = [str(row[name]) for row in rows]
        values[name] = tuple(dict.fromkeys(given))
        attributes[name] = torch.tensor([values[name].index(value) for value in given])
    return Labelled(tokens, attributes, values)
