"""What the API hears and speaks with: a Whisper and a voice, loaded when they are first needed."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy

from api.errors import ApiError
from api.spoken import Speak
from api.transcriptions import Heard, Transcribe
from errors import PhiSightError
from speech.recordings import SAMPLE_RATE, read_audio
from speech.spoken import voices_loaded_once
from speech.voice import PROGRAM
from speech.whisper import Speech

Listen = Callable[[bytes, Callable[[], bool], Callable[[str], bool]], str]
"""Writes down the speech of a recording, until the second one says that nobody waits for it, or the
third one that what is written down so far is too long."""
Loaded = TypeVar("Loaded")


def available(load: Callable[[], Loaded], what: str) -> Loaded:
    """What `load` gives; that it fails is not the client's fault, and none of its business."""
    try:
        return load()
    except PhiSightError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        message = f"the server cannot load its {what}; its log says why"
        raise ApiError(500, message, "speech_unavailable") from error


def listening(load: Callable[[], Speech]) -> Listen:
    """What writes down the speech of a question. Raises `PhiSightError`, such as `TooLong`."""

    def listen(data: bytes, cancelled: Callable[[], bool], fits: Callable[[str], bool]) -> str:
        speech = available(load, "speech model")
        try:
            return speech.text(read_audio(data, cancelled), cancelled=cancelled, fits=fits)
        except Exception as error:
            # An error holds the variables of its frames, an hour of sound among them, and is itself
            # held until Python looks for cycles.
            traceback.clear_frames(error.__traceback__)
            raise

    return listen


def transcribing(load: Callable[[], Speech]) -> Transcribe:
    """What writes down a recording piece by piece."""

    def transcribe(
        data: bytes, language: str | None, translate: bool, cancelled: Callable[[], bool]
    ) -> Heard:
        speech = available(load, "speech model")
        audio = read_audio(data, cancelled)
        try:
            pieces = speech.transcribe(audio, language, translate, cancelled=cancelled)
        except PhiSightError as error:  # which names the model, and so where it lies
            told = str(error).replace(speech.name, Path(speech.name).stem)
            raise PhiSightError(told) from error
        return Heard(tuple(pieces), len(audio) / SAMPLE_RATE)

    return transcribe


def speaking(name: str) -> Speak | None:
    """What speaks with the voice called `name`; None for an empty name."""
    load = voices_loaded_once(name)
    if load is None:
        return None

    def speak(
        text: str, voice: str, speed: float, cancelled: Callable[[], bool]
    ) -> tuple[numpy.ndarray, int]:
        chosen = available(lambda: load("en"), "voice")
        if voice and name == PROGRAM:
            chosen = load(voice)
        elif voice and voice != name:
            raise PhiSightError(f"voice {voice!r}: is not here; leave it out, or ask for alloy")
        return chosen.speak(text, speed, cancelled)

    return speak
