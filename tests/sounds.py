"""Sounds that the tests of speech listen to, and the tiny preset's Whisper."""

from __future__ import annotations

import functools
import io
import shutil

import numpy as np
import pytest
import runs
import soundfile
import soxr

from config import default_config
from speech.recordings import SAMPLE_RATE
from speech.voice import espeak
from speech.whisper import Speech

RATE = SAMPLE_RATE
TINY = runs.ROOT / default_config("tiny").speech
JFK = runs.ROOT.parent / "shared" / "real" / "speech" / "jfk.flac"
needs_espeak = pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="no espeak-ng here")


def tone(hertz: float = 440, seconds: float = 1.0, rate: int = RATE) -> np.ndarray:
    return np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate).astype(np.float32) / 2


def vowels(seconds: float = 1.5, pitch: float = 120.0) -> np.ndarray:
    """A made-up voice: pulses at a falling pitch through two resonances that move."""
    times = np.arange(int(seconds * RATE)) / RATE
    phase = np.cumsum(pitch * (1.1 - 0.2 * times / seconds) / RATE)
    first, second = 500 + 250 * np.sin(9 * times), 1500 + 700 * np.cos(7 * times)
    sound = np.zeros_like(times)
    for number in range(1, 28):
        hertz = number * pitch
        loud = 1 / (1 + ((hertz - first) / 120) ** 2) + 0.5 / (1 + ((hertz - second) / 160) ** 2)
        sound += loud * np.sin(2 * np.pi * number * phase)
    return (0.4 * sound / np.abs(sound).max()).astype(np.float32)


def said(text: str, voice: str = "en-gb") -> np.ndarray:
    samples, rate = espeak(text, voice)
    return soxr.resample(samples, rate, RATE)


def encoded(samples: np.ndarray, rate: int, kind: str, subtype: str | None = None) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind, subtype=subtype)
    return file.getvalue()


@functools.cache
def tiny() -> Speech:
    return Speech.load(TINY)


KINDS = [
    ("WAV", "PCM_16"),
    ("WAV", "PCM_U8"),
    ("WAV", "PCM_24"),
    ("WAV", "FLOAT"),
    ("WAV", "ULAW"),
    ("WAVEX", "PCM_32"),
    ("RF64", "PCM_16"),
    ("W64", "PCM_16"),
    ("AIFF", "PCM_16"),
    ("AU", "FLOAT"),
    ("FLAC", "PCM_16"),
    ("FLAC", "PCM_24"),
    ("OGG", "VORBIS"),
    ("OGG", "OPUS"),
    ("MP3", "MPEG_LAYER_III"),
]


def noise(kind: str, seconds: float = 4.0) -> np.ndarray:
    rng = np.random.default_rng(3)
    samples = int(seconds * RATE)
    spectrum = np.fft.rfft(rng.standard_normal(samples))
    power = {"white": 0, "pink": 0.5, "brown": 1}[kind]
    sound = np.fft.irfft(spectrum / np.maximum(np.arange(len(spectrum)), 40) ** power, samples)
    return (0.2 * sound / sound.std()).astype(np.float32)
