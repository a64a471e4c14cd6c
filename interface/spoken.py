"""Questions by a recording and answers by a voice, for the commands."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from errors import PhiSightError
from model.speech import NoSpeech, Speech, read_audio
from model.voice import Voice, write_wav


def add_speech_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--speech", metavar="NAME",
                        help="Whisper that listens: its name or a .pt file; default: the preset's")
    parser.add_argument("--language", help="that is spoken, such as en or Spanish; default: heard")
    parser.add_argument("--translate", action="store_true", help="what is heard, into English")
    parser.add_argument("--denoise", action="store_true", help="reduce steady noise first")
    parser.add_argument("--speak", metavar="WAV", help="the answer as sound, written there")
    parser.add_argument("--voice", default="espeak-ng", metavar="NAME",
                        help="espeak-ng, or a VitsModel's folder or hub id (%(default)s)")


def listener(
    options: argparse.Namespace, preset: str, device: str,
    show: Callable[[str], None] | None = None,
) -> Callable[[str], str]:
    """An audio file -> what is said in it; the model is loaded by the first one.

    `show` gets every piece as it is understood. The function raises `PhiSightError` for a file that
    is no sound, and `NoSpeech` where nothing is said.
    """
    loaded: list[Speech] = []

    def listen(path: str) -> str:
        audio = read_audio(path)
        if not loaded:
            loaded.append(Speech.load(options.speech or preset, device))
        said = []
        for segment in loaded[0].transcribe(audio, options.language, options.translate,
                                            options.denoise):
            said.append(segment.text)
            if show is not None:
                show(segment.text)
        if not said:
            raise NoSpeech
        return " ".join(said)

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
