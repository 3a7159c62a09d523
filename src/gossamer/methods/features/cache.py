"""Cache: activations on disk, in shards, so that a sweep runs the model once.

A folder of safetensors files and an ``index.json`` with the checksum of each. Shards appear whole;
a run that is killed, or that fills the disk, goes on after the last one.
Shapes: R = rows, D = columns of a row.
"""

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gossamer.core import GossamerError, check_count, unknown
from gossamer.methods.features.source import ActivationSource
from gossamer.methods.features.stream import Stream
from gossamer.models import Progress
from gossamer.models.store import write_json

__all__ = ["CachedSource", "cache_activations"]

_INDEX, _FORMAT = "index.json", 1
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_BLOCK = 1024  # rows read together


def cache_activations(
    source: ActivationSource,
    folder: str | Path,
    *,
    dtype: str = "float32",
    shard_rows: int = 1 << 17,
    progress: Progress | None = None,
) -> "CachedSource":
    """Write one pass of a source to disk, or what an interrupted run has left of it.

    Parameters
    ----------
    folder : made if missing. A finished cache of the same source is only opened.
    dtype : ``float32``, or ``bfloat16`` or ``float16`` at half the space.
    shard_rows : rows of a file, at least; a file ends with a forward pass.
    progress : called with windows done, windows in all, and what runs.

    Raises
    ------
    GossamerError
        If the folder holds another source's activations, cannot be written, or the disk is full:
        what is written stays, and the same call goes on from there.
    """
    if dtype not in _DTYPES:
        raise unknown("dtype", dtype, tuple(_DTYPES))
    check_count("shard_rows", shard_rows, 1)
    place = Path(folder)
    index = _opened(place, source, dtype)
    done, windows = index["windows_done"], len(source.data)
    pieces: list[Tensor] = []
    while done < windows:
        at = torch.arange(done, min(done + source.windows, windows))
        pieces.append(source.rows(at).to(_DTYPES[dtype]).cpu())
        done += len(at)
        if sum(map(len, pieces)) >= shard_rows or done == windows:
            _write(place, index, torch.cat(pieces), done)
            pieces = []
        if progress is not None:
            progress(done, windows, "caching activations")
    return CachedSource(place)


def _opened(place: Path, source: ActivationSource, dtype: str) -> dict[str, Any]:
    """The index of the folder, made if there is none."""
    facts = json.loads(json.dumps(source.metadata() | {"data": source.fingerprint()}))
    fresh = {
        "format": _FORMAT,
        "source": facts,
        "dtype": dtype,
        "width": source.width,
        "columns": list(source.columns),
        "shards": [],
        "windows_done": 0,
        "windows": len(source.data),
    }
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise GossamerError(f"{place} cannot be made ({error.strerror}); name another") from None
    if not (place / _INDEX).exists():
        if any(place.iterdir()):
            raise GossamerError(f"{place} holds other files; name an empty folder for the cache")
        try:
            write_json(place / _INDEX, fresh)
        except OSError as error:
            raise _unwritable(place, fresh, error) from None
        return fresh
    found = _read_index(place)
    for key in ("source", "dtype", "width"):
        if found[key] != fresh[key]:
            raise GossamerError(
                f"{place} caches other activations ({key} differs); name another folder, or "
                "remove this one"
            )
    return found


def _unwritable(place: Path, index: dict[str, Any], error: OSError) -> GossamerError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return GossamerError(
        f"{place} {'is full' if full else f'cannot be written ({error.strerror or error})'} after "
        f"{sum(s['rows'] for s in index['shards']):,} rows, {index['windows_done']} of "
        f"{index['windows']} windows; free space and run the same again: it goes on from there"
    )


def _write(place: Path, index: dict[str, Any], rows: Tensor, done: int) -> None:
    """Add a shard: the file first, then the index that names it."""
    name = f"rows-{len(index['shards']):05}.safetensors"
    handle, part = tempfile.mkstemp(prefix=f".{name}.", dir=place)
    os.close(handle)
    try:
        try:
            save_file({"rows": rows.contiguous()}, part)
        except SafetensorError as error:
            # safetensors wraps what the system says.
            number = errno.ENOSPC if "No space left" in str(error) else errno.EIO
            raise OSError(number, str(error)) from None
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        shard = {"file": name, "rows": len(rows), "sha256": _sha256(Path(part))}
        os.replace(part, place / name)
    except OSError as error:
        raise _unwritable(place, index, error) from None
    finally:
        Path(part).unlink(missing_ok=True)
    longer = {**index, "shards": [*index["shards"], shard], "windows_done": done}
    try:
        write_json(place / _INDEX, longer)
    except OSError as error:
        raise _unwritable(place, index, error) from None
    index.update(longer)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def _read_index(place: Path) -> dict[str, Any]:
    try:
        index = json.loads((place / _INDEX).read_text(encoding="utf-8"))
        if index["format"] != _FORMAT:
            raise GossamerError(f"{place} has format {index['format']}; this reads {_FORMAT}")
        # Named here, so that a damaged index is one line too.
        _ = [index[key] for key in ("source", "dtype", "width", "columns", "windows_done")]
        _ = [(shard["file"], shard["rows"], shard["sha256"]) for shard in index["shards"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GossamerError(
            f"{place} holds no readable cache of activations ({type(error).__name__}: {error}); "
            "write it again"
        ) from None
    return index


class CachedSource:
    """Rows read back from a cache; it serves where an ``ActivationSource`` does, model or not.

    Parameters
    ----------
    folder : written by :func:`cache_activations`.
    seed : of every shuffle. buffer : rows mixed. resident_bytes : most memory for all rows.

    Raises
    ------
    GossamerError
        If there is no cache, it is not finished, or a shard is missing or was changed.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        seed: int = 0,
        buffer: int = 1 << 15,
        resident_bytes: int = 1 << 28,
    ) -> None:
        self.folder, self.seed, self.buffer = Path(folder), seed, buffer
        index = _read_index(self.folder)
        if index["windows_done"] < index["windows"]:
            raise GossamerError(
                f"the cache {self.folder} holds {index['windows_done']} of {index['windows']} "
                "windows; run cache_activations again to finish it"
            )
        self._facts, self._dtype = index["source"], index["dtype"]
        self.width, self.columns = int(index["width"]), tuple(index["columns"])
        self.name = self.path = str(self._facts["hook_name"])
        self.sink_norm: float | None = self._facts["sink_norm"]
        self._shards: list[dict[str, Any]] = index["shards"]
        self._sound: set[str] = set()
        self._resident: Tensor | None = None
        self.count = sum(shard["rows"] for shard in self._shards)
        self._fits = self.count * self.width * 4 <= resident_bytes
        self._blocks = [
            (number, start)
            for number, shard in enumerate(self._shards)
            for start in range(0, shard["rows"], _BLOCK)
        ]

    def _read(self, number: int, start: int, rows: int) -> Tensor:
        """Rows of a shard, float32; its checksum is compared when it is first opened."""
        shard = self._shards[number]
        path = self.folder / shard["file"]
        try:
            if shard["file"] not in self._sound:
                if _sha256(path) != shard["sha256"]:
                    raise GossamerError(
                        f"{path} was changed or damaged since it was written; write the cache again"
                    )
                self._sound.add(shard["file"])
            with safe_open(path, framework="pt") as file:
                return file.get_slice("rows")[start : start + rows].float()
        except (OSError, SafetensorError) as error:
            raise GossamerError(f"{path} cannot be read ({error}); write the cache again") from None

    def one_pass(self) -> Iterator[Tensor]:
        """All rows once, in the order they were written."""
        for number, start in self._blocks:
            yield self._read(number, start, _BLOCK)

    def head(self, rows: int) -> Iterator[Tensor]:
        """Blocks of :meth:`one_pass` until so many rows have passed."""
        for block in self.one_pass():
            yield block
            rows -= len(block)
            if rows <= 0:
                return

    def resident(self) -> Tensor | None:
        """All rows in memory, or None where they do not fit."""
        if self._fits and self._resident is None:
            self._resident = torch.cat(list(self.one_pass()))
        return self._resident

    def items(self) -> int:
        """Blocks, which a stream puts in a new order each pass."""
        return len(self._blocks)

    def pieces(self) -> int:
        """Blocks of a pass."""
        return len(self._blocks)

    def piece(self, order: Tensor, turn: int, number: int) -> Tensor:
        """One block of a pass."""
        return self._read(*self._blocks[int(order[number])], _BLOCK)

    def batches(self, size: int) -> Stream:
        """Endless shuffled (size, D) batches; the stream can tell its place and be resumed."""
        return Stream(self, size)

    def metadata(self) -> dict[str, Any]:
        """What the model's pass recorded, and that it came from a cache."""
        return self._facts | {"seed": self.seed, "cached": self._dtype}
