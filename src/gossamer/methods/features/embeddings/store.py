"""Embeddings: one sparse row a document, kept as CSR in safetensors or as an Arrow file.

Shapes: N = documents, M = latents, K = stored entries.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from scipy.sparse import csr_matrix
from torch import Tensor

from gossamer.core import GossamerError, SparseRows
from gossamer.models.store import atomic_folder, write_json

__all__ = ["Embeddings"]

_FACTS, _CODES = "embeddings.json", "embeddings.safetensors"


@dataclass(frozen=True, eq=False)
class Embeddings:
    """Documents as sparse vectors over latents.

    Parameters
    ----------
    codes : (N, M), what a document says of each latent; 0 where it says nothing.
    names : of the documents, N of them; numbers where none are given.
    labels : latent to what it stands for, where that is known.
    metadata : JSON-able facts, such as the model, the hook and the pooling.
    """

    codes: SparseRows
    names: tuple[str, ...] = ()
    labels: Mapping[int, str] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        count, latents = self.codes.shape
        names = self.names or tuple(str(i) for i in range(count))
        if len(names) != count:
            raise GossamerError(f"{len(names)} names for {count} documents; give one each")
        if bad := [i for i in self.labels if not 0 <= i < latents]:
            raise GossamerError(f"label of latent {bad[0]}; there are {latents}")
        csr = self.codes.to_csr()
        if not bool(torch.isfinite(csr.values).all()):
            raise GossamerError("embeddings hold NaN or infinity; embed the documents again")
        object.__setattr__(self, "codes", csr)
        object.__setattr__(self, "names", tuple(names))

    def __len__(self) -> int:
        return self.codes.shape[0]

    @property
    def latents(self) -> int:
        """M."""
        return self.codes.shape[1]

    def label(self, latent: int) -> str:
        """What a latent stands for, or its number."""
        return self.labels.get(latent, f"latent {latent}")

    def matrix(self) -> csr_matrix:
        """The codes as a float64 scipy matrix (N, M) without stored zeros."""
        csr = self.codes
        assert csr.indptr is not None
        parts = (csr.values.double().numpy(), csr.indices.numpy(), csr.indptr.numpy())
        made = csr_matrix(parts, shape=csr.shape)
        made.sum_duplicates()
        made.eliminate_zeros()
        return made

    def present(self) -> csr_matrix:
        """Which latent speaks in which document: 0 or 1, (N, M)."""
        made = self.matrix()
        made.data = np.ones_like(made.data)
        return made

    def labelled(self, labels: Mapping[int, str]) -> "Embeddings":
        """The same with other labels."""
        return replace(self, labels=dict(labels))

    def rows(self, which: Sequence[int] | Tensor) -> "Embeddings":
        """Some documents, in the order given."""
        at = torch.as_tensor(which)
        at = at.nonzero()[:, 0] if at.dtype == torch.bool else at.long()
        picked = self.matrix()[at.numpy()]
        return replace(
            self, codes=_rows(picked, self.latents), names=tuple(self.names[i] for i in at.tolist())
        )

    # -- files -----------------------------------------------------------------------------

    def save(self, folder: str | Path) -> Path:
        """Write a folder of safetensors (CSR) and JSON; it appears whole or not at all.

        Raises
        ------
        GossamerError
            If the folder holds something or cannot be written.
        """
        csr = self.codes
        assert csr.indptr is not None
        with atomic_folder(folder) as part:
            tensors = {"values": csr.values, "indices": csr.indices.int(), "indptr": csr.indptr}
            save_file({n: t.contiguous() for n, t in tensors.items()}, part / _CODES)
            write_json(part / _FACTS, self._facts())
        return Path(folder)

    @classmethod
    def load(cls, folder: str | Path) -> "Embeddings":
        """Read a folder written by :meth:`save`.

        Raises
        ------
        GossamerError
            If a file is missing or damaged.
        """
        try:
            facts = json.loads((Path(folder) / _FACTS).read_text(encoding="utf-8"))
            parts = load_file(Path(folder) / _CODES)
            shape = (len(parts["indptr"]) - 1, facts["latents"])
            codes = SparseRows(parts["values"], parts["indices"].long(), shape, parts["indptr"])
            return cls._from_facts(codes, facts)
        except (OSError, UnicodeDecodeError, ValueError, KeyError, SafetensorError) as error:
            raise GossamerError(
                f"{folder} holds no readable embeddings ({error}); it needs {_FACTS} and {_CODES}"
            ) from None

    def _facts(self) -> dict[str, Any]:
        labels = {str(i): text for i, text in self.labels.items()}
        return {"latents": self.latents, "names": list(self.names), "labels": labels} | {
            "metadata": dict(self.metadata)
        }

    @classmethod
    def _from_facts(cls, codes: SparseRows, facts: Mapping[str, Any]) -> "Embeddings":
        labels = {int(i): text for i, text in facts["labels"].items()}
        return cls(codes, tuple(facts["names"]), labels, facts["metadata"])

    def to_arrow(self, path: str | Path) -> Path:
        """Write an Arrow file: a row a document, lists of latents and values; labels in its schema.

        Raises
        ------
        GossamerError
            Without pyarrow, or where the file cannot be written.
        """
        arrow = _arrow()
        csr = self.codes
        assert csr.indptr is not None
        offsets = arrow.array(csr.indptr.numpy(), arrow.int64())
        columns = {
            "document": arrow.array(self.names),
            "latents": arrow.LargeListArray.from_arrays(offsets, csr.indices.int().numpy()),
            "values": arrow.LargeListArray.from_arrays(offsets, csr.values.float().numpy()),
        }
        facts = {k: v for k, v in self._facts().items() if k != "names"}
        table = arrow.table(columns).replace_schema_metadata({"gossamer": json.dumps(facts)})
        part = Path(f"{path}.part")
        try:
            with (
                arrow.OSFile(str(part), "wb") as sink,
                arrow.ipc.new_file(sink, table.schema) as to,
            ):
                to.write_table(table)
            part.replace(path)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise GossamerError(f"{path} cannot be written: {error}") from None
        return Path(path)

    @classmethod
    def from_arrow(cls, path: str | Path) -> "Embeddings":
        """Read a file written by :meth:`to_arrow`; it is mapped, not copied, until used.

        Raises
        ------
        GossamerError
            Without pyarrow, or if the file is no such file.
        """
        arrow = _arrow()
        try:
            with arrow.memory_map(str(path)) as source:
                table = arrow.ipc.open_file(source).read_all().combine_chunks()
            facts = json.loads(table.schema.metadata[b"gossamer"])
            lists = table["latents"].combine_chunks()
            values = table["values"].combine_chunks()
            parts = [
                torch.from_numpy(np.array(part))
                for part in (values.flatten(), lists.flatten(), lists.offsets)
            ]
            names = tuple(table["document"].to_pylist())
        except (OSError, KeyError, TypeError, arrow.ArrowException) as error:
            raise GossamerError(f"{path} holds no readable embeddings ({error})") from None
        shape = (len(names), facts["latents"])
        codes = SparseRows(parts[0], parts[1].long(), shape, parts[2] - parts[2][0])
        return cls._from_facts(codes, {**facts, "names": names})


def _rows(matrix: csr_matrix, columns: int) -> SparseRows:
    return SparseRows(
        torch.from_numpy(matrix.data).float(),
        torch.from_numpy(matrix.indices).long(),
        (len(matrix.indptr) - 1, columns),
        torch.from_numpy(matrix.indptr).long(),
    )


def _arrow() -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
    except ImportError:
        raise GossamerError(
            "Arrow files need pyarrow; pip install 'gossamer[parquet]', or save() as safetensors"
        ) from None
    return pyarrow
