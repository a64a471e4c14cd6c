"""Tensors of a safetensors file, read into memory of their own.

The library maps a file, so that every byte comes into memory twice: as a page of the file and as
the copy that a parameter must be, since a file may change. Here it is read once, where it stays,
and in several threads at once where a caller wants that.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from files import open_regular
from system import disk, memory
from tensors import raw_bytes

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "BOOL": torch.bool,
}
LARGEST_HEADER = 100 * 10**6  # bytes, as in the library
LARGE_PAGES = 4 * 2**20  # bytes of a tensor from which on it lies in pages of 2 MiB


class NotStored(Exception):
    """Why a file gives no tensors."""


@dataclass(frozen=True)
class Place:
    """Where a tensor stands in its file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    def row(self, number: int) -> Place:
        """Of that one along the first dimension: (1, ...)."""
        shape = (1, *self.shape[1:])
        start = self.start + number * math.prod(shape) * self.dtype.itemsize
        return Place(self.dtype, shape, start)


class StoredTensors:
    """An open file; for many threads."""

    def __init__(self, path: Path) -> None:
        """Raises `OSError`, and `NotStored` for what is no whole file of tensors."""
        self._file = open_regular(path)
        try:
            self.places = _places(self._file.fileno())
        except BaseException:
            self._file.close()
            raise

    def close(self) -> None:
        self._file.close()

    def read(self, name: str) -> Tensor:
        """A tensor of the file. Raises `OSError` and `NotStored`."""
        place = self.places.get(name)
        if place is None:
            raise NotStored(f"{name} is missing")
        return _read(self._file.fileno(), name, place)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[StoredTensors]:
    file = StoredTensors(path)
    try:
        yield file
    finally:
        file.close()


def read_at(path: Path, places: Mapping[str, Place]) -> dict[str, Tensor]:
    """The tensors at these places of a file whose header was read before. Raises as `read` does,
    also where the file was cut off or removed since: a mapped one would end the program then."""
    with open_regular(path) as file:
        return {name: _read(file.fileno(), name, place) for name, place in places.items()}


def new_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory for a tensor on the CPU, of any content. A large one lies in large pages where the
    system has them: it is there in a third of the time, and read faster too."""
    tensor = torch.empty(shape, dtype=dtype)
    if tensor.nbytes >= LARGE_PAGES:
        memory.use_large_pages(tensor.data_ptr(), tensor.nbytes)
    return tensor


def _read(descriptor: int, name: str, place: Place) -> Tensor:
    tensor = new_tensor(place.shape, place.dtype)
    room = memoryview(raw_bytes(tensor).data)
    done = 0
    while done < len(room):
        count = disk.read_at(descriptor, room[done:], place.start + done)
        if not count:
            raise NotStored(f"{name} is cut off")
        done += count
    return tensor


def _places(descriptor: int) -> dict[str, Place]:
    """What the header of a safetensors file says, held against the size of the file."""
    size = os.fstat(descriptor).st_size
    count = int.from_bytes(disk.bytes_at(descriptor, 8, 0), "little")
    if not 2 <= count <= min(LARGEST_HEADER, size - 8):
        raise NotStored("its header is damaged")
    try:
        header = json.loads(disk.bytes_at(descriptor, count, 8))
        header.pop("__metadata__", None)
        places = {name: _place(said, 8 + count, size) for name, said in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise NotStored("its header is damaged") from None
    return places


def _place(said: dict, behind: int, size: int) -> Place:
    if isinstance(said["dtype"], str) and said["dtype"] not in DTYPES:
        raise NotStored(f"it holds numbers of type {said['dtype']:.20}, which are not read")
    dtype, shape, (start, end) = DTYPES[said["dtype"]], tuple(said["shape"]), said["data_offsets"]
    if not all(isinstance(number, int) and number >= 0 for number in (*shape, start, end)):
        raise ValueError
    if end - start != math.prod(shape) * dtype.itemsize or behind + end > size:
        raise ValueError
    return Place(dtype, shape, behind + start)
