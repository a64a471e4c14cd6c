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
    NoSound,
    cut_short,
    kind_of,
    no_sound,
    not_readable,
    promises_length,
    recordings_in,
    sound_of,
)
from system import disk
from workers.child import Result

SAMPLE_RATE = 16000  # Hz, of everything that has been read
LARGEST_FILE = 1 << 30  # bytes
LONGEST_SECONDS = 3600.0
LOWEST_RATE, HIGHEST_RATE = 4000, 384_000  # Hz of a recording
MOST_CHANNELS = 32
CANCELLED = 0.02  # energy of the mean by that of a channel; of 32 that differ it is 0.03
LARGEST_SAMPLE = 1e6  # 1 is full scale, and float files may go beyond
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
    return os.open(path, flags | disk.NO_WAIT)  # a pipe would wait for a writer


def _read(file: BinaryIO, name: str, size: int) -> np.ndarray:
    if size > LARGEST_FILE:
        raise PhiSightError(
            f"{name}: has {size >> 20} MB, {LARGEST_FILE >> 20} is the most; cut it into parts"
        )
    kind = kind_of(file.read(512), name)
    parts: list[np.ndarray] = []
    for part in recordings_in(file, kind, size, name):
        most = LONGEST_SECONDS - sum(map(len, parts)) / SAMPLE_RATE
        try:
            parts.append(_decoded(part, kind, name, most))
        except NoSound:  # of several that were joined, another may hold some
            continue
    if not parts:
        raise no_sound(name)
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _decoded(file: BinaryIO, kind: str, name: str, most: float) -> np.ndarray:
    """(samples,) of one recording of at most `most` seconds."""
    size = file.seek(0, os.SEEK_END)
    promised = promises_length(file, kind)
    channel: int | None = None
    while True:
        with _opened(sound_of(file, kind, size, name), kind, name) as sound:
            samples, instead = _resampled(sound, name, kind, promised, most, channel)
        if instead is None:
            return samples
        channel = instead  # it is decoded once more: both at once would take twice the memory


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


def _resampled(
    sound: Sound, name: str, kind: str, promised: bool, most: float, channel: int | None
) -> tuple[np.ndarray, int | None]:
    """Blocks of frames -> mono -> 16 kHz; a small file that unpacks to hours stops after `most`
    seconds. Mono is the mean of all channels, or `channel`. Where they cancel each other, as those
    of a microphone with a crossed wire do, the second value is the channel to take instead."""
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
    mixed, single = 0.0, np.zeros(channels)  # energy of the mean, and of every channel
    for block in _blocks(sound, name, kind, promised):
        read += len(block)
        if read > most * rate:
            raise PhiSightError(
                f"{name}: is longer than {LONGEST_SECONDS / 60:.0f} minutes; cut it into parts"
            )
        block = finite(block)  # (frames, channels) -> (frames,) -> (samples,)
        mono = block.mean(1) if channel is None else block[:, channel]
        mixed += float(np.vdot(mono, mono))
        single += np.einsum("fc,fc->c", block, block)
        pieces.append(resampler.resample_chunk(np.ascontiguousarray(mono)))
    if promised and read < sound.frames:
        raise cut_short(name, f"{read / rate:.1f} of {sound.frames / rate:.1f} seconds are there")
    pieces.append(resampler.resample_chunk(np.zeros(0, np.float32), last=True))
    samples = np.concatenate(pieces).astype(np.float32, copy=False)
    if not len(samples):
        raise no_sound(name)
    if (loudest := max(float(samples.max()), -float(samples.min()))) > 1:
        samples /= loudest  # a float file may go beyond
    cancel = channel is None and mixed < CANCELLED * single.mean()
    return samples, int(single.argmax()) if cancel else None


def _blocks(sound: Sound, name: str, kind: str, promised: bool) -> Iterator[np.ndarray]:
    """(frames, channels) float32, block by block. A file that promises no length may end within a
    frame, as one does whose recorder was killed: what was decoded until there is kept. Behind what
    another promises there may be a tag, which is not sound."""
    import soundfile

    seconds = BLOCK_SECONDS if promised or kind != "FLAC" else SHORT_BLOCK_SECONDS
    size, some = int(seconds * sound.samplerate), False
    left = sound.frames if promised else None
    while left != 0:
        size = size if left is None else min(size, left)
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
        left = None if left is None else left - len(block)


def finite(samples: np.ndarray) -> np.ndarray:
    """NaN, infinities and absurd values become silence: one of them would set how loud all else
    is."""
    return np.where(np.abs(samples) < LARGEST_SAMPLE, samples, 0)  # false for NaN
