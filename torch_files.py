"""Files of `torch.save` by strangers: read without running them, and bounded by their own size.

`torch.load(weights_only=True)` runs no code, but a file of 2 KB can still make it fill the memory:
by a pickle that asks for a large bytearray, by parts that unpack to a thousand times their size, or
by tensors that repeat one element. Each is refused before it costs anything.
"""

from __future__ import annotations

import pickletools
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

MOST_UNPACKED = 20  # times the file's size; the tiny preset's Whisper packs six to one
FREE = 1 << 20  # bytes that any file may unpack to
LARGEST_PICKLE = 16 << 20  # bytes; that of a Whisper has 30 KB
LEGACY_PICKLES = 5  # at the beginning of a file from before torch 1.6
NAMES = re.compile(
    r"torch \w+Storage|torch\._utils _rebuild_(tensor_v2|parameter)|torch Size"
    r"|collections OrderedDict"
)


class NotRead(ValueError):
    """Why a file is not read, in a few words."""


def load_torch_file(path: str | Path, most_bytes: int) -> Any:
    """What `torch.save` wrote to a file: tensors in the file's memory map where it allows one,
    numbers, text and plain containers.

    Raises `NotRead` for anything else, and for what would take more than `most_bytes` bytes,
    than `MOST_UNPACKED` times its size, or than it holds itself; `OSError` as `open` does.
    """
    size = Path(path).stat().st_size
    stored = False
    if zipfile.is_zipfile(path):
        stored, unpacked = _check_parts(path, size)
    else:
        unpacked = size
        with open(path, "rb") as file:
            for _ in range(LEGACY_PICKLES):
                _check_names(file)
    if unpacked > most_bytes:
        raise NotRead(f"it unpacks to {unpacked >> 20:,} MB, {most_bytes >> 20:,} is the most")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=stored)
    except Exception as error:  # an untrusted file makes torch.load raise anything
        raise NotRead(_reason(error)) from None
    taken, seen = 0, set()
    for tensor in _tensors(content):
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise NotRead("it holds tensors without values of their own")
        view = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if view not in seen:  # weights that are tied are there once
            taken += tensor.numel() * tensor.element_size()
            seen.add(view)
        if taken > unpacked:  # views of few elements that claim to be many
            raise NotRead(f"its tensors claim to be larger than the {unpacked:,} bytes it holds")
    return content


def _reason(error: Exception) -> str:
    """What torch says, without its advice to read the file again and run what is in it."""
    said = str(error)
    if "weights_only" in said:
        reason = said.partition("WeightsUnpickler error:")[2].strip().split("\n")[0]
        said = f"it is damaged: {reason or type(error).__name__}"
    return " ".join(said.split())[:200] or type(error).__name__


def _check_parts(path: str | Path, size: int) -> tuple[bool, int]:
    """Whether no part of a zip is packed, and how many bytes all unpack to."""
    try:
        with zipfile.ZipFile(path) as packed:
            parts = packed.infolist()
            unpacked = sum(part.file_size for part in parts)
            if unpacked > MOST_UNPACKED * size + FREE:
                raise NotRead(f"{size:,} bytes would unpack to {unpacked:,}")
            for part in parts:
                if part.filename.endswith("/data.pkl"):
                    if part.file_size > LARGEST_PICKLE:
                        raise NotRead(f"its table of contents has {part.file_size:,} bytes")
                    with packed.open(part) as pickled:
                        _check_names(pickled)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise NotRead(f"it is damaged: {error}") from None
    return all(part.compress_type == zipfile.ZIP_STORED for part in parts), unpacked


def _check_names(file: BinaryIO | Any) -> None:
    """That a pickle names nothing but what builds tensors. The file is left behind its end."""
    try:
        for operation, argument, _ in pickletools.genops(file):
            name = operation.name
            if name in ("STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"):
                raise NotRead(f"its pickle uses {name}, which torch.save does not write")
            if name == "GLOBAL" and not NAMES.fullmatch(str(argument)):
                raise NotRead(f"it names {str(argument)[:100]!r}, which is not needed for tensors")
    except NotRead:
        raise
    except Exception as error:  # untrusted bytes make pickletools raise anything
        raise NotRead(f"it is damaged: {error}") from None


def _tensors(content: Any) -> Iterator[Tensor]:
    """Every tensor in containers within containers, which may hold each other."""
    seen: set[int] = set()
    waiting = [content]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (Mapping, list, tuple, set)) and id(value) not in seen:
            seen.add(id(value))
            inner: Iterable[Any] = value.values() if isinstance(value, Mapping) else value
            waiting.extend(inner)
