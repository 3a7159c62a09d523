"""Layouts: the five ways an export stores a matrix, behind one small interface.

A layout says whether a matrix fits, turns it into named parts, and turns parts back. How parts
are named and where they lie is the writer's and the reader's business.
Shapes: R rows, C columns; rows run along the input dimension where the pattern needs that.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gossamer.core import NM, GossamerError, parse_pattern, unknown
from gossamer.export import bitmask, csr, nm

__all__ = ["FORMATS", "Bitmask", "Grouped", "Layout", "Rows", "Sparse24", "SparseBitmask", "layout"]


class Layout(ABC):
    """One way to store a matrix.

    Attributes
    ----------
    text : the name that manifests and reports use.
    parts : names of the tensors a stored matrix consists of.
    by_input : rows must run along the input dimension.
    foreign : compressed-tensors' names and configuration, which other tools read.
    """

    text: str
    parts: ClassVar[tuple[str, ...]]
    by_input: ClassVar[bool] = False
    foreign: ClassVar[bool] = False

    @abstractmethod
    def limit(self, bits: int, kept: float, columns: int) -> float:
        """Bits a weight the layout cannot go below, headers and padding aside.

        Parameters
        ----------
        bits : of a value. kept : share of the weights stored as values.
        """

    @abstractmethod
    def pack(self, rows: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """The parts of a matrix (R, C) of which ``mask`` must be stored."""

    @abstractmethod
    def unpack(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
        """The dense matrix (R, C); GossamerError if the parts are not those of one."""

    @property
    def requires(self) -> NM | None:
        """The pattern a mask must have; None where any mask can be stored."""
        return None

    def misfit(self, mask: Tensor) -> str | None:
        """Where a mask breaks the pattern, in words; None where it can be stored."""
        pattern = self.requires
        return None if pattern is None else nm.misfit(mask, pattern)


@dataclass(frozen=True)
class Bitmask(Layout):
    """Values and one bit a weight."""

    text: ClassVar[str] = "bitmask"
    parts: ClassVar = ("compressed", "bitmask")

    def limit(self, bits: int, kept: float, columns: int) -> float:
        return bits * kept + 1

    def pack(self, rows: Tensor, mask: Tensor) -> dict[str, Tensor]:
        return bitmask.compress(rows, mask)

    def unpack(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
        return bitmask.decompress(parts["compressed"], parts["bitmask"], shape)


@dataclass(frozen=True)
class Grouped(Layout):
    """N:M: as many values in every group of M inputs, and their places."""

    pattern: NM = NM(2, 4)
    parts: ClassVar = ("values", "indices")
    by_input: ClassVar = True

    def __post_init__(self) -> None:
        if not 2 <= self.pattern.of <= 256:
            raise GossamerError(
                f"pattern {self.pattern} has groups of {self.pattern.of}; "
                "places are stored for groups of 2 to 256"
            )

    @property
    def text(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return str(self.pattern)

    def limit(self, bits: int, kept: float, columns: int) -> float:
        return self.pattern.keep / self.pattern.of * (bits + nm.index_bits(self.pattern))

    @property
    def requires(self) -> NM:
        return self.pattern

    def pack(self, rows: Tensor, mask: Tensor) -> dict[str, Tensor]:
        return nm.compress(rows, mask, self.pattern)

    def unpack(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
        return nm.decompress(parts["values"], parts["indices"], shape, self.pattern)


@dataclass(frozen=True)
class Rows(Layout):
    """CSR, one ``.npz`` file a matrix."""

    text: ClassVar[str] = "csr"
    parts: ClassVar = ("data", "indices", "indptr")

    def limit(self, bits: int, kept: float, columns: int) -> float:
        return (bits + csr.column_bits(columns)) * kept

    def pack(self, rows: Tensor, mask: Tensor) -> dict[str, Tensor]:
        return csr.compress(rows, mask)

    def unpack(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
        return csr.decompress(dict(parts), shape)


@dataclass(frozen=True)
class SparseBitmask(Layout):
    """compressed-tensors' ``sparse-bitmask``: a bit mask, and where each row's values begin."""

    text: ClassVar[str] = "sparse-bitmask"
    parts: ClassVar = ("compressed", "bitmask", "row_offsets", "shape")
    foreign: ClassVar = True

    def limit(self, bits: int, kept: float, columns: int) -> float:
        return bits * kept + 1

    def pack(self, rows: Tensor, mask: Tensor) -> dict[str, Tensor]:
        return {
            **bitmask.compress(rows, mask),
            "row_offsets": bitmask.row_offsets(mask),
            "shape": torch.tensor(rows.shape),
        }

    def unpack(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
        dense = bitmask.decompress(parts["compressed"], parts["bitmask"], shape)
        counts = bitmask.unpack_rows(parts["bitmask"], shape).sum(dim=1)
        offsets = parts["row_offsets"].reshape(-1)
        if not torch.equal(offsets.long(), counts.cumsum(0) - counts):
            raise GossamerError("row_offsets are not where the rows of the bit mask begin")
        return dense


@dataclass(frozen=True)
class Sparse24(Layout):
    """compressed-tensors' ``sparse-24-bitmask``: two values in every four, and a bit mask."""

    text: ClassVar[str] = "sparse-24-bitmask"
    parts: ClassVar = ("compressed", "bitmask", "shape")
    by_input: ClassVar = True
    foreign: ClassVar = True

    def limit(self, bits: int, kept: float, columns: int) -> float:
        return bits / 2 + 1

    @property
    def requires(self) -> NM:
        return NM(2, 4)

    def pack(self, rows: Tensor, mask: Tensor) -> dict[str, Tensor]:
        at = nm.places(mask, NM(2, 4))
        stored = torch.zeros(*at.shape[:2], 4, dtype=torch.bool).scatter_(2, at, True)
        return {
            "compressed": nm.gather(rows, mask, at, NM(2, 4)),
            "bitmask": bitmask.pack_rows(stored.view(rows.shape)),
            "shape": torch.tensor(rows.shape).reshape(-1, 1),
        }

    def unpack(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
        if parts["compressed"].numel() * 2 != shape[0] * shape[1]:
            raise GossamerError(
                f"2:4 of a matrix {shape} are {shape[0] * shape[1] // 2} values; "
                f"got {parts['compressed'].numel()}"
            )
        return bitmask.decompress(parts["compressed"], parts["bitmask"], shape)


FORMATS = ("bitmask", "nm", "csr", "sparse-bitmask", "sparse-24-bitmask")
_FIXED = {each.text: each for each in (Bitmask(), Rows(), SparseBitmask(), Sparse24())}


def layout(name: str, pattern: str | NM = "2:4") -> Layout:
    """The layout of a format, or of a manifest's text for one (``2:4`` for ``nm``).

    Raises
    ------
    GossamerError
        On an unknown format, or a pattern that is not N:M.
    """
    if name in _FIXED:
        return _FIXED[name]
    if name != "nm" and ":" not in name:
        raise unknown("format", name, FORMATS)
    found = pattern if name == "nm" else name
    made = found if isinstance(found, NM) else parse_pattern(found)
    if not isinstance(made, NM):
        raise GossamerError(f"format nm stores N:M patterns such as 2:4; got {made}")
    return Grouped(made)
