"""Recordings as browsers and telephones make them, WebM and MP4, read by the optional PyAV.

PyAV brings FFmpeg, which decodes far more than is let through: the kind of file is fixed before it
is opened, nothing but the file's own bytes is read, and only its first sound.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from errors import PhiSightError
from speech.containers import HOW_TO_CONVERT, no_sound, not_readable

FORMATS = {"WebM": "matroska", "MP4": "mp4"}  # FFmpeg's names


class BrowserSound:
    """An open recording, decoded as it is read: a `Sound` of speech/recordings.py.

    Raises `PhiSightError` where PyAV is absent, and for what is not readable.
    """

    def __init__(self, file: BinaryIO, kind: str, name: str) -> None:
        try:
            import av
        except ImportError:
            raise PhiSightError(
                f"{name}: is {kind}, which is read with the package av; pip install av,"
                f" or {HOW_TO_CONVERT}"
            ) from None
        self._kind, self._name = kind, name
        self._error: type[Exception] = av.FFmpegError
        try:
            self._container: Any = av.open(file, format=FORMATS[kind], metadata_errors="replace")
        except (av.FFmpegError, ValueError) as error:
            raise not_readable(name, kind, _reason(error)) from None
        sounds = self._container.streams.audio
        if not sounds or not sounds[0].rate:
            self._container.close()
            raise no_sound(name)
        stream = sounds[0]
        self.samplerate, self.channels = int(stream.rate), int(stream.channels)
        self.frames = 0  # files of browsers do not say it
        self._to_float = av.AudioResampler("fltp", stream.layout, self.samplerate)
        self._decoded = self._frames(stream)
        self._left = np.zeros((0, self.channels), np.float32)

    def _frames(self, stream: Any) -> Iterator[np.ndarray]:
        """(frames, channels) float32, a packet's worth at a time. A file that ends within a packet
        ends there."""
        some = False
        try:
            for frame in self._container.decode(stream):
                for converted in self._to_float.resample(frame):
                    some = True
                    yield converted.to_ndarray().T
        except (self._error, ValueError) as error:
            if not some:
                raise not_readable(self._name, self._kind, _reason(error)) from None

    def read(self, frames: int, dtype: str = "float32", always_2d: bool = True) -> np.ndarray:
        """(frames, channels) float32, fewer than asked at the end."""
        pieces, count = [self._left], len(self._left)
        while count < frames and (piece := next(self._decoded, None)) is not None:
            pieces.append(piece)
            count += len(piece)
        whole = np.concatenate(pieces)
        self._left = whole[frames:]
        return whole[:frames]

    def __enter__(self) -> BrowserSound:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._container.close()


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error).splitlines()[0]
