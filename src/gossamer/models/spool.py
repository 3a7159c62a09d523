"""Spool: tensors kept in an unnamed temporary file, so that calibration data needs no memory."""

import errno
import tempfile
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from gossamer.core import GossamerError

__all__ = ["Spool", "Stored"]


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies in the file and how to make it again.

    Parameters
    ----------
    offset : in bytes. stored : its shape in the file. shape : its shape, broadcast.
    """

    offset: int
    stored: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class Spool:
    """A temporary file of tensors; it disappears when closed, also when the process is killed."""

    def __init__(self) -> None:
        try:
            # Unbuffered: tensors are written in one piece and the page cache buffers them.
            self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
        except OSError as error:
            raise _unwritable(error, 0) from None
        self.nbytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def put(self, tensor: Tensor) -> Stored:
        """Append a tensor; dimensions it is broadcast along are stored once."""
        compact = tensor.detach()
        for axis, stride in enumerate(tensor.stride()):
            if stride == 0 and compact.shape[axis] > 1:
                compact = compact.narrow(axis, 0, 1)
        place = Stored(
            self.nbytes, tuple(compact.shape), tuple(tensor.shape), tensor.dtype, tensor.device
        )
        self._write(self.nbytes, compact)
        self.nbytes += compact.numel() * compact.element_size()
        return place

    def replace(self, place: Stored, tensor: Tensor) -> None:
        """Write another tensor of the same shape and dtype where one lies."""
        assert tensor.shape == place.shape == place.stored
        assert tensor.dtype == place.dtype
        self._write(place.offset, tensor.detach())

    def read(self, place: Stored) -> Tensor:
        """The tensor, on the device it came from."""
        tensor = torch.empty(place.stored, dtype=place.dtype)
        buffer = _bytes(tensor)
        self._file.seek(place.offset)
        done = 0
        while done < len(buffer):
            count = self._file.readinto(buffer[done:])
            assert count, "the spool ends before the tensor"
            done += count
        return tensor.to(place.device).expand(place.shape)

    def _write(self, offset: int, tensor: Tensor) -> None:
        buffer = _bytes(tensor.cpu().contiguous())
        try:
            self._file.seek(offset)
            done = 0
            while done < len(buffer):
                done += self._file.write(buffer[done:])
        except OSError as error:
            raise _unwritable(error, offset + len(buffer)) from None


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, of any dtype."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _unwritable(error: OSError, size: int) -> GossamerError:
    folder = tempfile.gettempdir() if error.errno != errno.ENOENT else "the temporary folder"
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    reason = "is full" if full else f"cannot be written ({error.strerror or error})"
    return GossamerError(
        f"{folder} {reason} at {size / 1e6:.0f} MB of hidden states; "
        "set TMPDIR to a folder with room, or use fewer or shorter samples"
    )
