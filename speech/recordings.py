"""Untrusted recordings -> 16 kHz mono, in a child process that can be limited and ended.

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

import functools
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from speech.containers import HOW_TO_CONVERT
from speech.decode import SAMPLE_RATE, decode_in_child, finite
from workers.pool import Limits, Workers, never

__all__ = ["SAMPLE_RATE", "finite", "read_audio"]

LIMITS = Limits(  # an hour of the slowest kind takes 20 s, and 230 MB as samples
    cpu_seconds=60, wall_seconds=600.0, memory=1 << 30, result=256 << 20
)


@functools.cache
def _children() -> Workers:
    return Workers(2, LIMITS)


def read_audio(source: str | Path | bytes, cancelled: Callable[[], bool] = never) -> np.ndarray:
    """(samples,) float32, finite, from -1 to 1, 16 kHz mono, from a file or its bytes: WAV, AIFF,
    AU, FLAC, MP3, OGG with Vorbis or Opus, and where PyAV is installed WebM and MP4.

    Samples that are not finite become silence. A file whose header leaves its length open is read
    to its end. Raises `PhiSightError` for anything else, for a file that ends before its header
    says or holds no sound, and for one over 1 GB or an hour; `workers.Cancelled` as soon as
    `cancelled` says so.
    """
    given = isinstance(source, bytes)
    _, samples = _children().call(
        decode_in_child,
        source if isinstance(source, bytes) else b"",
        {
            "path": "" if given else os.path.abspath(os.fspath(source)),
            "name": "recording" if given else str(source),
        },
        name="recording" if given else str(source),
        remedy=f"record it again, or {HOW_TO_CONVERT}",
        cancelled=cancelled,
    )
    return np.frombuffer(samples, np.float32)
