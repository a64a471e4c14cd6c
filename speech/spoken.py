"""Questions by a recording and answers by a voice, for the commands."""

from __future__ import annotations

import argparse
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy

from errors import PhiSightError
from speech.voice import PROGRAM, Voice, write_wav
from speech.whisper import Speech, write_down


class WhisperOnce:
    """Gives a Whisper, which is loaded when it is first needed, from any thread."""

    def __init__(self, name: str, device: str) -> None:
        self.name, self.device = name, device
        self.loaded: list[Speech] = []  # none, or the one
        self._lock = threading.Lock()

    def __call__(self) -> Speech:
        with self._lock:
            if not self.loaded:
                self.loaded.append(Speech.load(self.name, self.device))
            return self.loaded[0]


def loaded_once(name: str, device: str = "cpu") -> WhisperOnce | None:
    """What gives the Whisper called `name`; None for an empty name."""
    return WhisperOnce(name, device) if name else None


def voices_loaded_once(name: str) -> Callable[[str], Voice] | None:
    """What gives the voice called `name` for a language, loaded when it is first needed, from any
    thread; None for an empty name."""
    loaded: dict[str, Voice] = {}
    lock = threading.Lock()

    def load(language: str) -> Voice:
        own = language if name == PROGRAM else ""  # a VitsModel speaks one language
        with lock:
            if own not in loaded:
                loaded[own] = Voice.load(name, language)
            return loaded[own]

    return load if name else None


def listener(
    options: argparse.Namespace,
    preset: str,
    device: str,
    show: Callable[[str], None] | None = None,
    fits: Callable[[str], bool] | None = None,
) -> Callable[[numpy.ndarray], str]:
    """Audio as `read_audio` gives it -> what is said in it; the first one loads the model.

    `show` gets every piece as it is understood. The function raises `NoSpeech` where nothing is
    said, `TooLong` where the text does not pass `fits`, `PhiSightError` where no model is named.
    """
    load = loaded_once(options.speech or preset, device)

    def listen(audio: numpy.ndarray) -> str:
        if load is None:
            raise PhiSightError(
                "--speech: neither this flag nor the run names a Whisper; name one, such as base,"
                " or a .pt file"
            )
        segments = load().transcribe(audio, options.language, options.translate, options.denoise)
        return write_down(segments, fits, show)

    return listen


def tell_heard(text: str) -> None:
    """Beside the answer, which alone goes to standard output."""
    print(f"heard: {text}", file=sys.stderr, flush=True)


class SpokenAnswer:
    """Where `--speak` puts the answer; the voice is loaded first, so that its absence is told
    before the model is asked."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.path = Path(options.speak)
        if not self.path.parent.is_dir():
            raise PhiSightError(f"--speak {self.path}: its folder does not exist; make it first")
        self.voice = Voice.load(options.voice)

    def write(self, text: str) -> None:
        write_wav(self.path, *self.voice.speak(text))
