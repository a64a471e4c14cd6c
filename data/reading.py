"""Pictures of strangers, read in child processes that are limited and can be ended.

What a decoder makes of hostile bytes (hours of work, gigabytes, notes on standard error, a crash)
stays in the child, and costs who asked one `PhiSightError`. A picture for an encoder is made as
small as that reads it there, so that a large one takes memory in the child only.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import numpy
from PIL import Image

from data.images import MAX_PIXELS, decode_image, open_image, read_image_bytes
from errors import PhiSightError
from workers import fitting
from workers.fitting import Fit, Fitted
from workers.pool import Limits, Result, Workers, never

CHILDREN = 3
AHEAD = 8  # pictures that are read before they are asked for
MEMORY = 1536 << 20  # bytes; the largest picture allowed takes 1.2 GB in its worst form
# The largest picture takes about 4 s of a slow processor.
SERVED = Limits(cpu_seconds=8, memory=MEMORY)
# Training must not depend on how fast the machine happens to be: far more than any picture takes.
TRAINING = Limits(cpu_seconds=60, wall_seconds=600, memory=MEMORY)
POOL = Workers(CHILDREN, SERVED)
REMEDY = "save it again as an ordinary JPEG or PNG"


# -- in this process ------------------------------------------------------------------------------


def fit_image(data: bytes, name: str, fit: Fit, cancelled: Callable[[], bool] = never) -> Fitted:
    """The picture as an encoder reads it. `name` stands in the errors.

    Raises PhiSightError for all that `decode_image` refuses and for what takes too much time or
    memory, and `Cancelled`.
    """
    arguments = {"name": name, "fit": fitting.to_json(fit)}
    shape, pixels = POOL.call(
        _fitted, data, arguments, name=_short(name), remedy=REMEDY, cancelled=cancelled
    )
    return _received(shape, pixels)


def check_image(data: bytes, name: str) -> tuple[int, int]:
    """(width, height), upright, of a picture that can be decoded. Raises as `fit_image` does."""
    (width, height), _ = POOL.call(_size, data, {"name": name}, name=_short(name), remedy=REMEDY)
    return width, height


def check_image_file(path: str | Path, cancelled: Callable[[], bool] = never) -> tuple[int, int]:
    """The same of a file. Raises as `load_image` does, too, and `Cancelled`."""
    name = str(path)
    arguments = {"path": os.path.abspath(path), "name": name}
    (width, height), _ = POOL.call(
        _size_of_file,
        b"",
        arguments,
        name=_short(name),
        remedy=REMEDY,
        limits=TRAINING,
        cancelled=cancelled,
    )
    return width, height


@contextlib.contextmanager
def checked_image_files(paths: Sequence[str | Path]) -> Iterator[None]:
    """Check files as `check_image_file` does, while the block runs. Raises what it raises, behind
    the block; the children that did it are there for what comes next."""
    ended = Event()
    with ThreadPoolExecutor(CHILDREN) as threads:
        try:
            checks = [threads.submit(check_image_file, path, ended.is_set) for path in paths]
            yield
            for check in checks:
                check.result()
        finally:  # also when the block or the first of them fails
            ended.set()


def claimed_size(data: bytes, name: str) -> tuple[int, int] | None:
    """(width, height) by a picture's header; None for what is not a picture.

    Raises PhiSightError for a header that claims far too many pixels, or takes too long to read.
    """
    size, _ = POOL.call(_claimed_size, data, {"name": name}, name=_short(name), remedy=REMEDY)
    return None if size is None else (size[0], size[1])


def as_png(data: bytes, name: str) -> bytes:
    """The picture as PNG, of the same pixels. Raises as `fit_image` does."""
    limits = Limits(cpu_seconds=60, memory=MEMORY, result=4 * MAX_PIXELS)
    _, png = POOL.call(_png, data, {"name": name}, name=_short(name), remedy=REMEDY, limits=limits)
    return bytes(png)


def fit_files(paths: Iterable[Path], fit: Fit) -> Iterator[Fitted | PhiSightError]:
    """Each picture of a file as an encoder reads it, or why it cannot be used, in order; the next
    ones are read meanwhile."""
    ended = Event()
    given = fitting.to_json(fit)

    def read(path: Path) -> Fitted | PhiSightError:
        name = str(path)
        try:
            return _received(
                *POOL.call(
                    _fitted_file,
                    b"",
                    {"path": os.path.abspath(path), "name": name, "fit": given},
                    name=_short(name),
                    remedy=REMEDY,
                    limits=TRAINING,
                    cancelled=ended.is_set,
                )
            )
        except PhiSightError as error:
            return error

    reading: deque[Future[Fitted | PhiSightError]] = deque()
    with ThreadPoolExecutor(CHILDREN) as threads:
        try:
            for path in paths:
                reading.append(threads.submit(read, path))
                if len(reading) > AHEAD:
                    yield reading.popleft().result()
            while reading:
                yield reading.popleft().result()
        finally:  # also when nobody wants the rest
            ended.set()
            for waiting in reading:
                waiting.cancel()


def _received(shape: Any, pixels: bytearray) -> Fitted:
    """What a child sent as a picture, which is not trusted."""
    try:
        return Fitted(numpy.frombuffer(pixels, numpy.uint8).reshape(*map(int, shape), 3))
    except (TypeError, ValueError):
        raise PhiSightError("picture: its decoder gave no picture; send it again") from None


def _short(name: str) -> str:
    return " ".join(name.split())


# -- in a child -----------------------------------------------------------------------------------


def _fitted(data: bytearray, name: str, fit: dict[str, Any]) -> Result:
    return _as_fitted(decode_image(data, name), fit)


def _fitted_file(data: bytearray, path: str, name: str, fit: dict[str, Any]) -> Result:
    return _as_fitted(decode_image(read_image_bytes(path, name=name), name), fit)


def _as_fitted(picture: Image.Image, fit: dict[str, Any]) -> Result:
    pixels = fitting.from_json(fit)(picture).pixels
    return pixels.shape[:2], pixels.tobytes()


def _size(data: bytearray, name: str) -> Result:
    return decode_image(data, name).size, b""


def _size_of_file(data: bytearray, path: str, name: str) -> Result:
    return decode_image(read_image_bytes(path, name=name), name).size, b""


def _claimed_size(data: bytearray, name: str) -> Result:
    try:
        with open_image(data, name) as image:
            return image.size, b""
    except Image.DecompressionBombError:
        return (2**31, 2**31), b""
    except MemoryError:
        raise
    except Exception:  # untrusted bytes make PIL raise anything: see data/images.py
        return None, b""


def _png(data: bytearray, name: str) -> Result:
    file = io.BytesIO()
    decode_image(data, name).save(file, format="PNG")
    return None, file.getvalue()
