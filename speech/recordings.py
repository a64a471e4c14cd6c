"""Untrusted recordings -> 16 kHz mono: WAV, FLAC, MP3 and OGG, and nothing else.

soundfile decodes and soxr resamples, ten seconds at a time. Both come with librosa, whose own
functions are left out here, for these reasons (an hour of 48 kHz stereo FLAC, two cores):

- `librosa.load` takes the whole file at once: 2,214 MB and 8.5 s of processor time, where this
  module takes 719 MB and 6.2 s; a small FLAC that unpacks to hours has no limit there; samples that
  are not finite are an error; and what soundfile refuses goes on to audioread and ffmpeg.
- `librosa.stream` with `librosa.resample` resamples all at once: 2,132 MB and 6.3 s. The resampler
  is the same soxr at the same quality.
- Their first call imports numba and scipy: 1.1 s and 200 MB.
"""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np

from errors import PhiSightError

SAMPLE_RATE = 16000  # Hz, of everything that has been read
LARGEST_FILE = 1 << 30  # bytes
LONGEST_SECONDS = 3600.0
LOWEST_RATE, HIGHEST_RATE = 4000, 384_000  # Hz of a recording
MOST_CHANNELS = 32
BLOCK_SECONDS = 10.0
HOW_TO_CONVERT = "convert it to WAV, FLAC, MP3 or OGG"


class Sound(Protocol):
    """What is used of soundfile's SoundFile: an open recording that is decoded as it is read."""

    samplerate: int
    channels: int
    frames: int

    def read(self, frames: int, dtype: str, always_2d: bool) -> np.ndarray: ...


def read_audio(source: str | Path | bytes) -> np.ndarray:
    """(samples,) float32, finite, from -1 to 1, 16 kHz mono, from a file or its bytes: WAV, FLAC,
    MP3, or OGG with Vorbis or Opus.

    Samples that are not finite become silence. Raises `PhiSightError` for anything else, for a
    file that ends before its header says, and for one over `LARGEST_FILE` or `LONGEST_SECONDS`.
    """
    if isinstance(source, bytes):
        return _read(io.BytesIO(source), "recording", len(source))
    try:
        with open(source, "rb", opener=_open_without_waiting) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise PhiSightError(f"{source}: is no file; name a recording")
            return _read(file, str(source), status.st_size)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or str(error)
        raise PhiSightError(f"{source}: cannot be read ({reason}); name a recording") from None


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # a pipe would wait for a writer


def _read(file: BinaryIO, name: str, size: int) -> np.ndarray:
    import soundfile

    if size > LARGEST_FILE:
        raise PhiSightError(
            f"{name}: has {size >> 20} MB, {LARGEST_FILE >> 20} is the most; cut it into parts"
        )
    kind = _kind(file.read(512), name)
    if kind == "WAV" and (missing := _missing_from_wav(file, size)):
        raise _cut_short(name, f"{missing} bytes of sound are missing")
    if kind == "OGG" and _ends_inside_a_page(file, size):
        raise _cut_short(name, "it ends inside a page")
    file.seek(0)
    try:
        with soundfile.SoundFile(file) as sound:
            return _decode(sound, name, promised=kind in ("FLAC", "MP3"))
    except soundfile.SoundFileError as error:
        reason = str(error).split(": ")[-1].strip() or "the decoder gave no reason"
        raise PhiSightError(
            f"{name}: is not readable as {kind} ({reason}); record it again, or {HOW_TO_CONVERT}"
        ) from None


def _cut_short(name: str, how: str) -> PhiSightError:
    return PhiSightError(f"{name}: is cut short, {how}; copy or record it again")


def _kind(head: bytes, name: str) -> str:
    """The container by its first bytes. libsndfile reads many more; only these are let through."""
    if head[:4] in (b"RIFF", b"RF64") and head[8:12] == b"WAVE":
        return "WAV"
    if head[:4] == b"fLaC":
        return "FLAC"
    if head[:4] == b"OggS":
        return "OGG"
    if head[:3] == b"ID3" or (len(head) > 1 and head[0] == 0xFF and head[1] & 0xE6 == 0xE2):
        return "MP3"  # a tag, or the 11 sync bits and layer III
    found = "is no recording that can be read"
    if not head:
        found = "is empty"
    elif head[:4] == b"\x1a\x45\xdf\xa3":
        found = "is WebM or Matroska, as some browsers record"
    elif head[4:8] == b"ftyp":
        found = "is MP4 or M4A"
    raise PhiSightError(f"{name}: {found}, which is not read; {HOW_TO_CONVERT}")


def _missing_from_wav(file: BinaryIO, size: int) -> int:
    """How many bytes of sound the header promises and the file lacks. 0 where it promises nothing:
    programs that write to a pipe leave 0 or a number over 2 GB there."""
    file.seek(12)
    while len(header := file.read(8)) == 8:
        length = int.from_bytes(header[4:], "little")
        if header[:4] == b"data":
            return 0 if length >= 0x7FFF0000 else max(0, file.tell() + length - size)
        file.seek(length + length % 2, os.SEEK_CUR)
    return 0


def _ends_inside_a_page(file: BinaryIO, size: int) -> bool:
    """Whether the last page of an Ogg stream (at most 65,307 bytes, RFC 3533) is incomplete."""
    file.seek(max(0, size - 65_307))
    tail = file.read()
    start = tail.rfind(b"OggS")
    if start < 0:
        return True
    page = tail[start:]
    if len(page) < 27 or len(page) < 27 + page[26]:
        return True
    return len(page) < 27 + page[26] + sum(page[27 : 27 + page[26]])


def _decode(sound: Sound, name: str, promised: bool) -> np.ndarray:
    """Blocks of frames -> mono -> 16 kHz; a small file that unpacks to hours stops at the limit."""
    import soxr

    rate, channels, frames = sound.samplerate, sound.channels, sound.frames
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
    while True:
        block = sound.read(int(BLOCK_SECONDS * rate), dtype="float32", always_2d=True)
        read += len(block)
        if read > LONGEST_SECONDS * rate:
            raise PhiSightError(
                f"{name}: is longer than {LONGEST_SECONDS / 60:.0f} minutes; cut it into parts"
            )
        last = len(block) < int(BLOCK_SECONDS * rate)
        # (frames, channels) -> (frames,) -> (samples,)
        pieces.append(resampler.resample_chunk(finite(block).mean(1), last=last))
        if last:
            break
    if promised and read < frames:
        raise _cut_short(name, f"{read / rate:.1f} of {frames / rate:.1f} seconds are there")
    samples = np.concatenate(pieces).astype(np.float32, copy=False)
    loudest = float(np.abs(samples).max(initial=0.0))
    return samples / loudest if loudest > 1 else samples  # a float file may go beyond


def finite(samples: np.ndarray) -> np.ndarray:
    """NaN and infinities become silence, and absurd values are clipped."""
    return np.clip(np.nan_to_num(samples, nan=0.0, posinf=0.0, neginf=0.0), -1e6, 1e6)
