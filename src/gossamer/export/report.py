"""What an export stored: bytes per tensor, beside dense bf16 and the layout's limit."""

from dataclasses import asdict, dataclass
from math import prod
from typing import Any

__all__ = ["ExportReport", "TensorRow"]


@dataclass(frozen=True)
class TensorRow:
    """One tensor of an export.

    Parameters
    ----------
    dtype : of the values. layout : how it is stored; ``dense`` for not compressed.
    kept : entries stored as values. bytes : stored, without file headers.
    limit : bits a weight the layout cannot go below: bρ + 1 for a bit mask, b/2 + 1 for 2:4,
        (b + 16)ρ for CSR, with b bits a value and a share ρ kept; b for dense.
    note : why a matrix with zeros is stored dense.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    layout: str
    kept: int
    bytes: int
    limit: float
    note: str = ""

    @property
    def size(self) -> int:
        """Number of weights."""
        return prod(self.shape)

    @property
    def sparsity(self) -> float:
        """Share of the weights that are zero."""
        return 1.0 - self.kept / self.size if self.size else 0.0

    @property
    def bits(self) -> float:
        """Bits stored a weight."""
        return 8 * self.bytes / self.size if self.size else 0.0

    @property
    def share(self) -> float:
        """Bytes as a share of dense bf16."""
        return self.bytes / (2 * self.size) if self.size else 1.0

    @property
    def overhead(self) -> float:
        """Bits stored over the limit, as a share of the limit."""
        return self.bits / self.limit - 1.0 if self.limit else 0.0


@dataclass(frozen=True)
class ExportReport:
    """What an export stored.

    Parameters
    ----------
    format : asked for. folder : written to.
    rows : one per tensor, tied ones once.
    metadata : bytes of file headers, the manifest and the format's entries in config.json.
    notes : further facts in sentences.
    """

    format: str
    folder: str
    rows: tuple[TensorRow, ...]
    metadata: int
    notes: tuple[str, ...] = ()

    @property
    def matrices(self) -> tuple[TensorRow, ...]:
        """The compressed tensors."""
        return tuple(row for row in self.rows if row.layout != "dense")

    @property
    def matrix_share(self) -> float:
        """Compressed tensors and all metadata, as a share of those tensors in dense bf16."""
        dense = 2 * sum(row.size for row in self.matrices)
        return (sum(row.bytes for row in self.matrices) + self.metadata) / dense if dense else 1.0

    @property
    def matrix_limit(self) -> float:
        """The layout's limit for the compressed tensors, as a share of dense bf16."""
        size = sum(row.size for row in self.matrices)
        return sum(row.limit * row.size for row in self.matrices) / (16 * size) if size else 1.0

    @property
    def bytes(self) -> int:
        """Everything stored: all tensors and the metadata."""
        return sum(row.bytes for row in self.rows) + self.metadata

    @property
    def share(self) -> float:
        """Everything stored, as a share of the whole model in dense bf16."""
        dense = 2 * sum(row.size for row in self.rows)
        return self.bytes / dense if dense else 1.0

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        rows = [
            {**asdict(r), "sparsity": r.sparsity, "bits": r.bits, "share": r.share,
             "overhead": r.overhead}
            for r in self.rows
        ]  # fmt: skip
        return {
            "format": self.format,
            "folder": self.folder,
            "bytes": self.bytes,
            "share": self.share,
            "matrix_share": self.matrix_share,
            "matrix_limit": self.matrix_limit,
            "metadata": self.metadata,
            "tensors": rows,
            "notes": list(self.notes),
        }

    def summary(self) -> tuple[str, ...]:
        """The totals and notes, a line each."""
        done, dense = self.matrices, [r for r in self.rows if r.layout == "dense"]
        lines = [f"{len(dense)} tensors stored dense: {sum(r.bytes for r in dense):,} bytes"]
        if done:
            lines.append(
                f"{len(done)} matrices in format {self.format}, with {self.metadata:,} bytes of "
                f"metadata: {self.matrix_share:.4f} of dense bf16 (limit {self.matrix_limit:.4f})"
            )
        lines.append(f"whole model: {self.bytes:,} bytes, {self.share:.4f} of it in dense bf16")
        reasons: dict[str, list[TensorRow]] = {}
        for row in dense:
            if row.note:
                reasons.setdefault(row.note.partition(":")[0], []).append(row)
        lines += [
            f"note: {rows[0].name}{f' and {len(rows) - 1} more' if rows[1:] else ''} stored dense: "
            f"{rows[0].note}"
            for rows in reasons.values()
        ]
        return (*lines, *(f"note: {n}" for n in self.notes))

    def __str__(self) -> str:
        wide = max((len(r.name) for r in self.matrices), default=0)
        rows = [
            f"  {r.name:<{wide}}  {r.sparsity:6.1%} zero  {r.bytes:>11,} B  {r.share:.4f} of bf16  "
            f"{r.bits:6.3f} bits (limit {r.limit:.3f}, {r.overhead:+.1%})"
            for r in self.matrices
        ]
        return "\n".join([*rows, *self.summary()])
