"""Untrusted recordings -> 16 kHz mono: WAV, AIFF, AU, FLAC, MP3, OGG, and with PyAV WebM and MP4.

This is what the child process of speech/recordings.py runs. It imports little.
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import BinaryIO, Protocol

import numpy as np

from errors import PhiSightError
from speech.containers import (
    HOW_TO_CONVERT,
    cut_short,
    kind_of,
    no_sound,
    not_readable,
    promises_length,
    sound_of,
)
from workers.child import Result

SAMPLE_RATE = 16000  # Hz, of everything that has been read
LARGEST_FILE = 1 << 30  # bytes
LONGEST_SECONDS = 3600.0
LOWEST_RATE, HIGHEST_RATE = 4000, 384_000  # Hz of a recording
MOST_CHANNELS = 32
BLOCK_SECONDS = 10.0
SHORT_BLOCK_SECONDS = 0.25  # of which at most one is lost where a file is broken


class Sound(Protocol):
    """An open recording that is decoded as it is read."""

    samplerate: int
    channels: int
    frames: int

    def read(self, frames: int, dtype: str, always_2d: bool) -> np.ndarray:
        """(frames, channels), fewer than asked at the end."""
        ...


def decode_in_child(data: bytearray, path: str, name: str) -> Result:
    """What `decode` makes of a file, or without a path of `data`; its raw bytes."""
    samples = decode(path, name) if path else decode(bytes(data), name)
    return None, samples.data


def decode(source: str | bytes, name: str) -> np.ndarray:
    """What `recordings.read_audio` gives, in this process; `name` is that of errors."""
    if isinstance(source, bytes):
        return _read(io.BytesIO(source), name, len(source))
    try:
        with open(source, "rb", opener=_open_without_waiting) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise PhiSightError(f"{name}: is not a file; name a recording")
            return _read(file, name, status.st_size)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or str(error)
        raise PhiSightError(f"{name}: cannot be read ({reason}); name a recording") from None


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # a pipe would wait for a writer


def _read(file: BinaryIO, name: str, size: int) -> np.ndarray:
    if size > LARGEST_FILE:
        raise PhiSightError(
            f"{name}: has {size >> 20} MB, {LARGEST_FILE >> 20} is the most; cut it into parts"
        )
    kind = kind_of(file.read(512), name)
    promised = promises_length(file, kind)
    with _opened(sound_of(file, kind, size, name), kind, name) as sound:
        return _resampled(sound, name, kind, promised)


def _opened(file: BinaryIO, kind: str, name: str) -> AbstractContextManager[Sound]:
    """The decoder of a kind."""
    if kind in ("WebM", "MP4"):
        from speech.browsers import BrowserSound

        return BrowserSound(file, kind, name)
    import soundfile

    class InOrder(soundfile.SoundFile):
        """Read from beginning to end. soundfile seeks after every block, which fails at the end of
        a FLAC whose header leaves its length open."""

        def seekable(self) -> bool:
            return False

    try:
        return InOrder(file)
    except soundfile.SoundFileError as error:
        raise not_readable(name, kind, _reason(error)) from None


def _reason(error: Exception) -> str:
    reason = str(error).split(": ")[-1].strip()
    if not reason or "not exist" in reason:  # what libsndfile says where nothing can be decoded
        return "nothing in it could be decoded"
    return reason


def _resampled(sound: Sound, name: str, kind: str, promised: bool) -> np.ndarray:
    """Blocks of frames -> mono -> 16 kHz; a small file that unpacks to hours stops at the limit."""
    import soxr

    rate, channels = sound.samplerate, sound.channels
    if not LOWEST_RATE <= rate <= HIGHEST_RATE:
        raise PhiSightError(
            f"{name}: has {rate} samples a second, {LOWEST_RATE} to {HIGHEST_RATE}"
            f" are read; {HOW_TO_CONVERT}"
        )
    if not 1 <= channels <= MOST_CHANNELS:
        raise PhiSightError(
            f"{name}: has {channels} channels, at most {MOST_CHANNELS} are read; {HOW_TO_CONVERT}"
        )
    resampler = soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32")
    pieces: list[np.ndarray] = []
    read = 0
    for block in _blocks(sound, name, kind, promised):
        read += len(block)
        if read > LONGEST_SECONDS * rate:
            raise PhiSightError(
                f"{name}: is longer than {LONGEST_SECONDS / 60:.0f} minutes; cut it into parts"
            )
        # (frames, channels) -> (frames,) -> (samples,)
        pieces.append(resampler.resample_chunk(finite(block).mean(1)))
    if promised and read < sound.frames:
        raise cut_short(name, f"{read / rate:.1f} of {sound.frames / rate:.1f} seconds are there")
    pieces.append(resampler.resample_chunk(np.zeros(0, np.float32), last=True))
    samples = np.concatenate(pieces).astype(np.float32, copy=False)
    if not len(samples):
        raise no_sound(name)
    if (loudest := max(float(samples.max()), -float(samples.min()))) > 1:
        samples /= loudest  # a float file may go beyond
    return samples


def _blocks(sound: Sound, name: str, kind: str, promised: bool) -> Iterator[np.ndarray]:
    """(frames, channels) float32, block by block. A file that promises no length may end within a
    frame, as one does whose recorder was killed: what was decoded until there is kept."""
    import soundfile

    seconds = BLOCK_SECONDS if promised or kind != "FLAC" else SHORT_BLOCK_SECONDS
    size, some = int(seconds * sound.samplerate), False
    while True:
        try:
            block = sound.read(size, dtype="float32", always_2d=True)
        except (soundfile.SoundFileError, OSError) as error:
            if some and not promised and kind == "FLAC":
                return
            raise not_readable(name, kind, _reason(error)) from None
        some = some or len(block) > 0
        if len(block):
            yield block
        if len(block) < size:
            return


def finite(samples: np.ndarray) -> np.ndarray:
    """NaN and infinities become silence, and absurd values are clipped."""
    return np.clip(np.nan_to_num(samples, nan=0.0, posinf=0.0, neginf=0.0), -1e6, 1e6)
